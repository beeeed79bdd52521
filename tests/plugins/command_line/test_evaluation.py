"""Tasks of lm-evaluation-harness from a local file, on adapters and smaller models."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qst_plugins.lm_evaluation import HFQSTModel

from .conftest import record_of

TASK = """task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(12):
        words = [f"t{t}" for t in torch.randint(3, 96, (7,), generator=draw).tolist()]
        rows.append({"question": " ".join(words[:4]), "choices": words[4:], "answer": i % 3})
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "next_word.yaml").write_text(TASK.format(questions=folder / "questions.jsonl"))
    return folder, rows


@torch.no_grad()
def accuracy(model, tokenizer, rows):
    """Of the likeliest next word, from the model's logits."""
    right = 0
    for row in rows:
        logits = model(**tokenizer(row["question"], return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        words = tokenizer.convert_tokens_to_ids(row["choices"])
        right += int(logits[words].argmax()) == row["answer"]
    return right / len(rows)


@pytest.fixture
def folders(hf_qst_command, on_model, tmp_path):
    """An adapter and a smaller model."""
    training = ["--quantization", "null", "--max_steps", "3", "--learning_rate", "0.1", "--use_cpu"]
    for argv in (["finetune", *training], ["compress", "--keep_ratio", "0.3"]):
        code, _, err = hf_qst_command(argv[0], *on_model, *argv[1:], "--output_dir", tmp_path / argv[0])
        assert code == 0, err
    return {"adapter": tmp_path / "finetune", "small": tmp_path / "compress"}


def test_tasks_of_a_local_file(hf_qst_command, inputs, task_folder, folders, tmp_path):
    folder, rows = task_folder
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    base = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    small = AutoModelForCausalLM.from_pretrained(folders["small"]).eval()
    expected = {"base": accuracy(base, tokenizer, rows), "small": accuracy(small, tokenizer, rows)}
    expected["adapter"] = accuracy(PeftModel.from_pretrained(base, folders["adapter"]).eval(), tokenizer, rows)
    named = {
        "base": ["--model", inputs / "model"],
        "small": ["--model", folders["small"]],
        "adapter": ["--model", inputs / "model", "--adapter", folders["adapter"]],
    }
    for name, argv in named.items():
        argv = [*argv, "--tasks", "[next_word]", "--task_folder", folder, "--output_dir", tmp_path / name]
        code, out, err = hf_qst_command("evaluate", *argv)
        assert code == 0, err
        assert record_of(tmp_path / name)["tasks"]["next_word"]["acc"] == pytest.approx(expected[name])
        assert f"acc {expected[name]:.4f}" in out
    assert len(set(expected.values())) > 1


@pytest.mark.slow
def test_unknown_task_is_named(hf_qst_command, inputs, task_folder):
    argv = ["--model", inputs / "model", "--tasks", "[other_task]", "--task_folder", task_folder[0]]
    code, _, err = hf_qst_command("evaluate", *argv)
    assert code == 2 and "--tasks: there is no task 'other_task'" in err


def test_model_is_registered_by_name(inputs, task_folder, folders):
    folder, rows = task_folder
    arguments = {"pretrained": str(inputs / "model"), "peft": str(folders["adapter"]), "device": "cpu"}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        "hf_qst", model_args=arguments, tasks=["next_word"], task_manager=manager, bootstrap_iters=0
    )
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs / "model"), folders["adapter"]).eval()
    assert found["results"]["next_word"]["acc,none"] == pytest.approx(accuracy(model, tokenizer, rows))


def test_loaded_model_needs_its_tokenizer(inputs):
    with pytest.raises(ValueError, match="tokenizer must be given"):
        HFQSTModel(AutoModelForCausalLM.from_pretrained(inputs / "model"))
