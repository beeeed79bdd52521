"""Side tuning through the real `Trainer`: loss, checkpoints, resuming, gradient accumulation."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_qst import QSTConfig
from tests.architectures import digest, in_nf4, side_network, side_tuned, tiny, token_batch
from tests.toy_data import token_dataset
from tests.trainers import plain_trainer

WEIGHTS = "adapter_model.safetensors"


def trainer(model, directory, data=None, **settings):
    return plain_trainer(model, directory, data, **{"learning_rate": 5e-3, **settings})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: p.detach().clone() for name, p in side_network(model).state_dict().items()}


def assert_close_weights(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma2"])
def test_loss_falls_and_the_base_stays(name, tmp_path):
    model = side_tuned(name)
    before = digest(model.get_base_model())
    run = trainer(model, tmp_path, max_steps=30)
    run.train()
    assert sum(losses(run)[-5:]) < 0.9 * sum(losses(run)[:5])
    assert digest(model.get_base_model()) == before


def test_nf4_base_trains_and_stays(tmp_path):
    base = in_nf4(tmp_path / "base")
    with torch.no_grad():
        base(token_batch())  # packs the weights for the processor
    before = digest(base)
    model = side_tuned(model=base)
    run = trainer(model, tmp_path / "out", max_steps=30, save_strategy="steps", save_steps=10)
    run.train()
    assert sum(losses(run)[-5:]) < 0.9 * sum(losses(run)[:5])
    assert digest(model.get_base_model()) == before


def test_checkpoint_holds_the_adapter_only(tmp_path):
    run = trainer(side_tuned("llama"), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-2"
    assert all("qst_net" in name for name in load_file(folder / WEIGHTS))
    assert not (folder / "model.safetensors").exists()
    assert "import hf_qst" in (folder / "README.md").read_text()


@pytest.mark.parametrize("base", ["float32", "nf4"])
@pytest.mark.parametrize("checkpointing", [True, "mlp", False])
def test_resumed_training_gives_the_weights_of_an_uninterrupted_run(tmp_path, base, checkpointing):
    if base == "nf4":
        in_nf4(tmp_path / "base")

    def fresh():
        torch.manual_seed(11)
        model = in_nf4(tmp_path / "base") if base == "nf4" else tiny("llama")
        torch.manual_seed(12)
        return side_tuned(model=model, downsample_dropout=0.1, side_checkpointing=checkpointing)

    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}
    straight = fresh()
    trainer(straight, tmp_path / "straight", **settings).train()
    resumed = fresh()
    run = trainer(resumed, tmp_path / "resumed", **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert run.state.global_step == 8
    assert_close_weights(weights(resumed), weights(straight), rtol=0, atol=0)


def test_best_checkpoint_is_loaded_at_the_end(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    model = side_tuned("llama")
    # A learning rate at which the loss rises again, so that the best checkpoint is not the last.
    run = trainer(model, tmp_path, **settings, load_best_model_at_end=True, learning_rate=0.3)
    run.train()
    best = PeftModel.from_pretrained(tiny("llama"), run.state.best_model_checkpoint)
    assert_close_weights(weights(model), weights(best), rtol=0, atol=0)


def accumulated(directory, batch, steps, **settings):
    torch.manual_seed(5)
    model = side_tuned("llama", **settings)
    data = token_dataset(ragged=True)
    run = trainer(
        model,
        directory,
        data,
        max_steps=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        # Plain SGD: Adam would magnify rounding where a gradient is nearly zero.
        optim="sgd",
        learning_rate=0.05,
    )
    run.train()
    return losses(run), weights(model)


@pytest.mark.parametrize("chunked", [True, False])
def test_gradient_accumulation_equals_one_batch(tmp_path, chunked):
    whole, whole_weights = accumulated(tmp_path, 8, 1, chunked_loss=chunked)
    parts, part_weights = accumulated(tmp_path, 2, 4, chunked_loss=chunked)
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), atol=1e-5, rtol=1e-5)
    assert_close_weights(part_weights, whole_weights, rtol=1e-5, atol=1e-5)


def test_chunked_and_plain_loss_train_alike(tmp_path):
    chunked, chunked_weights = accumulated(tmp_path, 2, 4, chunked_loss=True)
    plain, plain_weights = accumulated(tmp_path, 2, 4, chunked_loss=False)
    torch.testing.assert_close(torch.tensor(chunked), torch.tensor(plain), atol=1e-5, rtol=1e-5)
    assert_close_weights(chunked_weights, plain_weights, rtol=1e-5, atol=1e-5)


def test_label_smoothing_equals_torchs(tmp_path):
    model = side_tuned("llama", awake=True)
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    ids = token_batch(4, 10)
    labels = ids.clone()
    labels[0, :5] = -100
    model.train()
    got = run.compute_loss(model, {"input_ids": ids, "labels": labels})
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.backward()
    assert side_network(model).upsample.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_trainer_changes_nothing(tmp_path, reentrant):
    results = []
    for on in (False, True):
        torch.manual_seed(5)
        model = side_tuned("llama")
        settings = {"gradient_checkpointing": on}
        if on:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        trainer(model, tmp_path, max_steps=3, **settings).train()
        results.append(weights(model))
    assert_close_weights(*results, rtol=0, atol=0)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_native_adapter_trains(tmp_path, base):
    model = in_nf4(tmp_path / "base") if base == "nf4" else tiny("llama")
    model.add_adapter(QSTConfig(r=4))
    run = trainer(model, tmp_path / "out", max_steps=30, save_strategy="steps", save_steps=30)
    run.train()
    assert sum(losses(run)[-5:]) < 0.9 * sum(losses(run)[:5])
    assert all("qst_net" in name for name in load_file(tmp_path / "out" / "checkpoint-30" / WEIGHTS))


def test_evaluation_equals_the_plain_loss(tmp_path):
    model = side_tuned("llama", awake=True)
    data = token_dataset(16)
    metrics = trainer(model, tmp_path, data).evaluate()
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_classifier_trains(tmp_path):
    model = side_tuned(task_type="SEQ_CLS", model=tiny("llama", classifier=True, num_labels=2))
    rows = token_batch(32, 8)
    data = [{"input_ids": row.tolist(), "labels": int(row[-1]) % 2} for row in rows]
    run = trainer(model, tmp_path, data, max_steps=40)
    run.train()
    assert sum(losses(run)[-5:]) < 0.8 * sum(losses(run)[:5])


def test_frozen_adapter_cannot_be_trained(tmp_path):
    side_tuned("llama").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    run = trainer(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"zero trainable parameters.*is_trainable=True"):
        run.train()


def test_frozen_classifier_adapter_cannot_be_trained(tmp_path):
    model = side_tuned(task_type="SEQ_CLS", model=tiny("llama", classifier=True, num_labels=2)).train()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="zero trainable parameters"):
        model(input_ids=token_batch(), labels=torch.tensor([0, 1]))


def test_labels_of_another_length_stop_before_the_base_runs():
    model = side_tuned("llama").train()
    calls = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match=r"\[2, 12\].*\[2, 11\]"):
        model(input_ids=token_batch(2, 12), labels=token_batch(2, 11))
    assert not calls
