"""DISP's callback: exports, plots, schedules, what it says, and what it refuses."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_qst import DISPCallback, DISPConfig
from hf_qst.disp import layer as disp_layer_module
from tests.architectures import tiny, token_batch
from tests.pruned_models import network, with_disp
from tests.trainers import assert_states_close, disp_state, disp_trainer

IDS = token_batch(4, 12)


def test_export_directory_holds_the_smaller_model_and_the_trained_one_stays(tmp_path):
    model = with_disp()
    (tmp_path / "small" / ".tmp_999999999_model").mkdir(parents=True)  # what an export that was killed has left
    run = disp_trainer(model, tmp_path / "out", DISPCallback(export_directory=tmp_path / "small", progress=False))
    run.train()
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        torch.testing.assert_close(small(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        merged = model.merge_and_unload()
        assert torch.equal(merged(IDS).logits, small(IDS).logits)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in tiny("llama").parameters())


def test_export_directory_with_something_in_it_is_refused_before_training(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("keep")
    run = disp_trainer(with_disp(), tmp_path / "out", DISPCallback(export_directory=tmp_path / "small"))
    with pytest.raises(ValueError, match="export_directory must be a folder that is not there or empty"):
        run.train()
    assert run.state.global_step == 0


def test_an_export_that_must_fail_is_refused_before_training(tmp_path):
    native = tiny("llama")
    native.add_adapter(DISPConfig(task_type="CAUSAL_LM"))
    run = disp_trainer(native, tmp_path / "out", DISPCallback(export_directory=tmp_path / "small", progress=False))
    with pytest.raises(ValueError, match=r"export_directory=.* needs a model made by get_peft_model.*LlamaForCausalLM"):
        run.train()
    assert run.state.global_step == 0
    (tmp_path / "file").write_text("in the way")
    run = disp_trainer(with_disp(), tmp_path / "out", DISPCallback(export_directory=tmp_path / "file" / "small"))
    with pytest.raises(ValueError, match=r"nothing can be written to '.*file'"):
        run.train()
    assert run.state.global_step == 0


def test_a_native_adapter_trains_and_hardens_without_an_export(tmp_path):
    native = tiny("llama")
    native.add_adapter(DISPConfig(task_type="CAUSAL_LM"))
    callback = DISPCallback(progress=False)
    disp_trainer(native, tmp_path, callback, max_steps=2).train()
    assert callback.report.ratio <= 0.5


def test_plots_without_matplotlib_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_qst.extras.find_spec", lambda name: None)
    run = disp_trainer(with_disp(), tmp_path, DISPCallback(plot_directory=tmp_path / "plots", progress=False))
    with pytest.raises(ImportError, match=r"plot_directory needs matplotlib: pip install"):
        run.train()
    assert run.state.global_step == 0


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_qst.saved.whole_files.os.replace", full)
    model = with_disp()
    run = disp_trainer(
        model, tmp_path / "out", DISPCallback(export_directory=tmp_path / "small", progress=False), max_steps=2
    )
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert not (tmp_path / "small").exists()
    assert network(model).is_hardened  # what was learned is still there


def test_plots_are_drawn(tmp_path):
    run = disp_trainer(
        with_disp(), tmp_path, DISPCallback(plot_directory=tmp_path / "plots", plot_steps=2), max_steps=3
    )
    run.train()
    assert (tmp_path / "plots" / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_progress_ends_with_what_was_done(tmp_path, capsys):
    run = disp_trainer(with_disp(), tmp_path, DISPCallback(), max_steps=2)
    run.train()
    output = capsys.readouterr()
    assert "kept 55," in output.out and "of 110,976 weights" in output.out
    assert "kept=" in output.err and "budget=0.500" in output.err


def test_unsettled_choice_is_told(tmp_path, caplog):
    run = disp_trainer(with_disp(start_scores="none"), tmp_path, max_steps=2)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert "hardening moved that by -4" in caplog.text or "hardening moved that by -5" in caplog.text


def test_schedule_sets_what_it_names(tmp_path):
    seen = []

    def schedule(done):
        seen.append(done)
        return {"keep_ratio": 1.0 - 0.5 * done, "regularization": 2.0}

    model = with_disp()
    disp_trainer(model, tmp_path, DISPCallback(schedule=schedule, progress=False), max_steps=4).train()
    assert seen == [0.0, 0.25, 0.5, 0.75]
    assert network(model).keep_share == 1.0 - 0.5 * 0.75 and network(model).regularization == 2.0
    run = disp_trainer(with_disp(), tmp_path, DISPCallback(schedule=lambda done: {"ratio": 1.0}))
    with pytest.raises(ValueError, match="schedule may set keep_ratio, regularization, temperature, got 'ratio'"):
        run.train()


def test_freezing_ends_training_early_on_the_budget(tmp_path):
    callback = DISPCallback(freeze_at=0.5, progress=False)
    run = disp_trainer(with_disp(), tmp_path, callback, max_steps=8)
    run.train()
    assert run.state.global_step == 4 and callback.report.ratio <= 0.5


def test_non_finite_gradients_stop_training_with_the_last_good_parameters(tmp_path, caplog):
    model = with_disp()
    saved = {}

    class Poison(DISPCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == 3:
                saved.update(disp_state(model))
                self.handle = model.get_submodule("base_model.model.lm_head").register_forward_hook(
                    lambda module, inputs, output: output * torch.nan
                )

    callback = Poison(progress=False, export_directory=tmp_path / "small")
    run = disp_trainer(model, tmp_path / "out", callback, max_steps=8)
    run.train()
    assert run.state.global_step == 4
    assert_states_close(disp_state(model), saved, rtol=0, atol=0)
    assert "not finite" in caplog.text
    assert not (tmp_path / "small").exists() and not network(model).is_hardened


def test_without_the_callback_it_trains_warns_and_hardens_on_request(tmp_path, caplog):
    disp_layer_module._warn_of_missing_callback.cache_clear()
    model = with_disp()
    run = disp_trainer(model, tmp_path, False, max_steps=4)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert caplog.text.count("without its DISPCallback") == 1
    report = model.base_model.harden()
    assert report.ratio <= 0.5 and network(model).is_hardened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plot_steps": 0}, "plot_steps must be an integer of at least 1, got 0"),
        ({"freeze_at": 0.0}, r"freeze_at must be in \(0, 1\], got 0.0"),
        ({"schedule": 3}, "schedule must be a function"),
    ],
)
def test_callback_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DISPCallback(**arguments)


def test_callback_refuses_what_it_cannot_train(tmp_path):
    with pytest.raises(ValueError, match=r"needs a model made by get_peft_model\(model, DISPConfig"):
        disp_trainer(tiny("llama"), tmp_path).train()
    model = with_disp()
    model.get_submodule("base_model.model.lm_head").weight.requires_grad_(True)
    with pytest.raises(ValueError, match="is trainable"):
        disp_trainer(model, tmp_path).train()
    hardened = with_disp()
    hardened.base_model.harden()
    with pytest.raises(ValueError, match="hardened"):
        disp_trainer(hardened, tmp_path).train()
    merged = with_disp()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        disp_trainer(merged, tmp_path).train()
    callback = DISPCallback()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    arguments.fp16 = True  # TrainingArguments itself refuses it without a GPU
    with pytest.raises(ValueError, match="fp16=True"):
        callback.on_train_begin(arguments, None, None, model=with_disp())
