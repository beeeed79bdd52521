"""Writes a model as a GGUF file, and moves the file into place when transformers has read the same model back."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_qst.extras import require
from hf_qst.reshaped_models import ReshapedModel, to_dense
from hf_qst.saved import whole_file

from .architectures import ARCHITECTURES, Architecture, GGUFError, check_implied, common_settings
from .rotary import FACTORS, rotary_settings
from .vocabulary import vocabulary_settings

FILE_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""How matrices may be stored -> the gguf package's name. Vectors are stored in float32."""
_FILE_TYPE_NUMBER = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_TOLERANCE = 1e-4
"""Of the largest logit. Both models have the same float32 weights; a shifted norm may lose its last bit."""
_TOKENS = (2, 48)
"""Rows and length of the random tokens on which logits are compared."""


@dataclass(frozen=True)
class GGUFFile:
    """What was written.

    Attributes:
        path (`str`): of the file.
        bytes (`int`): its size.
        parameters (`int`): values of its tensors, the zeros of padded matrices included.
        kept_parameters (`int`): parameters of the model that was given.
        file_type (`str`): one of `FILE_TYPES`.
        difference (`float`): the largest between the logits of the model that was given and those of the file, as a part
            of the largest logit.
        unread (`tuple[str, ...]`): fields of the configuration that llama.cpp reads from the file or implies, and
            transformers does not; pass it `config=` with them.
    """

    path: str
    bytes: int
    parameters: int
    kept_parameters: int
    file_type: str
    difference: float
    unread: tuple[str, ...]


def write_gguf(
    model: PreTrainedModel,
    tokenizer,
    path: str | os.PathLike,
    file_type: str = "f32",
    pre_tokenizer: str | None = None,
) -> GGUFFile:
    """Write a model as a GGUF file, whole or not at all.

    A reshaped model is written in its architecture's shapes: narrow matrices are filled with zero rows and columns, and
    factors are multiplied out. So the file is as large as that of the dense model.

    Before the file is moved into place, transformers reads it back, and its logits are compared. That takes two more copies
    of the model in float32.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model of a type in `ARCHITECTURES`, reshaped or not, not
            quantised, without adapters.
        tokenizer: its fast tokenizer.
        path (`str` or `PathLike`): of the file, which ends in `.gguf`.
        file_type (`str`): how matrices are stored: `"f32"`, `"f16"`, `"bf16"`, or `"q8_0"` (8 bits, 32 values a scale).
        pre_tokenizer (`str`, *optional*): llama.cpp's name of how text is split before a byte-level tokenizer's merges; by
            default it is found by the tokenizer's own rule.

    Returns:
        [`GGUFFile`]

    Raises:
        ImportError: the gguf package is missing.
        GGUFError: the type of the model, a field of its configuration or its tokenizer cannot be written, or the file read
            back as another model. Nothing is written.
    """
    require("gguf", "write_gguf")
    if file_type not in FILE_TYPES:
        raise GGUFError(f"file_type must be one of {', '.join(FILE_TYPES)}, got {file_type!r}")
    if not os.fspath(path).endswith(".gguf"):
        raise GGUFError(f"path must end in .gguf, got {os.fspath(path)!r}")
    _require_plain(model)
    architecture, settings, factors = _content(model.config, tokenizer, pre_tokenizer)
    dense, ids = _dense(model), _token_ids(model.config)
    given = _logits(model, ids)
    if model.dtype is torch.float32:
        _require_close(_logits(dense, ids), given, "the model in its architecture's shapes")
    _round_matrices(dense, file_type)
    with whole_file(path) as temporary:
        _write(temporary, architecture, settings, _tensors(dense, architecture, file_type), factors, file_type)
        again, unread = _read_back(temporary, dense.config, architecture)
        read = _logits(again, ids)
        _require_close(read, _logits(dense, ids), "the file read back by transformers")
    return GGUFFile(
        path=os.fspath(path),
        bytes=os.path.getsize(path),
        parameters=dense.num_parameters(),
        kept_parameters=model.num_parameters(),
        file_type=file_type,
        difference=float((read - given).abs().max() / given.abs().max()),
        unread=unread,
    )


def require_writable(config, tokenizer, pre_tokenizer: str | None = None) -> None:
    """Check what can be checked without weights: the type of the model, its configuration, the tokenizer.

    Raises:
        GGUFError: as of `write_gguf`.
    """
    _content(config, tokenizer, pre_tokenizer)


def _content(config, tokenizer, pre_tokenizer: str | None) -> tuple[Architecture, dict, np.ndarray | None]:
    """The architecture, the keys of the file, and the factors of rotary frequencies."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise GGUFError(
            f"models of the type {config.model_type!r} cannot be written as a GGUF file; these can: "
            f"{', '.join(ARCHITECTURES)}"
        )
    check_implied(config, architecture)
    rotary, factors = rotary_settings(config)
    own = {**common_settings(config, architecture), **rotary, **architecture.settings(config)}
    vocabulary = vocabulary_settings(tokenizer, config.vocab_size, pre_tokenizer)
    settings = {f"{architecture.name}.{name}": value for name, value in own.items()}
    return architecture, settings | {f"tokenizer.{name}": value for name, value in vocabulary.items()}, factors


def _require_plain(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise GGUFError(
            f"model must be a transformers model without adapters, got {type(model).__name__}; merge them first "
            "(merge_and_unload)"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise GGUFError("model must not be quantised; load it without quantization_config")
    if model.get_output_embeddings() is None:
        raise GGUFError(f"model must be a causal language model, got {type(model).__name__}")


def _dense(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in the architecture's shapes, in float32 on the CPU."""
    dense = to_dense(model) if isinstance(model, ReshapedModel) else copy.deepcopy(model)
    return dense.to("cpu", torch.float32).eval()


def _rows(name: str, tensor: torch.Tensor, transposed: frozenset[str]) -> torch.Tensor:
    """A weight as [outputs, inputs]; others as they are."""
    return tensor.T if name in transposed else tensor


def _transposed(model: nn.Module) -> frozenset[str]:
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))


@torch.no_grad()
def _round_matrices(dense: PreTrainedModel, file_type: str) -> None:
    """Give a model the values that the file will hold, so that what is read back has to be equal."""
    if file_type == "f32":
        return
    from gguf import dequantize

    transposed = _transposed(dense)
    for name, parameter in dense.named_parameters():
        if parameter.dim() > 1:
            rows = _rows(name, parameter, transposed)
            stored, kind = _stored(rows.numpy(), file_type)
            rows.copy_(torch.from_numpy(dequantize(stored, kind).reshape(rows.shape)))


def _stored(values: np.ndarray, file_type: str) -> tuple[np.ndarray, Any]:
    """The values as the file holds them, and the gguf package's type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quantize

    kind = GGMLQuantizationType[FILE_TYPES[file_type]] if values.ndim > 1 else GGMLQuantizationType.F32
    if values.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16  # as llama.cpp does with rows that no number of blocks fills
    return quantize(np.ascontiguousarray(values, dtype=np.float32), kind), kind


def _tensors(
    dense: PreTrainedModel, architecture: Architecture, file_type: str
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray, Any]]:
    """Name, shape, content and type of each tensor of the file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(arch, dense.config.num_hidden_layers)
    transposed, tied = _transposed(dense), set(dense.all_tied_weights_keys)
    for name, tensor in dense.state_dict().items():
        if name in tied:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise GGUFError(f"a GGUF file of the architecture {architecture.name} has no place for the tensor {name!r}")
        values = _rows(name, tensor, transposed).numpy()
        if architecture.shifted_norms and name.endswith("norm.weight"):
            values = values + 1
        if architecture.interleaved_heads and (".q_proj." in name or ".k_proj." in name):
            config = dense.config
            values = _interleaved(values, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        yield found, values.shape, *_stored(values, file_type)


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads x (2 halves x pairs)] as [heads x (pairs x 2)]."""
    pairs = values.shape[0] // heads // 2
    return values.reshape(heads, 2, pairs, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _write(
    path: str, architecture: Architecture, settings: dict, tensors: Iterator, factors: np.ndarray | None, file_type: str
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture.name)
    writer.add_file_type(_FILE_TYPE_NUMBER[file_type])
    writer.add_quantization_version(2)
    for name, value in settings.items():
        _add(writer, name, value)
    if factors is not None:
        writer.add_tensor(FACTORS, factors)
    for name, _, content, kind in tensors:
        writer.add_tensor(name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, name: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _read_back(path: str, expected, architecture: Architecture) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model that transformers reads from a file, and the fields that it was given because it does not read them."""
    folder, name = os.path.split(os.path.abspath(path))
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    unread = tuple(n for n in architecture.unread if getattr(config, n, None) != getattr(expected, n, None))
    for field in unread:
        setattr(config, field, getattr(expected, field))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=torch.float32)
    return model.eval(), unread


def _token_ids(config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows, length = _TOKENS
    return torch.randint(config.vocab_size, (rows, min(length, config.max_position_embeddings)), generator=generator)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    training = model.training
    logits = model.eval()(ids.to(model.device), use_cache=False).logits.float().cpu()
    model.train(training)
    return logits


def _require_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= _TOLERANCE * largest:
        raise GGUFError(f"{what} gives logits that differ by {difference:.3g}; the largest is {largest:.3g}")
