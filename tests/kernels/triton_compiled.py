"""Compiles the Triton kernels for GPUs that need not be here and prints the shared memory each takes; a test starts it.

A process of its own, because kernels defined under `TRITON_INTERPRET=1` cannot be compiled.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_qst_kernels import cross_entropy_triton, taps_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compiled(kernel, types, options, target):
    """`types`: argument name -> Triton type, or the value of a constexpr. Pointers are taken as 16-byte aligned."""
    options = dict(options)
    block = {name: options.pop(name) for name in list(options) if name.isupper()}
    types = {**types, **block}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] if isinstance(types[name], str) else "constexpr" for name in names},
        constexprs={name: types[name] for name in names if not isinstance(types[name], str)},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if str(types[name]).startswith("*")},
    )
    return triton.compile(source, target=target, options=options).metadata.shared


def kernels():
    floats = {"labels": "*i64", "losses": "*fp32", "ignore_index": "i32", "smoothing": "fp32", "softcap": "fp32"}
    for dtype, vocab in (("bf16", 131072), ("fp16", 4097), ("fp32", 100), ("bf16", 1)):
        # Triton makes a constexpr of an integer argument that is 1
        sizes = {"row_stride": "i64", "vocab": "i32"} if vocab > 1 else {"row_stride": 1, "vocab": 1}
        for everything in (True, False):
            flags = {"SOFTCAP": everything, "SMOOTH": everything, "GRAD": everything}
            types = {"logits": f"*{dtype}", **sizes, **floats, **flags}
            name = f"cross_entropy {dtype} {vocab} {'all options' if everything else 'loss only'}"
            yield name, cross_entropy_triton.cross_entropy_rows, types, cross_entropy_triton.launch_options(vocab)
    shape = {"blocks": "i32", "blocks_per_row": "i32", "dim": "i32", "scales": "*fp32", "q": "*i8"}
    for dtype, block in (("bf16", 64), ("fp32", 64), ("fp16", 24)):
        options = taps_triton.launch_options(block)
        types = {"x": f"*{dtype}", "x_stride": "i64", "tiny": "fp32", **shape}
        yield f"quantize {dtype} block {block}", taps_triton.quantize_blocks, types, options
        yield f"dequantize {dtype} block {block}", taps_triton.dequantize_blocks, {"out": f"*{dtype}", **shape}, options
    ones = {**shape, "blocks": 1, "blocks_per_row": 1, "dim": 1, "x": "*fp32", "x_stride": 1, "tiny": "fp32"}
    yield "quantize one number", taps_triton.quantize_blocks, ones, taps_triton.launch_options(64)


if __name__ == "__main__":
    shared = {}
    for name, kernel, types, options in kernels():
        for target in TARGETS:
            if target == "sm_90" or "131072" in name or "bf16 block 64" in name:
                shared[f"{name} {target}"] = compiled(kernel, types, options, TARGETS[target])
    print(json.dumps(shared))
