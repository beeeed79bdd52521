"""Bases that are divided when they are loaded (FSDP2 and tensor parallelism of transformers), and 4-bit bases under FSDP2."""

import pytest
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.distributed import DistributedConfig

from hf_qst.errors import MissingWeightsError, ReshapedModelError
from tests.architectures import NF4
from tests.conformance.methods import IDS, LINES, logits, small
from tests.distributed.processes import in_processes
from tests.distributed.training import FSDP2, ROWS, divided, let_a_cpu_shard, losses_of, make, trainer

UNSAVED = {"save_strategy": "no"}  # transformers cannot go on with these, and says so


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("divided")
    small().save_pretrained(place / "base")
    make("mixed_rank_in_place").merge_and_unload().save_pretrained(place / "compressed")
    for name in ("disp", "mixed_rank_in_place"):
        make(name).save_pretrained(place / name)
    return place


def loaded(place, name="base", **sizes):
    return AutoModelForCausalLM.from_pretrained(place / name, distributed_config=DistributedConfig(**sizes))


def refusal(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except (MissingWeightsError, ReshapedModelError) as error:
        return str(error)
    raise AssertionError("nothing was refused")


def side_tuned_on(base, directory, **settings) -> dict:
    model = make("qst", base)
    run = trainer("qst", model, directory, **{**UNSAVED, **settings})
    run.train()
    run.save_model(str(directory / "end"))
    return {"losses": losses_of(run), "divided": sum(isinstance(p, DTensor) for p in model.base_model.parameters())}


def under_fsdp(place) -> dict:
    found = side_tuned_on(loaded(place, fsdp_size=2), place / "fsdp")
    found["compressed"] = logits(loaded(place, "compressed", fsdp_size=2))
    found["disp"] = refusal(
        LINES["disp"].model, loaded(place, fsdp_size=2), calibration_data=[{"input_ids": IDS, "labels": IDS}]
    )
    found["mixed_rank"] = refusal(make, "mixed_rank", loaded(place, fsdp_size=2))
    return found


def under_tensor_parallelism(place) -> dict:
    let_a_cpu_shard()
    found = side_tuned_on(loaded(place, tp_plan="auto"), place / "tp", per_device_train_batch_size=ROWS)
    found["disp"] = refusal(LINES["disp"].model, loaded(place, tp_size=2))
    for name in ("disp", "mixed_rank_in_place"):
        found[f"saved {name}"] = refusal(PeftModel.from_pretrained, loaded(place, tp_size=2), place / name)
    found["mixed_rank"] = refusal(make, "mixed_rank", loaded(place, tp_size=2))
    found["compressed"] = refusal(lambda: loaded(place, "compressed", tp_size=2))
    return found


@pytest.fixture(scope="module")
def whole(folders):
    return side_tuned_on(AutoModelForCausalLM.from_pretrained(folders / "base"), folders / "one")


@pytest.mark.parametrize("way", [under_fsdp, under_tensor_parallelism])
def test_bases_that_transformers_divides(way, folders, whole):
    """QST trains on them as on a whole one; what cannot work is refused in every process."""
    for found in in_processes(2, way, folders / way.__name__, folders):
        assert found["divided"] > 10
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(whole["losses"]), atol=1e-5, rtol=0)
        if way is under_fsdp:
            expected = logits(AutoModelForCausalLM.from_pretrained(folders / "compressed"))
            torch.testing.assert_close(found.pop("compressed"), expected, atol=1e-5, rtol=1e-5)
        refused = {name: text for name, text in found.items() if name not in ("losses", "divided")}
        assert refused and all("tensor parallelism" in text for text in refused.values()), refused
    end = "fsdp" if way is under_fsdp else "tp"
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    ours, right = (logits(PeftModel.from_pretrained(base, folders / of / "end")) for of in (end, "one"))
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


def in_four_bits(place, method: str, kind: str, shard: bool) -> dict:
    if shard:
        let_a_cpu_shard()
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(place / "base", quantization_config=settings, device_map={"": "cpu"})
    count = sum(type(module).__name__ == "Linear4bit" for module in base.modules())
    run = trainer(method, make(method, base), place / kind / method, **{**UNSAVED, **(FSDP2 if shard else {})})
    run.train()
    return {"losses": losses_of(run), "divided": divided(run.model) if shard else [], "layers": count}


@pytest.mark.parametrize("method", ["qst", "disp"])
def test_four_bit_weights_stored_as_floating_point_are_divided(method, folders):
    """`bnb_4bit_quant_storage` of the dtype of the other parameters: what FSDP2 can divide."""
    one = in_four_bits(folders, method, "one", False)
    assert one["layers"] > 10
    for found in in_processes(2, in_four_bits, folders / f"4 bits {method}", folders, method, "two", True):
        assert all(found["divided"])
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(one["losses"]), atol=1e-5, rtol=0)
