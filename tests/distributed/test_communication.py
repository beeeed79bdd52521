"""The bytes that a plan says processes exchange are those that they do."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_qst import plan
from hf_qst.base_model.decoder_stack import find_decoder_stack
from tests.conformance.methods import LINES
from tests.distributed.processes import in_processes
from tests.distributed.training import FSDP2, let_a_cpu_shard, make, trainer

METHODS = ["qst", "disp", "mixed_rank"]
# Scalars that Trainer sums in a step: the number of tokens and the gradients' norm.
FEW = 256


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors that this process sums with others or gathers from them."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if function.namespace in ("c10d", "_c10d_functional"):
            kinds = {"reduce_scatter": "reduced", "all_gather": "gathered", "allgather": "gathered", "reduce": "summed"}
            kind = next((kind for part, kind in kinds.items() if part in name), None)
            if kind is not None:
                whole = args[1] if kind == "reduced" else args[0]
                parts = whole if isinstance(whole, (list, tuple)) else [whole]
                self.bytes[kind] += sum(t.numel() * t.element_size() for t in parts if isinstance(t, torch.Tensor))
        return function(*args, **(kwargs or {}))


def step_bytes(place, shard: bool) -> dict:
    """Of the third step of each method."""
    if shard:
        let_a_cpu_shard()
    found = {}
    for name in METHODS:
        run = trainer(name, make(name), place / name, save_strategy="no", max_steps=3, **(FSDP2 if shard else {}))
        inside, counted = run.training_step, Collectives()

        def step(*args, run=run, inside=inside, counted=counted, **kwargs):
            if run.state.global_step < 2:
                return inside(*args, **kwargs)
            with counted:
                return inside(*args, **kwargs)

        run.training_step = step
        run.train()
        found[name] = dict(counted.bytes)
    return found


@pytest.fixture(scope="module")
def planned():
    return {name: plan(make(name).train(), batch=4, sequence=16, device="cpu", search=False) for name in METHODS}


def test_ddp_sums_the_gradients_of_what_is_trained(planned, tmp_path):
    for found in in_processes(2, step_bytes, tmp_path / "results", tmp_path, False):
        for name, made in planned.items():
            assert abs(found[name]["summed"] - made.exchanged["gradients"]) <= FEW, name
            assert "gathered" not in found[name] and "reduced" not in found[name]


def test_fsdp2_gathers_blocks_again_only_where_a_gradient_goes_back(planned, tmp_path):
    for found in in_processes(2, step_bytes, tmp_path / "results", tmp_path, True):
        for name, made in planned.items():
            for kind in ("gathered", "reduced"):
                # Parts are padded to the same size in all processes.
                assert found[name][kind] == pytest.approx(made.exchanged[kind], rel=0.03, abs=FEW), (name, kind)
    for name, made in planned.items():
        model = make(name)
        base = model.get_base_model()
        released = [base.get_input_embeddings(), *find_decoder_stack(base).blocks]
        # Nothing is back-propagated through the base of a side network, but FSDP2 fetches its last block.
        twice = released[-1:] if name == "qst" else released
        assert made.exchanged["gathered"] == sum(4 * p.numel() for part in (model, *twice) for p in part.parameters())


def test_bytes_received():
    made = plan(LINES["qst"].model().train(), batch=1, sequence=8, device="cpu", search=False)
    assert made.communication(1) == {"ddp": 0, "zero2": 0, "fsdp2": 0}
    gradients = 4 * made.parameters["trained"]
    assert made.communication(4)["ddp"] == round(2 * 3 / 4 * gradients)
    assert made.communication(4)["fsdp2"] == round(3 / 4 * (made.exchanged["gathered"] + gradients))
    with pytest.raises(ValueError, match="processes must be an integer of at least 1, got 0"):
        made.communication(0)
    with pytest.raises(ValueError, match="no training step"):
        plan(make("qst").eval(), batch=1, sequence=8, device="cpu", inference=True, search=False).communication(2)
