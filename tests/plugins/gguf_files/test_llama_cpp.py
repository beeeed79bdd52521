"""llama.cpp computes the logits and the tokens of the model that was written. `make test-llama-cpp` installs it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_qst_plugins.gguf_files import ARCHITECTURES, FILE_TYPES, write_gguf
from tests.plugins.code_tokenizers import tokenizer
from tests.plugins.gguf_files.models import ROTATIONS, TEXTS, dense, pruned, tokenizer_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("cyllama") is None, reason="llama.cpp is not installed: make test-llama-cpp"),
]
REFERENCE = Path(__file__).parents[2] / "llama_cpp_reference.py"
IDS = torch.randint(3, 2048, (100,), generator=torch.Generator().manual_seed(3))


def by_llama_cpp(file):
    request, answer = file.with_suffix(".json"), file.with_suffix(".pt")
    request.write_text(json.dumps({"file": str(file), "ids": IDS.tolist(), "texts": TEXTS}))
    subprocess.run([sys.executable, REFERENCE, request, answer], check=True)
    return torch.load(answer)


@torch.no_grad()
def difference(model, found):
    expected = model(IDS[None], use_cache=False).logits[0]
    return float((found["logits"] - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_type(name, tmp_path):
    model = pruned(name)
    write_gguf(model, tokenizer("gpt2"), tmp_path / "model.gguf")
    found = by_llama_cpp(tmp_path / "model.gguf")
    assert difference(model, found) < 1e-3  # its activations have tables in half precision
    assert found["tokens"] == [tokenizer("gpt2")(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_each_kind_of_matrix(file_type, tmp_path):
    written = write_gguf(pruned(), tokenizer("gpt2"), tmp_path / "model.gguf", file_type)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    # Products are computed with inputs rounded to the type of the matrix.
    assert difference(again, by_llama_cpp(tmp_path / "model.gguf")) < max(1e-3, 2 * written.difference)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_scaled_positions(kind, tmp_path):
    model = dense(rope_parameters=ROTATIONS[kind])
    write_gguf(model, tokenizer("gpt2"), tmp_path / "model.gguf")
    assert difference(model, by_llama_cpp(tmp_path / "model.gguf")) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "digits"])
def test_tokens(kind, tmp_path):
    own = tokenizer_of(kind)
    write_gguf(dense(vocab_size=2100), own, tmp_path / "model.gguf")
    assert by_llama_cpp(tmp_path / "model.gguf")["tokens"] == [own(text)["input_ids"] for text in TEXTS]
