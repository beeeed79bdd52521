"""Compression of a folder whose model does not fit into memory: block by block from its files, to files.

In memory at a time are

- the weights of one block, and the factors that are made for it;
- the moments of the inputs of one block's layers, in float64, and the matrices of the layer that is being factorised;
- the hidden states of all calibration tokens, at most three times (of the dense model before and behind the block, and of
  the compressed one), and what `memory_limit` leaves for activations inside the block, in each of the two models;
- what lies outside the blocks: the embeddings while the batches enter, the head while a loss or predictions are computed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.base_model.disk_weights import DiskWeights, skeleton_of
from hf_qst.base_model.experts import expert_shapes, fused_experts
from hf_qst.mixed_rank.block_walk import by_blocks
from hf_qst.mixed_rank.compression import finished, run_pipeline
from hf_qst.mixed_rank.config import CompressionResults
from hf_qst.mixed_rank.targets import find_targets, matches
from hf_qst.mixed_rank.workload import blocks_of
from hf_qst.reshaped_models import ReshapedConfig
from hf_qst.reshaped_models.classes import how_to_load
from hf_qst.reshaped_models.folder import write_folder
from hf_qst.saved.whole_files import scratch_folder

logger = logging.getLogger(__name__)

_DOUBLE = 8
# Files of a tokenizer or a processor.
_COMPANIONS = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|processor|preprocessor).*|.+\.(model|tiktoken)"
)
_IN_MEMORY = "Load the model, as far as it fits into memory, and call compress_model"


@dataclass(frozen=True)
class FolderCompression:
    """What `compress_folder` did; as text it is one line.

    Args:
        ranks (`dict[str, int]`): of the layers that have factors, by name.
        results ([`CompressionResults`]): what was chosen and measured.
        parameters, parameters_before (`int`): of the model.
        bytes, bytes_before (`int`): of the files of weights.
        seconds (`float`): of all the work.
        peak_memory (`int`, *optional*): bytes that the process had in memory at most since it began; where the system says.
    """

    ranks: dict[str, int]
    results: CompressionResults
    parameters: int
    parameters_before: int
    bytes: int
    bytes_before: int
    seconds: float
    peak_memory: int | None

    def __str__(self) -> str:
        memory = "" if self.peak_memory is None else f", {self.peak_memory / 2**20:,.0f} MiB of memory at most"
        return (
            f"{self.parameters_before:,} parameters in {self.bytes_before:,} bytes became {self.parameters:,} in "
            f"{self.bytes:,}, in {self.seconds:,.1f} s{memory}"
        )


@torch.no_grad()
def compress_folder(
    folder: str | os.PathLike,
    output_folder: str | os.PathLike,
    config,
    calibration_data: Iterable[Mapping] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    max_shard_size: int | str = "2GB",
) -> FolderCompression:
    """Compress a saved decoder that need not fit into memory; ranks and factors are those of `compress_model`.

    The result is a folder as `save_pretrained` of the compressed model writes it, with the tokenizer's files, written whole or
    not at all. Meanwhile the output folder holds a temporary one with the factors that are done.

    Args:
        folder: of a causal language model with its weights in safetensors files.
        output_folder: where the result goes, another folder.
        config ([`MixedRankConfig`]):
            As in `compress_model`, but for what needs the whole model at a time, which is refused. Without a `memory_limit`
            it is that of the moments of the largest block.
        calibration_data (iterable of mappings, *optional*): instead of `config.calibration_data`.
        dtype: that the model is computed and saved in, as in `from_pretrained`.
        device: where a block is when it is needed, and the states.
        max_shard_size: of a file of the result, which is in memory while it is written.

    Raises:
        UnsupportedArchitectureError, CalibrationError, BudgetError, ValueError: naming what does not fit.
    """
    started = time.perf_counter()
    folder, output_folder = os.fspath(folder), os.fspath(output_folder)
    _require_settings(config)
    skeleton = skeleton_of(_config_of(folder))
    if os.path.realpath(folder) == os.path.realpath(output_folder):
        raise ValueError(f"output_folder must be another folder than the model's own, got {output_folder!r} for both")
    config = _for_disk(skeleton, config)
    data = config.calibration_data if calibration_data is None else calibration_data
    with _made(output_folder), scratch_folder(output_folder) as scratch:
        on_disk = DiskWeights(folder, skeleton, scratch, dtype, device)
        model = on_disk.model
        before = model.num_parameters()
        compression = run_pipeline(model, config, data, on_disk)
        if not compression.factors:
            raise ValueError(
                f"MixedRankConfig.keep_ratio={config.keep_ratio} leaves every layer dense: there is nothing to write"
            )
        on_disk.drop()
        for name, layer in compression.factors.items():
            model.set_submodule(name, layer.requires_grad_(model.get_submodule(name).weight.requires_grad))
        model = finished(model)
        _write(model, folder, output_folder, max_shard_size)
    report = FolderCompression(
        compression.ranks, compression.results, model.num_parameters(), before, _weight_bytes(output_folder),
        _weight_bytes(folder), time.perf_counter() - started, _peak_memory(),
    )  # fmt: skip
    logger.info("%s", report)
    if config.progress:
        print(report, file=sys.stderr)
    return report


def _require_settings(config) -> None:
    """Refuse what needs the whole model at a time."""
    compensation = config.compensation.method
    refused = {
        "residual": (config.residual is not None, "adds factors to a model that is compressed already: use get_peft_model"),
        "keep_base_weights": (config.keep_base_weights, "keeps what is replaced: use get_peft_model"),
        f"compensation={compensation!r}": (
            compensation in ("kd", "gradient"),
            "trains factors. Use 'lstsq' or 'none', and train the result as any model",
        ),
        f"quantize_factors={config.quantize_factors!r}": (
            config.quantize_factors is not None,
            "quantises factors in memory. Leave it out, and load the result with quantization_config",
        ),
    }  # fmt: skip
    for name, (holds, why) in refused.items():
        if holds:
            raise ValueError(f"compress_folder does not take MixedRankConfig.{name}, which {why}")


def _config_of(folder: str) -> PreTrainedConfig:
    """The configuration of a folder with weights that can be read a tensor at a time."""
    names = os.listdir(folder) if os.path.isdir(folder) else None
    if names is None:
        raise ValueError(f"compress_folder reads a folder on this machine, there is none at {folder!r}")
    if gguf := next((name for name in sorted(names) if name.endswith(".gguf")), None):
        raise ValueError(
            f"compress_folder reads safetensors files, and {os.path.join(folder, gguf)} is quantised in GGUF. Load it with "
            "gguf_file= and save_pretrained first"
        )
    if not {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & {*names}:
        raise ValueError(
            f"compress_folder reads {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}, and {folder!r} has neither"
        )
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, ReshapedConfig):
        raise ValueError(
            f"compress_folder takes the weights of a dense model, and {folder!r} is a pruned or factorised one"
        )
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        values = quantized if isinstance(quantized, dict) else vars(quantized)
        raise ValueError(
            f"compress_folder takes weights in floating point, and those of {folder!r} are quantised by "
            f"{values.get('quant_method')}"
        )
    return config


def _for_disk(skeleton: PreTrainedModel, config):
    """The configuration with a memory limit, after what can be known from the model's shapes was checked.

    Raises:
        UnsupportedArchitectureError: the model is no decoder of a known type.
        ValueError: some targets are experts, or not all lie in the decoder's blocks.
    """
    find_decoder_stack(skeleton)
    for path, experts in fused_experts(skeleton).items():
        layer = next((name for name in expert_shapes(experts) if _is_wanted(config, f"{path}.{name}")), None)
        if layer is not None:
            raise ValueError(
                f"compress_folder does not compress experts, such as {f'{path}.{layer}'!r}: leave them out by "
                f"exclude_modules=['experts'] or target_modules. {_IN_MEMORY}"
            )
    (blocks, _), *others = by_blocks(skeleton, [(name,) for name in find_targets(skeleton, config)])
    if blocks is None or others:
        raise ValueError(
            "compress_folder compresses layers in the blocks of one decoder; MixedRankConfig.target_modules="
            f"{config.target_modules!r} names others of {type(skeleton).__name__}. {_IN_MEMORY}"
        )
    if config.memory_limit is not None:
        return config
    largest = max(sum(_DOUBLE * group.d_in**2 for group in block) for block in blocks_of(skeleton, config))
    return config.changed(memory_limit=largest)


def _is_wanted(config, name: str) -> bool:
    wanted = config.target_modules
    everything = wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear")
    return bool(matches(config, name, ".*" if everything else wanted))


@contextmanager
def _made(folder: str) -> Iterator[None]:
    """The folder exists; if it was made here, and nothing came into it, it is removed."""
    created = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        yield
    finally:
        if created and not os.listdir(folder):
            os.rmdir(folder)


def _write(model: PreTrainedModel, folder: str, output_folder: str, max_shard_size: int | str) -> None:
    """Save the model, whose weights transformers reads for one file after the other, with the files that go with it."""

    def save(staging: str) -> None:
        with warnings.catch_warnings():
            # That a file must fit into memory: its size was chosen for that.
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            model.plain_class.save_pretrained(model, staging, max_shard_size=max_shard_size)
        for path in sorted(Path(folder).iterdir()):
            if path.is_file() and _COMPANIONS.fullmatch(path.name):
                shutil.copyfile(path, os.path.join(staging, path.name))

    write_folder(save, output_folder, model.config, how_to_load(model))


def _weight_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))


def _peak_memory() -> int | None:
    """Bytes that this process has had in memory at most; Linux says."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return None if found is None else int(found[1]) * 1024
