"""Runs every op's Triton kernels on the CPU and prints how far they are from the naive twin in float64; a test starts it.

A process of its own, because `TRITON_INTERPRET` is read when Triton is imported and changes every kernel defined after.
"""

import json

import torch

from benchmarks.kernels.registry import OPS, ModelShape
from hf_qst_kernels import linear_index_add, norm_index_select, use_backend
from hf_qst_kernels.dispatch import use_configuration
from tests.kernels.compared import poison, results, worst_distance

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def distances():
    for op in OPS:
        for name, dtype in DTYPES.items():
            for example, arguments in op.examples(dtype, "cpu"):
                twin = results(op.naive, arguments, torch.float64)
                with use_backend("triton"):
                    ours = results(op.function, arguments)
                yield f"{op.name} | {name} | {example}", worst_distance(ours, twin)


TINY = ModelShape("tiny", 64, 128, 50)


def configurations():
    """Every shipped configuration, at shapes that do not fall back to the one of unaligned rows."""
    for op in (op for op in OPS if op.configurations):
        for workload in op.workloads(TINY, 3, torch.float32, "cpu"):
            arguments = {name: value for name, value in workload.arguments.items() if name != "inplace"}
            if not op.trains:
                first = next(iter(arguments))
                arguments[first] = arguments[first].detach().requires_grad_()
            twin = results(op.naive, arguments, torch.float64)
            for decision, choices in op.configurations.items():
                for i, configuration in enumerate(choices):
                    with use_configuration(decision, configuration):
                        ours = results(op.function, arguments)
                    yield f"configuration {decision} {i} {workload.name}", worst_distance(ours, twin)


def properties():
    hidden, weight, index = torch.randn(2, 5), torch.ones(5), torch.tensor([0, 5, -1, 4])
    y = norm_index_select(hidden, weight, None, index)
    fine = y[:, [0, 3]].isfinite().all() and y[:, 1:3].isnan().all()
    yield "an index out of range is no number", 0.0 if fine else 1.0
    residual = torch.zeros(3, 2, 5)
    index = torch.tensor([0, 5, -1, 4])
    linear_index_add(torch.ones(2, 3), torch.ones(4, 3), None, index, residual[1], inplace=True)
    expected = torch.zeros(3, 2, 5)
    expected[1, :, [0, 4]] = 3
    yield "and writes nothing", float((residual - expected).abs().max())
    differences = []
    for op in OPS:
        for _, arguments in op.examples(torch.float32, "cpu"):
            twice = [results(op.function, arguments) for _ in range(2)]
            differences += [not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*twice, strict=True)]
    yield "repeated runs", float(sum(differences))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    poison(setattr)
    measured = dict(distances())
    with use_backend("triton"):
        measured |= dict(properties())
        measured |= dict(configurations())
    print(json.dumps(measured))
