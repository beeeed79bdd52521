"""Several side networks in one Trainer: each has the weights that training it alone gives, for one pass of the base."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer

from hf_qst import train_together
from tests.architectures import side_config, side_layers, side_network, tiny, token_batch
from tests.toy_data import text_dataset, token_dataset, tokenizer
from tests.trainers import plain_trainer

SETTINGS = {
    "default": {},
    "wide": {"r": 2, "downsample": "linear", "side_every": 2, "readout_rank": 0},
    "pools": {"downsample": "avgpool", "side_checkpointing": True, "side_heads": "keep"},
    "full": {"chunked_loss": False, "downsample": "lora", "mix": "paper"},
}
RATES = {"wide": 3e-3, "pools": 1e-2}
SHARED = {"learning_rate": 5e-3, "max_steps": 6, "weight_decay": 0.1, "max_grad_norm": 0.3}


def with_adapters(names, settings=SETTINGS, base=None, **shared):
    """A tiny base with these adapters; one of a name starts as it would without the others."""
    base = tiny("llama") if base is None else base
    model = None
    for name in names:
        torch.manual_seed(list(settings).index(name))
        config = side_config(**{**settings[name], **shared})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def weights(model, name):
    own = {key: value.clone() for key, value in side_network(model, name).state_dict().items()}
    score = getattr(model.base_model.model, "score", None)
    return own if score is None else {**own, "score": score.modules_to_save[name].weight.clone()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def alone(name, tmp_path, rate=None, settings=SETTINGS, data=None, model=None, **arguments):
    model = with_adapters([name], settings) if model is None else model
    rate = arguments.pop("learning_rate", SHARED["learning_rate"]) if rate is None else rate
    run = plain_trainer(model, tmp_path / f"alone_{name}", data, **{**SHARED, **arguments, "learning_rate": rate})
    run.train()
    return run


def losses(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_network_is_trained_as_if_alone(tmp_path, accumulation):
    arguments = {**SHARED, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    arguments |= {"lr_scheduler_type": "cosine", "eval_strategy": "steps", "eval_steps": 3}
    data = token_dataset(ragged=True)
    model = with_adapters(SETTINGS)
    run = plain_trainer(model, tmp_path / "together", data, **arguments)
    train_together(run, learning_rates=RATES)
    passes = []
    block = model.get_decoder().layers[0]
    block.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    run.train()
    evaluations = 2 * len(data) // 8
    assert len(passes) == SHARED["max_steps"] * accumulation + evaluations
    assert run.args.max_grad_norm == SHARED["max_grad_norm"]
    model.save_pretrained(tmp_path / "saved")
    for name in SETTINGS:
        single = alone(name, tmp_path, RATES.get(name), data=data, **arguments)
        assert_equal(weights(model, name), weights(single.model, name))
        torch.testing.assert_close(losses(run, f"{name}_loss"), losses(single, "loss"), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses(run, f"eval_{name}_loss"), losses(single, "eval_loss"), rtol=1e-5, atol=1e-5)
        folder = tmp_path / "saved" if name == "default" else tmp_path / "saved" / name
        single.model.save_pretrained(tmp_path / "single")
        own = tmp_path / "single" if name == "default" else tmp_path / "single" / name
        assert_equal(*(load_file(path / "adapter_model.safetensors") for path in (folder, own)))
        assert losses(single, "grad_norm")[0] > SHARED["max_grad_norm"]  # or clipping would go unnoticed
    together = sum(torch.tensor(losses(run, f"{name}_loss")) for name in SETTINGS)
    torch.testing.assert_close(together, torch.tensor(losses(run, "loss")), rtol=1e-4, atol=1e-4)


def test_classifiers_have_heads_of_their_own(tmp_path):
    data = token_dataset(16).map(lambda row, i: {"labels": i % 2}, with_indices=True)
    settings = {name: {**own, "task_type": "SEQ_CLS"} for name, own in SETTINGS.items()}

    def model(*names):
        return with_adapters(names, settings, tiny("llama", classifier=True))

    run = plain_trainer(model("wide", "default"), tmp_path / "together", data, **SHARED)
    train_together(run)
    run.train()
    for name in ("default", "wide"):
        single = alone(name, tmp_path, data=data, model=model(name))
        assert_equal(weights(run.model, name), weights(single.model, name))
    predictions = run.predict(data).predictions
    assert [p.shape for p in predictions] == [(16, 2), (16, 2)]
    run.model.set_adapter("default")
    assert all(".default" in path for path, p in run.model.named_parameters() if p.requires_grad)
    assert (run.predict(data).predictions == predictions[1]).all()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def run(folder, names=("default", "wide"), **arguments):
        trainer = plain_trainer(with_adapters(names), tmp_path / folder, **{**SHARED, **arguments})
        train_together(trainer, learning_rates={"wide": 3e-3})
        return trainer

    whole = run("whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = run("resumed", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name in ("default", "wide"):
        assert_equal(weights(resumed.model, name), weights(whole.model, name))
    torch.testing.assert_close(losses(resumed, "wide_loss"), losses(whole, "wide_loss"))


def test_some_adapters_are_left_as_they_were(tmp_path):
    model = with_adapters(SETTINGS)
    before = {name: weights(model, name) for name in SETTINGS}
    run = plain_trainer(model, tmp_path, **SHARED)
    train_together(run, ["pools", "wide"])
    run.train()
    for name in ("default", "full"):
        assert_equal(weights(model, name), before[name])
    for name in ("pools", "wide"):
        assert_equal(weights(model, name), weights(alone(name, tmp_path).model, name))
    assert not losses(run, "default_loss")


def test_adapters_of_transformers_train_together(tmp_path):
    base = tiny("llama")
    for name in ("default", "wide"):
        torch.manual_seed(list(SETTINGS).index(name))
        base.add_adapter(side_config(**SETTINGS[name]), adapter_name=name)
    run = plain_trainer(base, tmp_path / "native", **SHARED)
    train_together(run)
    run.train()
    for name in ("default", "wide"):
        assert_equal(weights_of_native(base, name), weights(alone(name, tmp_path).model, name))


def weights_of_native(base, name):
    return side_layers(base)[0].qst_net[name].state_dict()


def test_afterwards_one_is_chosen_and_a_sweep_can_be_averaged(tmp_path):
    model = with_adapters(["default", "wide"])
    run = plain_trainer(model, tmp_path, **SHARED)
    train_together(run)
    run.train()
    ids = token_batch()
    model.eval()
    for call in (lambda: model(input_ids=ids), lambda: model.generate(input_ids=ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"'default', 'wide' learn apart.*To run them, set_adapter"):
            call()
    with pytest.raises(ValueError, match="'default', 'wide' learn apart"):
        side_layers(model)[0](input_ids=ids)
    mixed = model(input_ids=ids, adapter_names=["wide", "default"]).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    model.set_adapter("wide")
    wide = model(input_ids=ids).logits
    torch.testing.assert_close(mixed[0], wide[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wide, base, atol=1e-3)
    model.base_model.set_adapter(["default", "wide"])
    assert model(input_ids=ids).logits.shape == wide.shape


def test_a_failed_step_leaves_nothing_behind(tmp_path):
    model = with_adapters(["default", "wide"])
    train_together(plain_trainer(model, tmp_path, **SHARED))
    ids = token_batch()
    expected = model.train()(input_ids=ids, labels=ids).loss
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 500), labels=torch.ones(1, 4, dtype=torch.long))
    copied = copy.deepcopy(model)
    for one in (model, copied):
        assert torch.equal(one(input_ids=ids, labels=ids).loss, expected)


REFUSED = {
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_trainers_that_cannot_treat_adapters_apart_are_refused(name, tmp_path):
    model = with_adapters(["default", "wide"])
    with pytest.raises(ValueError, match=f"does not support a Trainer with {name}"):
        train_together(plain_trainer(model, tmp_path, **{**SHARED, **REFUSED[name]}))


def test_bad_arguments_are_refused(tmp_path):
    model = with_adapters(["default", "wide"])
    run = plain_trainer(model, tmp_path, **SHARED)

    def refuse(match, *arguments):
        with pytest.raises(ValueError, match=match):
            train_together(run, *arguments)
        assert not side_layers(model)[0].in_turn.is_on

    refuse(r"must name QST adapters of the model, 'default', 'wide', got \['nobody'\]", ["nobody"])
    refuse("for adapters that are trained, got 'nobody': 1.0", None, {"nobody": 1.0})
    refuse("for adapters that are trained, got 'wide': 0.1", ["default"], {"wide": 0.1})
    refuse("must be numbers >= 0 .* got 'wide': -1", None, {"wide": -1})
    run.compute_loss_func = lambda *_, **__: None
    refuse("with compute_loss_func")
    run.compute_loss_func, run.optimizer = None, torch.optim.SGD(model.parameters(), lr=0.1)
    refuse("with optimizers: learning_rates are for", None, {"wide": 0.1})
    plain = Trainer(tiny("llama"), run.args)
    with pytest.raises(ValueError, match="QST adapters of the model, none, got"):
        train_together(plain)
    tailed = with_adapters(["default", "wide"], {**SETTINGS, "wide": {"tail_layers": 1}})
    for names in (None, ["wide"]):
        with pytest.raises(ValueError, match="'wide' has a tail"):
            train_together(plain_trainer(tailed, tmp_path, **SHARED), names)


def test_sft_trainer_trains_each_as_if_alone(tmp_path):
    trl = pytest.importorskip("trl")

    def run(*names):
        arguments = {"max_steps": 4, "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
        arguments |= {
            "learning_rate": 5e-3,
            "max_grad_norm": 0.3,
            "gradient_accumulation_steps": 2,
            "disable_tqdm": True,
        }
        model, settings = with_adapters(names), trl.SFTConfig(str(tmp_path), **arguments)
        return trl.SFTTrainer(model, args=settings, train_dataset=text_dataset(), processing_class=tokenizer())

    together = run("default", "wide")
    train_together(together)
    together.train()
    for name in ("default", "wide"):
        single = run(name)
        single.train()
        assert_equal(weights(together.model, name), weights(single.model, name))
        torch.testing.assert_close(losses(together, f"{name}_loss"), losses(single, "loss"), rtol=0.02, atol=0)


def test_an_output_without_a_loss_is_refused(tmp_path):
    model = with_adapters(["default", "wide"])
    train_together(plain_trainer(model, tmp_path, **SHARED))
    with pytest.raises(ValueError, match="but the model returned none"):
        model(input_ids=token_batch(), labels=token_batch(), return_dict=False)


def test_reloaded_adapters_train_on_together(tmp_path):
    model = with_adapters(["default", "wide"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    loaded.load_adapter(tmp_path / "wide", "wide")
    run = plain_trainer(loaded, tmp_path / "run", **SHARED)
    train_together(run)
    run.train()
    for name in ("default", "wide"):
        assert_equal(weights(loaded, name), weights(alone(name, tmp_path).model, name))


def test_several_networks_learn_from_stored_states(tmp_path):
    """From the second epoch on no block of the base runs; each network reads what it reads of its own stored states."""
    settings = {"default": {}, "wide": {"side_every": 2, "readout_every": 1}, "narrow": {"downsample": "avgpool"}}

    def model(names, folder):
        return with_adapters(names, settings, hidden_state_cache=None if folder is None else str(tmp_path / folder))

    together = model(settings, "states")
    run = plain_trainer(together, tmp_path / "run", **SHARED)
    train_together(run)
    ran = []
    layer = side_layers(together)[0]
    layer.make_blocks_replaceable()
    own = layer.blocks[0].forward.forward
    layer.blocks[0].forward.forward = lambda *args, **kwargs: ran.append(run.state.global_step) or own(*args, **kwargs)
    run.train()
    # 32 examples in batches of 8; in the fifth step each network compares one stored example with the base.
    assert set(ran) == {0, 1, 2, 3, 4} and ran.count(4) == len(settings)
    for name in settings:
        alone = plain_trainer(model([name], None), tmp_path / name, **SHARED)
        alone.train()
        for key, value in weights(alone.model, name).items():
            torch.testing.assert_close(weights(together, name)[key], value, atol=1e-4, rtol=1e-3, msg=key)
