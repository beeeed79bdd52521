"""Compiles every Triton kernel in every configuration for GPUs that need not be here.

    python -m benchmarks.kernels.compiled                        # all targets; writes results/kernels_compiled.json
    python -m benchmarks.kernels.compiled --targets sm_90 --ops norm_gate --output -

Recorded are registers a thread, instructions that move a spilled register, and shared memory a block.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

import hf_qst_kernels
from benchmarks.common.command_line import parser_of
from benchmarks.common.measure import RESULTS, commit, hashes_of, write_json
from benchmarks.common.tables import markdown

KERNELS = Path(hf_qst_kernels.__file__).parent
# architecture, warp size, bytes of shared memory a block may have, registers a thread may have
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
NVIDIA = ("sm_80", "sm_90", "sm_100")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread of the one kernel in a binary for an NVIDIA GPU, and its instructions on spilled registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def shown(what: str) -> str:
            return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout

        fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown("--dump-resource-usage")))
        # A stack may also be there for a call (an exact division makes one): only then it is worth to read the code.
        has_stack = int(fields["STACK"]) or int(fields["LOCAL"])
        spills = len(re.findall(r"\b(?:STL|LDL)\b", shown("--dump-sass"))) if has_stack else 0
    return {"registers": int(fields["REG"]), "spills": spills}


def compiled(kernel, types: dict, options: dict, target: str) -> dict[str, int]:
    """
    What one kernel takes on one target.

    Args:
        types (`dict`): argument name -> Triton type, or the value of a constexpr. A type that ends in `:16` is a number
            that 16 divides, as Triton finds out at a launch. Pointers are taken as 16-byte aligned.
        options (`dict`): of the launch; names in capitals are constexprs.
        target (`str`): one of `TARGETS`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, warp, _ = TARGETS[target]
    types = {**types, **{name: value for name, value in options.items() if name.isupper()}}
    names = kernel.arg_names
    aligned = [name for name in names if str(types[name]).startswith("*") or str(types[name]).endswith(":16")]
    plain = {name: type_.removesuffix(":16") for name, type_ in types.items() if isinstance(type_, str)}
    source = ASTSource(
        fn=kernel,
        signature={name: plain.get(name, "constexpr") for name in names},
        constexprs={name: types[name] for name in names if name not in plain},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    built = triton.compile(
        source,
        target=GPUTarget(backend, architecture, warp),
        options={"enable_fp_fusion": True, **{name: value for name, value in options.items() if not name.isupper()}},
    )
    row = {"shared": built.metadata.shared, "shared_limit": TARGETS[target][3]}
    return row | resources(built.asm["cubin"]) if backend == "cuda" else row


def cases(ops: list[str] | None) -> Iterator[tuple[str, object, dict, dict]]:
    """Every specialisation of every op, or of those named."""
    from benchmarks.kernels.compiled_cases import CASES  # imports Triton

    for every in CASES.values():
        for name, *rest in every():
            if ops is None or name.split()[0].removesuffix("_backward") in ops:
                yield name, *rest


def sources(pattern: str = "*_triton.py") -> dict[str, str]:
    """SHA-256 of the package's files of this name, by which a record shows whether it is of them."""
    return hashes_of(KERNELS.rglob(pattern), KERNELS)


def compile_all(targets: list[str], ops: list[str] | None, each_once: bool = False) -> list[dict]:
    """One row for each specialisation, configuration and target; `each_once`: in the first configuration only."""
    rows, every = [], list(cases(ops))
    if each_once:
        every = list({case[0]: case for case in reversed(every)}.values())
    with tqdm(total=len(every) * len(targets), desc="compiling", unit="kernel") as progress:
        for name, kernel, types, options in every:
            for target in targets:
                row = {"kernel": name, "configuration": options, "target": target}
                rows.append(row | compiled(kernel, types, options, target))
                progress.update()
    return rows


def fits(row: dict) -> bool:
    """Whether a kernel keeps to its shared memory and to its registers."""
    return row["shared"] <= row["shared_limit"] and not row.get("spills")


def table(rows: list[dict]) -> str:
    """In Markdown, the most registers and KiB of shared memory of each kernel over its configurations, by target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for target in targets:
            ours = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
            registers, shared = (max(row.get(name, 0) for row in ours) for name in ("registers", "shared"))
            cells.append(f"{registers}, {shared / 1024:.1f}{'' if all(map(fits, ours)) else ' (spills)'}")
        lines.append([kernel, str(len(ours)), *cells])
    return markdown(["kernel", "configurations", *targets], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.kernels.compiled", __doc__)
    parser.add_argument("--targets", nargs="+", default=list(NVIDIA), choices=TARGETS)
    parser.add_argument("--ops", nargs="+", default=None)
    parser.add_argument("--each-once", action="store_true", help="each kernel in its first configuration only")
    parser.add_argument(
        "--output",
        default=str(RESULTS / "kernels_compiled.json"),
        help="file; - prints one line of JSON and nothing else",
    )
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("kernels defined under TRITON_INTERPRET=1 cannot be compiled: unset it")

    rows = compile_all(args.targets, args.ops, args.each_once)
    if args.output == "-":
        print(json.dumps(rows))
        return
    report = {"versions": {name: metadata.version(name) for name in ("torch", "triton")}, "commit": commit()}
    write_json(Path(args.output), {**report, "sources": sources(), "rows": rows})
    print(table(rows))
    broken = [row for row in rows if not fits(row)]
    print(f"{len(rows)} kernels compiled, {len(broken)} with spills or too much shared memory; wrote {args.output}")
    for row in broken:
        print(f"  {row}", file=sys.stderr)
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
