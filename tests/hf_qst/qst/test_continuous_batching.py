"""Continuous batching, which would run in a thread and return nothing, is refused by name before it starts."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.architectures import side_layers, side_tuned, tiny, token_batch
from tests.toy_data import tokenizer

IDS = token_batch(3, 8)
GREEDY = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
# Without a number of blocks its cache takes most of the machine's memory.
SMALL = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=32)


def batched(model):
    outputs = model.generate_batch(
        IDS.tolist(), generation_config=GREEDY, continuous_batching_config=copy.deepcopy(SMALL), progress_bar=False
    )
    return [output.generated_tokens for output in outputs.values()]


def one_by_one(model):
    return model.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, 8:].tolist()


WAYS = {
    "generate_batch": batched,
    "generate": lambda model: model.generate(input_ids=IDS, cache_implementation="paged", max_new_tokens=4),
    "context": lambda model: model.continuous_batching_context_manager(generation_config=GREEDY).__enter__(),
    "manager": lambda model: model.init_continuous_batching(generation_config=GREEDY),
    "by_hand": lambda model: model(input_ids=IDS, cache=object()),
}


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_refused(way, copied):
    model = copied(side_tuned("llama", awake=True).eval())
    calls = []
    side_layers(model)[0].base_layer.embed_tokens.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(NotImplementedError, match="QST does not support continuous batching"):
        WAYS[way](model)
    assert not calls


def test_the_base_alone_may():
    base = tiny("llama")
    expected = one_by_one(base)
    model = side_tuned(model=base, awake=True).eval()
    with model.disable_adapter():
        assert batched(model) == expected
    assert batched(model.unload()) == expected
    assert "init_continuous_batching" not in vars(base)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generate_is_as_ever(implementation):
    model = side_tuned("llama", awake=True).eval()
    model.get_base_model().set_attn_implementation(implementation)
    plain = model.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert one_by_one(model) == plain[:, 8:].tolist()


def test_grpo_is_told_at_its_first_step(tmp_path):
    trl = pytest.importorskip("trl")
    arguments = trl.GRPOConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        use_transformers_continuous_batching=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        side_tuned("llama"),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["t5 t6"] * 4}),
        processing_class=tokenizer(),
    )
    with pytest.raises(NotImplementedError, match="QST does not support continuous batching"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert torch.is_grad_enabled()
