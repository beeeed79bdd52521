"""A GGUF file holds the function of the model it was written from, in the dense model's shapes, or there is none."""

import json

import pytest
import torch
import transformers
from gguf import GGUFReader
from packaging.version import Version
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_qst import MixedRankConfig
from hf_qst_plugins.gguf_files import ARCHITECTURES, FILE_TYPES, GGUFError, write_gguf
from hf_qst_plugins.gguf_files.rotary import rotary_settings
from tests.plugins.code_tokenizers import tokenizer
from tests.plugins.gguf_files.models import ROTATIONS, TEXTS, dense, pruned, tokenizer_of
from tests.tiny_decoders import tiny_config

IDS = torch.arange(3, 51).reshape(2, 24)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def read(file, expected):
    """The model that transformers reads, with the fields that it does not read."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for name in ARCHITECTURES[expected.config.model_type].unread:
        setattr(config, name, getattr(expected.config, name, None))
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruned_model_of_each_type_is_padded_and_reads_back(name, tmp_path):
    small, file = pruned(name), tmp_path / "model.gguf"
    written = write_gguf(small, tokenizer("gpt2"), file)
    again = read(file, small)
    assert again.config.model_type == ("llama" if name == "mistral" else name)
    torch.testing.assert_close(logits(again), logits(small), atol=1e-4, rtol=1e-4)
    assert again.num_parameters() == written.parameters == dense(name).num_parameters() > small.num_parameters()
    assert written.kept_parameters == small.num_parameters() and written.bytes == file.stat().st_size
    assert written.difference < 1e-4


def test_factors_are_multiplied_out_also_in_a_pruned_model(tmp_path):
    batches = [{"input_ids": IDS}]
    config = MixedRankConfig(keep_ratio=0.6, calibration_data=batches)
    small = get_peft_model(pruned(), config).merge_and_unload()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    written = write_gguf(small, tokenizer("gpt2"), tmp_path / "model.gguf")
    torch.testing.assert_close(logits(read(tmp_path / "model.gguf", small)), logits(small), atol=1e-4, rtol=1e-4)
    assert written.parameters > small.num_parameters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_matrices_are_stored_as_asked(file_type, tmp_path):
    model, file = pruned("gpt2"), tmp_path / "model.gguf"
    written = write_gguf(model, tokenizer("gpt2"), file, file_type)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    matrices = {kind for name, kind in kinds.items() if name.endswith(".weight") and "norm" not in name}
    assert matrices == {FILE_TYPES[file_type]}
    assert {kind for name, kind in kinds.items() if name.endswith(".bias") or "norm" in name} == {"F32"}
    most = {"f32": 1e-5, "f16": 5e-3, "bf16": 5e-2, "q8_0": 5e-2}[file_type]  # 24, 11, 8 and 7 bits
    assert written.difference < most


def test_head_that_is_the_embeddings_is_stored_once(tmp_path):
    for tied in (True, False):
        write_gguf(dense(tie_word_embeddings=tied), tokenizer("gpt2"), tmp_path / "model.gguf")
        names = {tensor.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
        assert ("output.weight" in names) is not tied and "token_embd.weight" in names


@pytest.mark.parametrize("kind", ROTATIONS)
def test_scaled_positions_are_in_the_file(kind, tmp_path):
    model = dense(rope_parameters=ROTATIONS[kind])
    written = write_gguf(model, tokenizer("gpt2"), tmp_path / "model.gguf")
    assert written.unread == ("rope_parameters",)
    settings, factors = rotary_settings(model.config)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](model.config, "cpu")
    plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    stretch = settings["rope.scaling.factor"] if factors is None else torch.from_numpy(factors)
    torch.testing.assert_close(plain / stretch, scaled)
    assert len({round(float(x), 6) for x in plain / scaled}) == (1 if kind == "linear" else 5)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="transformers reads other tokenizers")
@pytest.mark.parametrize(("kind", "texts"), [("gpt2", TEXTS), ("llama", TEXTS[:2])])
def test_tokenizer_reads_back(kind, texts, tmp_path):
    """transformers' Llama tokenizer puts no space behind a special token, where older ones do."""
    own = tokenizer_of(kind)
    write_gguf(dense(vocab_size=len(own) + 3), own, tmp_path / "model.gguf")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert [again(text)["input_ids"] for text in texts] == [own(text)["input_ids"] for text in texts]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, name) == getattr(own, name)


def test_splits_have_the_names_under_which_transformers_knows_them():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    from hf_qst_plugins.gguf_files.vocabulary import SPLITS

    assert {mapping.GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in SPLITS.values()} == SPLITS


def words():
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_digits_one_by_one_have_a_name(tmp_path):
    write_gguf(dense(), tokenizer_of("digits"), tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"


def changed(**fields):
    """A model that was built with other values than its configuration says."""
    model = dense()
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


REFUSED = {
    "type": (
        lambda: dense("granite"),
        {},
        "type 'granite' cannot be written as a GGUF file; these can: llama, mistral",
    ),
    "window": (lambda: dense("mistral", sliding_window=8), {}, "config.sliding_window is 8; a GGUF file"),
    "bias": (lambda: dense(attention_bias=True), {}, "config.attention_bias is True"),
    "positions": (
        lambda: dense(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        {},
        "rope_type 'yarn'",
    ),
    "base": (
        lambda: AutoModel.from_config(tiny_config("llama")),
        {},
        "must be a causal language model, got LlamaModel",
    ),
    "adapter": (
        lambda: get_peft_model(dense(), MixedRankConfig(keep_ratio=0.9)),
        {},
        "without adapters, got PeftModel",
    ),
    "file type": (dense, {"file_type": "q4_k"}, "file_type must be one of f32, f16, bf16, q8_0, got 'q4_k'"),
    "words": (dense, {"tokenizer": words}, "tokenizer must be a BPE model, got WordLevel"),
    "split": (dense, {"tokenizer": lambda: tokenizer("newline_merging")}, "give llama.cpp's name of a way"),
    "sentences": (dense, {"tokenizer": lambda: tokenizer("sentencepiece")}, "give llama.cpp's name of a way"),
    "merges": (
        dense,
        {"tokenizer": lambda: tokenizer("sentencepiece"), "pre_tokenizer": "default"},
        "the tokenizer does not merge",
    ),
    "vocabulary": (lambda: dense(vocab_size=300), {}, "the model's embeddings have 300 rows"),
    "other function": (lambda: changed(rms_norm_eps=0.5), {}, "read back by transformers gives logits that differ by"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(case, tmp_path):
    model, given, message = REFUSED[case]
    arguments = {"tokenizer": lambda: tokenizer("gpt2"), **given}
    own = arguments.pop("tokenizer")
    (tmp_path / "model.gguf").write_bytes(b"old")
    with pytest.raises(GGUFError) as raised:
        write_gguf(model(), own(), tmp_path / "model.gguf", **arguments)
    assert message in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == b"old"


def test_named_split_is_taken(tmp_path):
    own = tokenizer("newline_merging")
    write_gguf(dense(vocab_size=len(own)), own, tmp_path / "model.gguf", pre_tokenizer="llama-bpe")
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == "llama-bpe"


def test_path_needs_the_suffix(tmp_path):
    with pytest.raises(GGUFError, match=r"path must end in \.gguf, got"):
        write_gguf(dense(), tokenizer("gpt2"), tmp_path / "model.bin")


def test_merges_are_in_the_order_of_the_tokenizer(tmp_path):
    write_gguf(dense(), tokenizer("gpt2"), tmp_path / "model.gguf")
    found = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.merges"].contents()
    merges = json.loads(tokenizer("gpt2").backend_tokenizer.to_str())["model"]["merges"]
    assert found == [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
