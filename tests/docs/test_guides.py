"""The code of the guides and of the README runs, on tiny models in folders that have the names the pages use."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from examples import train_base

ROOT = Path(__file__).parents[2]
TOKENIZER = Path(train_base.__file__).parent / "base_model"
GUIDES = [ROOT / "docs" / "start.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = re.compile(r"^name = \"([\w./-]+)\"", re.MULTILINE)
# What only takes time.
SHORTER = [
    (r"max_steps=\d+", "max_steps=2"),
    (r"(eval|save|logging)_steps=\d+", r"\1_steps=2"),
    (r"max_new_tokens(=|\": )\d+", r"max_new_tokens\1 4"),
    (r"samples, k = \d+, \d+", "samples, k = 2, 2"),
    (r"read_problems\(\)\[:\d+\]", "read_problems()[:2]"),
]


def code(page):
    """(language, file name or "", source at its own line numbers) of the page's blocks, shortened."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        language, title, source = found.groups(default="")
        for pattern, shorter in SHORTER:
            source = re.sub(pattern, shorter, source)
        yield language, title, "\n" * text[: found.start(3)].count("\n") + source


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tiny_folder, tmp_path, monkeypatch):
    """The reader's folder, with the files that the guides take as given."""
    monkeypatch.chdir(tmp_path)
    text = Path(textwrap.__file__).read_text()
    for part in ("train", "test"):
        (tmp_path / f"{part}.txt").write_text(text)
        (tmp_path / f"{part}.jsonl").write_text('{"text": "def f(x): return x"}\n' * 16)
    for name in {name for page in GUIDES for name in MODEL.findall(page.read_text())}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tiny_folder)
    return tmp_path


def blocks_to_run(page):
    """Python that is not the content of a file."""
    return [source for language, title, source in code(page) if language == "python" and not title]


@pytest.mark.parametrize("page", filter(blocks_to_run, GUIDES), ids=lambda page: page.stem)
def test_code_of_a_guide_runs(page, place):
    names = {"__name__": page.stem}
    for source in blocks_to_run(page):
        exec(compile(source, page, "exec"), names)


@pytest.mark.slow
def test_the_script_for_several_gpus_runs_in_two_processes(place):
    page = ROOT / "docs" / "guides" / "several_gpus.md"
    (script,) = (source for _, title, source in code(page) if title == "train.py")
    (command,) = (source.split() for language, _, source in code(page) if language == "bash")
    (place / "train.py").write_text(script)
    assert command[:2] + command[3:] == ["torchrun", "--nproc-per-node", "train.py"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    ended = subprocess.run(run, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (place / "several_gpus" / "adapter" / "adapter_config.json").exists()


def readme_parts():
    (block,) = (source for language, _, source in code(ROOT / "README.md") if language == "python")
    imports, *parts = block.strip().split("\n\n")
    return [pytest.param(imports, part, id=part.split(" ")[0] + str(i)) for i, part in enumerate(parts)]


@pytest.mark.parametrize(("imports", "part"), readme_parts())
def test_code_of_the_readme_runs(imports, part, tiny_folder, place):
    """Each paragraph by itself, after the imports; its dots stand for arguments that a reader has."""
    part = part.replace("load_in_4bit=True, ...", "load_in_4bit=True")
    part = part.replace(", ...)", ", arguments, train_dataset=rows)")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    inputs = tokenizer("def f(x):", return_tensors="pt")
    row = inputs["input_ids"][0]
    names = {
        **{name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "BitsAndBytesConfig", "Trainer")},
        **{name: getattr(peft, name) for name in ("PeftModel", "get_peft_model")},
        "arguments": TrainingArguments("output", max_steps=2, report_to="none", max_grad_norm=0.0),
        "batches": [dict(inputs)],
        "folder": "saved",
        "inputs": inputs,
        "model": AutoModelForCausalLM.from_pretrained(tiny_folder),
        "name": tiny_folder,
        "rows": [{"input_ids": row, "labels": row}] * 4,
        "tokenizer": tokenizer,
    }
    exec(imports, names)
    exec(part, names)
    if "save_pretrained" in part:
        assert (place / "saved" / "README.md").exists()
