"""Plans against measurement: bytes kept for the backward pass, counted by autograd's hooks on a real step."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_qst import DISPConfig, plan
from hf_qst.base_model.decoder_stack import ARCHITECTURES
from hf_qst.errors import BudgetError, PlanError, UnsupportedArchitectureError
from hf_qst.planning import SavedForBackward
from tests.architectures import side_config
from tests.tiny_decoders import tiny_config, tiny_decoder

ROWS, TOKENS = 2, 40
FAST = ["llama", "qwen3_moe", "gemma3_text", "gpt2"]
# Blocks that ask for values: how many tokens go to an expert, to which language a row belongs.
READS_VALUES = {"dbrx", "jetmoe", "longcat_flash", "qwen4_exp_text", "xmod"}
# A grouped projection is a linear layer by its class and no plain product, so PEFT's LoRA fails on it.
WITHOUT_LORA = {"deepseek_v4"}
# Inside models of text and images.
INSIDE = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}
EACH = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.all_types)
    for name in sorted({*ARCHITECTURES} - INSIDE)
]
METHODS = {
    "qst": side_config,
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "lora, checkpointed": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "disp": lambda: DISPConfig(task_type="CAUSAL_LM", keep_ratio=0.9, start_scores="none"),
    "full": lambda: "full",
}


def measured(model) -> tuple[int, int]:
    """Bytes kept at the end of the forward pass, and at most."""
    ids = torch.randint(3, 90, (ROWS, TOKENS))
    with SavedForBackward(model.train()) as saved:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = saved.live
        loss.backward()
    return kept, saved.peak


def real(name: str, method, checkpointing: bool):
    model = tiny_decoder(name)
    if method == "full":
        return model.requires_grad_(True)
    model = get_peft_model(model, method)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", EACH)
def test_kept_bytes_are_those_of_a_real_step(name, kind):
    method, checkpointing = METHODS[kind](), kind.endswith("checkpointed")
    if name in WITHOUT_LORA and kind.startswith("lora"):
        with pytest.raises(RuntimeError, match="must match the size"):
            measured(real(name, method, checkpointing))
        return
    try:
        model = real(name, copy.copy(method), checkpointing)
        expected = measured(model)
    except (AttributeError, BudgetError, UnsupportedArchitectureError, ValueError) as error:
        if name in FAST:
            raise
        pytest.skip(f"{kind} does not run on {name}: {error}")
    planned = lambda: plan(
        tiny_config(name), method, ROWS, TOKENS, "cpu", gradient_checkpointing=checkpointing, search=False
    )
    if name in READS_VALUES:
        with pytest.raises(PlanError, match="does not run without values"):
            planned()
        return
    found = planned()
    assert found.kept == pytest.approx(expected[0], rel=0.1)
    assert found.kept_peak == pytest.approx(expected[1], rel=0.1)
    assert found.parameters["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
