"""What is wrong is said in one line that names the option, before anything is loaded."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest
import yaml
from peft import PeftConfig
from transformers import TrainingArguments

from hf_qst import DISPConfig, MixedRankConfig, QSTConfig
from hf_qst_plugins.command_line.__main__ import COMMANDS
from hf_qst_plugins.command_line.arguments import Arguments

from .conftest import ROOT

# jsonargparse takes these although they are no options by themselves.
NESTED = {"allocation.min_saving", "allocation.allocator"}


def arguments_of(name):
    arguments = Arguments(name, "")
    arguments.flag("dry_run", "")
    import_module(f"hf_qst_plugins.command_line.{name.replace('-', '_')}").add_arguments(arguments)
    return arguments


def test_help_lists_the_commands_and_loads_nothing():
    code = "import sys; from hf_qst_plugins.command_line.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("False\n") and all(name in run.stdout for name in COMMANDS)


def test_without_a_command_it_is_wrong_usage(hf_qst_command):
    code, out, err = hf_qst_command()
    assert code == 2 and out == "" and err.startswith("usage: hf-qst COMMAND")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fintune"], "hf-qst: there is no command 'fintune'; did you mean finetune?"),
        (["finetune", "--data", "x"], "hf-qst finetune: --model: it must be given"),
        (["finetune", "--modle", "x"], "hf-qst finetune: --modle: there is no such option; did you mean --model?"),
        (
            ["finetune", "{model}", "--learning_rate", "much"],
            "--learning_rate: Expected a <class 'float'>. Got value: much",
        ),
        (["finetune", "{model}", "--downsample", "x"], "--downsample: QSTConfig.downsample must be one of linear,"),
        (["finetune", "{model}", "--eval_strategy", "x"], "--eval_strategy: x is not a valid IntervalStrategy"),
        (["finetune", "{model}", "--quantization", "nf3"], "--quantization: quantization must be one of nf4, int8"),
        (["finetune", "{model}", "--resume"], "--resume: there is no whole checkpoint in"),
        (
            ["finetune", "{model}", "--resume", "--overwrite"],
            "--resume: it goes on with what --overwrite would discard",
        ),
        (["finetune", "{model}", "--r", "7", "--quantization", "null"], "--r: QSTConfig.r must divide"),
        (
            ["finetune", "{model}", "--evaluation_data", "none.txt"],
            "--evaluation_data: there is no file or folder 'none.txt'",
        ),
        (
            ["finetune", "{model}", "--max_length", "100000"],
            "--data: the text is shorter than one row of --max_length 100000",
        ),
        (["prune", "{model}", "--keep_ratio", "2"], "--keep_ratio: DISPConfig.keep_ratio must be"),
        (["prune", "{model}", "--method", "x"], "--method: it must be one of disp, random, magnitude"),
        (["prune", "{model}", "--method", "flap", "--learning_rate", "1"], "--learning_rate: it is for --method disp"),
        (
            ["prune", "{model}", "--method", "flap", "--regularization", "1"],
            "--regularization: it is for --method disp",
        ),
        (["prune", "{model}", "--allocation", "global"], "--allocation: it is of the methods that score"),
        (
            ["compress", "{model}", "--allocation", "x"],
            "--allocation.allocator: MixedRankConfig.allocation.allocator must",
        ),
        (["compress", "{model}", "--allocation.x", "1"], "--allocation: MixedRankConfig.allocation has no field 'x'"),
        (
            ["compress", "{model}", "--keep_ratio", "1e-5"],
            "--keep_ratio: MixedRankConfig.keep_ratio=1e-05 of the targets's",
        ),
        (
            ["compress", "{model}", "--from_disk", "--quantization", "nf4"],
            "--quantization: leave it out with --from_disk",
        ),
        (["compress", "{model}", "--from_disk", "--prompts", "x"], "--prompts: leave it out with --from_disk"),
        (
            ["compress", "{model}", "--from_disk", "--compensation", "kd"],
            "--compensation: compress_folder does not take MixedRankConfig.compensation='kd'",
        ),
        (["evaluate", "--model", "{folder}"], "--data: it must be given, or --tasks"),
        (["evaluate", "--model", "/none", "--data", "x"], "--model: there is no file or folder '/none'"),
        (["evaluate", "{only}", "--adapter", "{folder}"], "--adapter: Can't find 'adapter_config.json'"),
        (["evaluate-code", "--model", "{folder}"], "--allow_execution: it must be given"),
        (["generate", "--model", "{folder}"], "--prompts: it must be given, or --prompts_file"),
        (["generate", "--model", "{folder}", "--prompts", "x", "--chat"], "--chat: the tokenizer of"),
        (
            ["generate", "--model", "{folder}", "--prompts", "x", "--adaptive_temperature"],
            "--adaptive_temperature: no newline",
        ),
        (
            ["generate", "--model", "{folder}", "--prompts", "x", "--adaptive.preset", "pass1"],
            "--adaptive.preset: it needs",
        ),
        (
            ["generate", "--model", "{folder}", "--prompts", "x", "--top_p", "-1"],
            "--top_p: it must be at least 0, got -1",
        ),
        (["bench", "--model", "{folder}", "--repeats", "0"], "--repeats: it must be at least 1, got 0"),
        (["models", "--model_type", "x"], "--model_type: the type 'x' is not known"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(hf_qst_command, inputs, on_model, tmp_path, argv, message):
    expanded = []
    for part in argv:
        if part == "{model}":
            expanded += [*on_model, "--output_dir", str(tmp_path / "out")]
        elif part == "{only}":
            expanded += on_model
        else:
            expanded.append(part.replace("{folder}", str(inputs / "model")))
    code, _, err = hf_qst_command(*expanded)
    assert code == 2
    # Bars of progress end without a line break.
    line = err.rstrip("\n").split("\n")[-1].split("\r")[-1]
    assert message in line and line.startswith("hf-qst")
    assert not (tmp_path / "out").exists()


def test_misspelt_option_of_a_file_is_named(hf_qst_command, tmp_path):
    (tmp_path / "run.yaml").write_text("model: x\nlerning_rate: 1\n")
    code, _, err = hf_qst_command("finetune", "--config", tmp_path / "run.yaml")
    assert code == 2 and "--lerning_rate: there is no such option; did you mean --learning_rate?" in err


def test_failure_that_is_no_usage_error_is_one_line_and_verbose_shows_the_trace(
    hf_qst_command, inputs, on_model, tmp_path
):
    broken = tmp_path / "model"
    broken.mkdir()
    for path in (inputs / "model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights")
    argv = ["evaluate", "--model", broken, "--data", inputs / "text.jsonl", "--max_length", "16"]
    code, _, err = hf_qst_command(*argv)
    assert code == 1 and "Traceback" not in err and err.startswith("hf-qst evaluate: ")
    code, _, err = hf_qst_command(*argv, "--verbose")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize(
    ("name", "kinds", "left_out"),
    [
        ("finetune", [QSTConfig, TrainingArguments], {"resume_from_checkpoint", "do_train", "do_eval", "do_predict"}),
        ("prune", [DISPConfig, TrainingArguments], {"resume_from_checkpoint", "do_train", "do_eval", "do_predict"}),
        ("compress", [MixedRankConfig], {"residual", "keep_base_weights", "modules_to_save"}),
    ],
)
def test_every_field_of_the_classes_is_an_option(name, kinds, left_out):
    left_out = {*left_out, *(f.name for f in fields(PeftConfig)), "manifest", "calibration_data", "init_weights"}
    options = set(arguments_of(name).option_names())
    for kind in kinds:
        assert {f.name for f in fields(kind) if f.init} - left_out <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as ended:
        arguments_of(name).parser.parse_args(["--help"])
    assert ended.value.code == 0
    assert "--config" in capsys.readouterr().out


def documented_commands():
    """(command, its options) wherever a page or a docstring names it."""
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", *(ROOT / "plugins").rglob("*.py")]
    pattern = re.compile(r"hf-qst ([a-z][a-z-]*)((?:\\\n|[^`\n])*)")
    for page in pages:
        for name, rest in pattern.findall(page.read_text()):
            if options := re.findall(r"--([a-z][a-z_.-]+)", rest):
                yield name, options


def test_documented_commands_have_their_options():
    found = list(documented_commands())
    assert {name for name, _ in found} >= set(COMMANDS) - {"models"}
    known = {name: {*arguments_of(name).option_names(), "dry_run"} for name in COMMANDS}
    for name, options in found:
        assert {option.replace("-", "_") for option in options} - known[name] <= NESTED, (name, options)


def test_configuration_file_is_what_print_config_writes(capsys, tmp_path):
    argv = ["--model", "m", "--data", "d", "--r", "8", "--learning-rate", "1e-3", "--output_dir", "o", "--use-cpu"]
    arguments = arguments_of("finetune")
    direct = arguments.parse(argv)
    with pytest.raises(SystemExit):
        arguments.parse([*argv, "--print-config"])
    written = capsys.readouterr().out
    assert yaml.safe_load(written)["r"] == 8
    (tmp_path / "run.yaml").write_text(written)
    read = arguments.parse(["--config", str(tmp_path / "run.yaml")])
    assert read.as_dict() == direct.as_dict()
    assert read.use_cpu is True and read.learning_rate == 1e-3
    changed = arguments.parse(["--config", str(tmp_path / "run.yaml"), "--r", "4"])
    assert {k for k, v in changed.as_dict().items() if v != read.as_dict()[k]} == {"r"}


def test_options_know_which_were_given():
    options = arguments_of("compress").parse(["--model", "m", "--data", "d", "--allocation.min_saving", "0.1"])
    assert options.given >= {"model", "data"} and "keep_ratio" not in options.given
    config = options.build(MixedRankConfig)
    assert config.allocation.min_saving == 0.1 and config.allocation.allocator == "hull"
    assert config == MixedRankConfig(allocation={"min_saving": 0.1})


@pytest.mark.parametrize("name", ["finetune", "prune", "compress"])
def test_dry_run_checks_all_and_writes_nothing(hf_qst_command, on_model, tmp_path, name):
    code, out, _ = hf_qst_command(name, *on_model, "--output_dir", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "LlamaForCausalLM, 123,328 parameters" in out and "rows" in out
    assert not (tmp_path / "out").exists()
    if name != "compress":
        assert "kept for the backward pass" in out and "seconds, an estimate" in out
