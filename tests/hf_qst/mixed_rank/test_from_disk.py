"""A folder compressed block by block is what the model in memory gives, and takes a small part of the memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_qst.base_model.disk_weights import DiskWeights
from hf_qst.errors import MissingWeightsError
from hf_qst.mixed_rank import (
    LowRankLinear,
    MixedRankConfig,
    compress,
    compress_folder,
    compress_model,
    sensitivity_from_disk,
)
from hf_qst.mixed_rank.allocation import stage
from hf_qst.mixed_rank.sensitivity import fisher_weights
from hf_qst.mixed_rank.sensitivity_from_disk import fisher_weights_from_disk
from tests.architectures import tiny, token_batch
from tests.mixtures import tiny_mixture
from tests.tiny_decoders import tiny_decoder
from tests.toy_data import tokenizer


def batches(count=4):
    return [{"input_ids": token_batch(seed=seed)} for seed in range(count)]


def settings(**changes):
    return MixedRankConfig(**{"keep_ratio": 0.6, "progress": False, **changes})


def saved(model, folder):
    """In several files."""
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(Path(folder).glob("*.safetensors"))) > 3
    return folder


VARIANTS = {
    "llama": {},
    "opt": {"max_calibration_batches": 2},
    "gpt2": {"decomposition": {"bias_correction": True}},
    "gemma3_text": {"allocation": "uniform"},
    "gemma2": {"allocation": {"layer_weight": "fisher"}, "exclude_modules": ["o_proj"]},
    "mistral": {"allocation": {"layer_weight": "none"}},
    "qwen3": {"allocation": "auto"},
    "phi": {"compensation": "none"},
    "gptj": {"memory_limit": 8 * 256**2},
}


@pytest.mark.parametrize(("name", "changes"), VARIANTS.items(), ids=VARIANTS)
def test_the_folder_is_that_of_the_model_in_memory(name, changes, tmp_path):
    folder = saved(tiny(name) if name != "gptj" else tiny_decoder(name), tmp_path / "model")
    tokenizer().save_pretrained(folder)
    report = compress_folder(folder, tmp_path / "from disk", settings(**changes), batches(), max_shard_size="100KB")
    model = compress_model(AutoModelForCausalLM.from_pretrained(folder), settings(**changes), batches())
    expected = {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert report.ranks == expected
    model.save_pretrained(tmp_path / "in memory")
    one, other = (json.loads((tmp_path / way / "config.json").read_text()) for way in ("from disk", "in memory"))
    assert one == other

    small = AutoModelForCausalLM.from_pretrained(tmp_path / "from disk")
    with torch.no_grad():
        torch.testing.assert_close(small(token_batch(seed=9)).logits, model(token_batch(seed=9)).logits)
    assert report.parameters == small.num_parameters() < report.parameters_before
    assert len(list((tmp_path / "from disk").glob("*.safetensors"))) > 1
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "from disk" / file).read_bytes() == (folder / file).read_bytes()
    assert not [file for file in os.listdir(tmp_path / "from disk") if file.startswith(".")]


def test_layers_are_weighed_as_in_memory(tmp_path, monkeypatch):
    """Also where the loss is taken of a few tokens at a time, and some are padding or have no label."""
    monkeypatch.setattr(sensitivity_from_disk, "_TOKENS", 3)
    seen = []

    def keep(on_disk, energies, *others):
        seen.append((energies, fisher_weights_from_disk(on_disk, energies, *others)))
        return seen[-1][1]

    monkeypatch.setattr(stage, "fisher_weights_from_disk", keep)
    folder, data = saved(tiny("llama"), tmp_path / "model"), batches()
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -4:] = 0
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][1, :6] = -100
    config = settings(allocation={"layer_weight": "fisher"})
    report = compress_folder(folder, tmp_path / "small", config, data)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert report.ranks == compress(model, config, data).ranks
    energies, weights = seen[0]
    assert weights == pytest.approx(fisher_weights(model, energies, data, False), rel=1e-4)


def test_plain_factors_need_no_data(tmp_path):
    folder = saved(tiny("llama"), tmp_path / "model")
    config = settings(decomposition="plain", target_modules=["q_proj", "down_proj"])
    report = compress_folder(folder, tmp_path / "small", config)
    model = compress_model(AutoModelForCausalLM.from_pretrained(folder), config)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert report.ranks and all(torch.equal(small.get_parameter(n), p) for n, p in model.named_parameters())
    assert f"{report.parameters_before:,} parameters in {report.bytes_before:,} bytes became" in str(report)


def test_attention_of_a_mixture(tmp_path):
    """Its experts lie in the files one by one, and in the model as one tensor."""
    folder = saved(tiny_mixture("mixtral"), tmp_path / "model")
    config = settings(target_modules=["q_proj", "o_proj"])
    compress_folder(folder, tmp_path / "small", config, batches())
    model = compress_model(AutoModelForCausalLM.from_pretrained(folder), config, batches())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert all(torch.equal(small.get_parameter(name), value) for name, value in model.named_parameters())


def test_one_block_is_in_memory_at_a_time_and_the_result_comes_at_once(tmp_path, monkeypatch):
    folder = saved(tiny("llama"), tmp_path / "model")
    seen = []

    def put_away(self, modules):
        present = {n.split(".")[2] for n, p in self.model.named_parameters() if "layers" in n and not p.is_meta}
        seen.append((present, os.listdir(tmp_path / "small")))
        original(self, modules)

    original = DiskWeights.put_away
    monkeypatch.setattr(DiskWeights, "put_away", put_away)
    compress_folder(folder, tmp_path / "small", settings(), batches())
    assert len(seen) == 3 and all(len(present) <= 1 for present, _ in seen)
    assert all(len(files) == 1 and files[0].startswith(".tmp_") for _, files in seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("the disk is full")])
def test_what_is_not_finished_leaves_nothing(error, tmp_path, monkeypatch):
    folder = saved(tiny("llama"), tmp_path / "model")
    names, original = [], DiskWeights.put_away

    def put_away(self, modules):
        original(self, modules)
        names.extend(modules)
        if any("layers.1" in name for name in modules):
            raise error

    monkeypatch.setattr(DiskWeights, "put_away", put_away)
    with pytest.raises(error if isinstance(error, type) else OSError):
        compress_folder(folder, tmp_path / "small", settings(), batches())
    assert names and not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compensation": "kd"}, "compensation='kd', which trains factors"),
        ({"compensation": "gradient"}, "compensation='gradient', which trains factors"),
        ({"quantize_factors": "nf4"}, "quantize_factors='nf4', which quantises factors in memory"),
        ({"residual": {"rank": 4}}, "MixedRankConfig.residual, which adds factors"),
        ({"keep_base_weights": True}, "MixedRankConfig.keep_base_weights, which keeps"),
        ({"keep_ratio": 1.0}, "keep_ratio=1.0 leaves every layer dense"),
    ],
    ids=str,
)
def test_settings_that_need_the_whole_model_are_refused(changes, message, tmp_path):
    folder = saved(tiny("llama"), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        compress_folder(folder, tmp_path / "small", settings(**changes), batches())
    assert not (tmp_path / "small").exists()


def _with_nan(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    tiny("llama").save_pretrained(folder, state_dict=tensors)


FOLDERS = {
    "gguf": (lambda folder: (folder / "model.gguf").touch(), "is quantised in GGUF"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "and .* has neither"),
    "quantised": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(
                json.loads((folder / "config.json").read_text())
                | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
            )
        ),
        "are quantised by bitsandbytes",
    ),
    "compressed": (
        lambda folder: compress_model(tiny("llama"), settings(), batches()).save_pretrained(folder),
        "is a pruned or factorised one",
    ),
    "not finite": (_with_nan, "the weight of 'model.layers.1.mlp.up_proj' holds NaN"),
    "lacks a tensor": (
        lambda folder: tiny("llama").save_pretrained(
            folder, state_dict={n: t for n, t in tiny("llama").state_dict().items() if "layers.2.mlp.up" not in n}
        ),
        "has no tensor 'model.layers.2.mlp.up_proj.weight'",
    ),
    "experts": (
        lambda folder: tiny_mixture("mixtral").save_pretrained(folder),
        "does not compress experts, such as 'model.layers.0.mlp.experts.0.gate_up'",
    ),
    "states of several blocks": (
        lambda folder: tiny_decoder("gemma3n_text").save_pretrained(folder),
        "hand on more than the hidden state",
    ),
    "encoder": (
        lambda folder: BertForMaskedLM(
            BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        ).save_pretrained(folder),
        "a model of type 'bert' is an encoder",
    ),
    "encoder and decoder": (
        lambda folder: T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=32, num_layers=2, num_heads=2, d_ff=64, d_kv=16)
        ).save_pretrained(folder),
        "T5Config",
    ),
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS)
def test_folders_that_cannot_be_read_so_are_refused(change, message, tmp_path):
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        compress_folder(folder, tmp_path / "small", settings(), batches())
    assert not (tmp_path / "small").exists()


def test_the_folder_itself_is_not_overwritten(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="output_folder must be another folder"):
        compress_folder(tmp_path / "model", tmp_path / "model" / ".", settings(), batches())
    with pytest.raises(ValueError, match="there is none at 'nowhere'"):
        compress_folder("nowhere", tmp_path / "small", settings(), batches())


def test_layers_outside_the_blocks_are_refused(tmp_path):
    folder = saved(tiny("opt", word_embed_proj_dim=32), tmp_path / "model")
    with pytest.raises(ValueError, match=r"target_modules='\.\*project_in' names others"):
        compress_folder(folder, tmp_path / "small", settings(target_modules=".*project_in"), batches())


def test_an_offloaded_model_is_told_of_it():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    with pytest.raises(MissingWeightsError, match="where it does not fit"):
        compress_model(model, settings(), batches())


LIMITED = """
import resource, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_qst.mixed_rank import MixedRankConfig, compress_folder, compress_model


def bytes_of(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def compress(folder, output):
    config = MixedRankConfig(keep_ratio=0.8, exclude_modules=["down_proj"], progress=False)
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 96, (2, 32), generator=generator)} for _ in range(2)]
    if way == "from disk":
        compress_folder(folder, output, config, data, max_shard_size="8MB")
    else:
        compress_model(AutoModelForCausalLM.from_pretrained(folder), config, data).save_pretrained(output)


way, small, folder, output, more = sys.argv[1:]
compress(small, output + "_small")  # imports what is imported late
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before, limit = bytes_of("VmRSS"), bytes_of("VmData") + int(more)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
compress(folder, output)
print(bytes_of("VmHWM") - before)
"""
BUDGET = 48 * 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_memory_is_that_of_a_few_blocks(tmp_path):
    """The limit on a process's data: its private memory, and the files that it has mapped.

    transformers maps all files of a folder while it looks the tensors up, so their size comes on top. Mapped pages are in
    memory only when they were read; what was in memory in all is measured besides, in part of the size of the files.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "vocab_size": 96}
    for name, blocks in (("small", 2), ("large", 30)):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, max_position_embeddings=64, **sizes))
        model.save_pretrained(tmp_path / name, max_shard_size="8MB")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 4 * BUDGET

    def run(way):
        folders = [str(tmp_path / name) for name in ("small", "large", way)]
        command = [sys.executable, "-c", LIMITED, way, *folders, str(size + BUDGET)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    ended = run("from disk")
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) < size / 2
    assert (tmp_path / "from disk" / "model.safetensors.index.json").exists()
    ended = run("in memory")
    assert ended.returncode != 0 and "annot allocate memory" in ended.stderr
    assert not (tmp_path / "in memory").exists()
