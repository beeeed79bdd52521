"""Peak memory of the fused head and of Liger-Kernel's. It depends on no device, so the CPU can show it.

    python -m benchmarks.kernels --liger-memory              # a minute or two; writes results/kernels_liger_memory.json

Both run their Triton kernels in the interpreter, in float32, with a frozen head, one forward and backward, in a process
of their own. Chunks of rows are those of a CUDA device, and Liger's GEMMs write into its buffer as they do there. With
that each is held against its count: the gradient `[tokens, dim]` and a chunk's logits, or in backward what scaling the
gradient takes. At the shapes of real models, whose products an interpreter is too slow for, the count stands alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common.measure import RESULTS, python_path, write_json
from benchmarks.common.tables import MIB, markdown
from benchmarks.kernels.compiled import sources
from benchmarks.kernels.peers import liger_cross_entropy
from benchmarks.kernels.registry import MODELS
from benchmarks.kernels.timing import about, peak_bytes
from hf_qst_kernels import linear_cross_entropy, use_backend
from hf_qst_kernels.ops import linear_cross_entropy as cross_entropy

# tokens, dim, vocabulary
SHAPES = ((512, 256, 32000), (1024, 512, 32000), (256, 1024, 151936))


def liger_chunk_rows(tokens: int, dim: int, vocab: int) -> int:
    """Rows of Liger's chunks: their logits hold about as many entries as the hidden states, its release 0.8.5."""
    rows = -(-tokens // -(-vocab // dim))
    return min(tokens, 1 << (rows - 1).bit_length())


def counted_bytes(tokens: int, dim: int, vocab: int, chunk: int, size: int, scaled: bool) -> int:
    """
    What a call holds at most: the gradient and a chunk's logits in forward, twice the gradient in backward if `scaled`.

    Args:
        size: bytes of an entry.
        scaled: whether backward writes the scaled gradient to memory of its own.
    """
    gradient = tokens * dim * size
    return gradient + max(min(chunk, tokens) * vocab * size, gradient if scaled else 0)


def run(call: Callable, hidden: torch.Tensor, fixed: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Loss, gradient in `hidden`, most bytes above what was there before, and those kept between the two."""
    there, kept, result = {tensor.data_ptr() for tensor in fixed}, {}, {}

    def note(tensor):
        if tensor.data_ptr() not in there:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def noted():
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = call()
        gc.collect()  # the interpreter's frames hold the logits, in cycles
        result["loss"] = loss.detach()
        return loss

    hidden.grad = None
    peak = peak_bytes(noted)
    grad, hidden.grad = hidden.grad, None
    return result["loss"], grad, {"peak_bytes": peak, "kept_bytes": sum(kept.values())}


def compare(shape: tuple[int, int, int], options: dict) -> list[dict]:
    """Rows of Liger's and ours at one shape, with how far apart losses and gradients are. Run in the interpreter."""
    import liger_kernel.ops.fused_linear_cross_entropy as liger

    # the rules of a CUDA device, on this one
    rule = cross_entropy.default_chunk_rows
    cuda = lambda value: "cuda" if value == "cpu" else value
    cross_entropy.default_chunk_rows = lambda *a, **k: rule(*map(cuda, a), **{n: cuda(v) for n, v in k.items()})
    liger._can_use_mm_out = lambda hidden, weight: True

    torch.manual_seed(0)
    tokens, dim, vocab = shape
    hidden = torch.randn(tokens, dim, requires_grad=True)
    weight, labels = torch.randn(vocab, dim) / dim**0.5, torch.randint(vocab, (tokens,))
    labels[1:2] = -100

    def ours(**chunk):
        with use_backend("triton"):
            return linear_cross_entropy(hidden, weight, labels, **options, **chunk)

    calls = {
        "Liger": lambda: liger_cross_entropy(hidden, weight, labels, **options),
        "linear_cross_entropy": ours,
        "  with Liger's chunks": lambda: ours(chunk_size=liger_chunk_rows(*shape)),
    }
    rows, expected = [], None
    for name, call in calls.items():
        loss, grad, memory = run(call, hidden, [hidden, weight, labels])
        expected = expected or (loss, grad)
        row = {"shape": list(shape), "variant": name, "options": options, **memory}
        row["loss_difference"] = (loss - expected[0]).abs().item()
        row["gradient_difference"] = ((grad - expected[1]).abs().max() / expected[1].abs().max()).item()
        rows.append(row)
    return rows


def interpreted(cases: list[dict]) -> list[dict]:
    """`compare` of each case in a process of its own, in Triton's interpreter.

    Raises:
        ImportError: Liger-Kernel or Triton is not installed.
        RuntimeError: the process failed, with the end of what it said.
    """
    for name in ("liger_kernel", "triton"):
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.kernels.liger", json.dumps(cases), str(output)]
        done = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:3])} failed: {done.stderr[-2000:]}")
        return json.loads(output.read_text())


def counted(models, tokens: int) -> list[dict]:
    """At the widths of real models, in bfloat16: bytes by count, not measured."""
    rows = []
    for model in models:
        shape = (tokens, model.dim, model.vocab)
        liger = liger_chunk_rows(*shape)
        ours = rule_of(cross_entropy, *shape)
        for name, chunk, scaled in (("Liger", liger, False), ("linear_cross_entropy", ours, True)):
            row = {"model": model.name, "shape": list(shape), "variant": name, "chunk_rows": chunk}
            rows.append({**row, "counted_bytes": counted_bytes(*shape, chunk, 2, scaled)})
    return rows


def rule_of(cross_entropy, tokens: int, dim: int, vocab: int) -> int:
    """Rows of our chunks on a CUDA device, whichever of the sizes the rule asks for."""
    import inspect

    given = {"tokens": tokens, "rows": tokens, "dim": dim, "vocab": vocab, "device_type": "cuda"}
    asked = inspect.signature(cross_entropy.default_chunk_rows).parameters
    return min(tokens, cross_entropy.default_chunk_rows(**{name: given[name] for name in asked if name in given}))


def table(rows: list[dict]) -> str:
    """In Markdown: measured peaks in MiB next to Liger's."""
    liger = {tuple(row["shape"]): row["peak_bytes"] for row in rows if row["variant"] == "Liger"}
    lines = []
    for row in rows:
        line = ["{} x {}, {}".format(*row["shape"]), row["variant"], f"{row['peak_bytes'] / MIB:.1f}"]
        of_liger = row["peak_bytes"] / liger[tuple(row["shape"])]
        lines.append([*line, f"{of_liger:.2f}", f"{row['kept_bytes'] / MIB:.1f}"])
    return markdown(["tokens x dim, vocab", "variant", "peak MiB", "of Liger's", "kept MiB"], lines, text=2)


def main(output: Path | None = None) -> dict:
    """Measure, write and print; the report."""
    report = {**about(torch.device("cpu")), "dtype": "float32", "sources": sources("linear_cross_entropy*.py")}
    rows = report["rows"] = []
    for shape in SHAPES:
        rows += interpreted([{"shape": shape, "options": {}}])
        print(table(rows[-3:]), flush=True)
    report["counted"] = counted([model for model in MODELS if model.vocab > 2000], 2048)
    output = output or RESULTS / "kernels_liger_memory.json"
    write_json(output, report)
    for row in report["counted"]:
        print(f"{row['model']:<14} {row['variant']:<22} {row['chunk_rows']:>5} rows a chunk, "
              f"{row['counted_bytes'] / MIB:.1f} MiB by count")  # fmt: skip
    print(f"wrote {output}")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", help="JSON list of arguments of `compare`")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_json(arguments.output, [row for case in json.loads(arguments.cases) for row in compare(**case)])
