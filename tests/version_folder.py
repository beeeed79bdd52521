"""What `tests/saved_files/<version>` holds: how each part is made by this version, and how any later one loads and runs it.

    python -m tests.version_folder            # writes tests/saved_files/<version>, with what each part computes

Parts are of one tiny Llama. A name ends in `_adapter` or not: an adapter of the base, or a model. 4-bit weights are run without
bitsandbytes' packed kernel, so that they compute the same on every processor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_qst
from hf_qst import MixedRankConfig, prune_model
from hf_qst.base_model.packed_weights import unpacked
from hf_qst.qst import HiddenStateCacheConfig, hidden_state_cache, set_hidden_state_cache
from hf_qst_plugins.adaptive_temperature import DifficultyProbe, VocabularyTable
from hf_qst_plugins.adaptive_temperature.learned import CERTAINTY_FEATURES, FEATURES
from hf_qst_plugins.code_evaluation import read_samples
from hf_qst_plugins.code_evaluation.samples_file import SamplesFile
from tests.architectures import NF4, side_tuned, tiny, token_batch, wake
from tests.conformance.methods import LINES
from tests.pruned_models import with_disp

SAVED = Path(__file__).parent / "saved_files"
IDS = token_batch(2, 6)
# Small files; factors in NF4 have tables of a kilobyte each.
DISP = {"keep_ratio": 0.6, "hypernetwork_hidden_size": 8, "hypernetwork_input_size": 8}
QUANTISED = {"target_modules": ["down_proj", "o_proj"]}
SETTINGS = {"seed": 1, "sampling": {"temperature": 0.5, "adaptive": True}}
STORAGES = ("full", "bfloat16", "int8")


def base() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    return tiny("llama", num_attention_heads=2, num_key_value_heads=1, **sizes)


def nf4(model, double: bool):
    """The model as it is loaded in NF4."""
    settings = BitsAndBytesConfig(**{**NF4, "bnb_4bit_use_double_quant": double})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"}).eval()


def factored(model=None, **changes):
    data = [{"input_ids": token_batch(4, 12, seed=seed)} for seed in range(2)]
    config = MixedRankConfig(**{"calibration_data": data, "keep_ratio": 0.6, "progress": False, **changes})
    return get_peft_model(base() if model is None else model, config)


def qst(model, **settings):
    return side_tuned(model=model, awake=True, **{"r": 2, "downsample_rank": 4, **settings})


def pruned():
    return with_disp(model=base(), awake=True, **DISP).merge_and_unload()


def pruned_by_scores():
    data = [{"input_ids": token_batch(4, 12)}]
    return prune_model(base(), "flap", keep_ratio=0.6, calibration_data=data)


PARTS: dict[str, Callable[[], torch.nn.Module]] = {
    "base": base,
    "base_nf4": lambda: nf4(base(), True),
    "qst_adapter": lambda: qst(base()),
    "qst_paper_adapter": lambda: qst(base(), downsample="linear", mix="paper", readout_rank=0),
    "qst_tail_adapter": lambda: wake(LINES["qst_tail"].random(base(), r=2)),
    "qst_on_nf4_adapter": lambda: qst(nf4(base(), True)),
    "disp_adapter": lambda: with_disp(model=base(), awake=True, **DISP),
    "mixed_rank_adapter": factored,
    "residual_on_nf4_adapter": lambda: factored(nf4(base(), True), residual={"reference_model": base(), "rank": 2}),
    "mixed_rank_nf4_adapter": lambda: factored(quantize_factors="nf4", **QUANTISED),
    "pruned_model": pruned,
    "pruned_by_scores_model": pruned_by_scores,
    "pruned_nf4_model": lambda: nf4(pruned(), False),
    "mixed_rank_model": lambda: factored().merge_and_unload(),
    "mixed_rank_nf4_model": lambda: factored(quantize_factors="nf4", **QUANTISED).merge_and_unload(),
    "mixed_rank_int8_model": lambda: factored(quantize_factors="int8", **QUANTISED).merge_and_unload(),
}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    with unpacked(model):
        return model.eval()(input_ids=IDS, use_cache=False).logits


def load(folder: Path, name: str) -> torch.nn.Module:
    if not name.endswith("_adapter"):
        return AutoModelForCausalLM.from_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / ("base_nf4" if "on_nf4" in name else "base"))
    return PeftModel.from_pretrained(model, folder / name)


def loss_with_cache(folder: Path, storage: str, states: Path) -> tuple[float, object]:
    """Loss in training mode of `qst_adapter` on stored states, with the counts of what was found among them."""
    model = load(folder, "qst_adapter")
    set_hidden_state_cache(model, HiddenStateCacheConfig(str(states), storage))
    with torch.no_grad():
        loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.item()
    hidden_state_cache(model).close()
    return loss, hidden_state_cache(model).counts


def read_tables(folder: Path) -> dict:
    """What the JSON files of a version say, as plain values."""
    settings, samples = read_samples(folder / "samples.jsonl")
    table = VocabularyTable.load(folder / "table.json")
    return {
        "settings": settings,
        "samples": samples,
        "table": [table.texts, table.language, table.tab_width],
        "probe": asdict(DifficultyProbe.load(folder / "probe.json")),
    }


def _write_tables(folder: Path) -> None:
    with SamplesFile(folder / "samples.jsonl", SETTINGS) as file:
        for number in range(3):
            text = {"task_id": f"HumanEval/{number}", "completion": "return 'é'\n", "detail": "", "outcome": "passed"}
            file.append({**text, "sample": 0, "program_parses": True, "tokens": 7, "seconds": 0.25})
    VocabularyTable(["a", " x", "\n", ":\n    ", None]).save(folder / "table.json")
    mean, weights = [0.5] * len(CERTAINTY_FEATURES), [0.25] * len(FEATURES)
    DifficultyProbe(weights, 0.1, mean, mean, "hash", {"probe": 0.9}).save(folder / "probe.json")


def write(folder: Path) -> None:
    """Make every part in `folder`, which must not be there, and record what it computes."""
    folder.mkdir(parents=True)
    expected = {"input_ids": IDS}
    for name, make in PARTS.items():
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)
        expected[name] = logits(model)
    save_file(expected, folder / "expected.safetensors")
    losses = {storage: loss_with_cache(folder, storage, folder / "hidden_states")[0] for storage in STORAGES}
    _write_tables(folder)
    (folder / "expected.json").write_text(json.dumps({"losses": losses, **read_tables(folder)}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.version_folder", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=SAVED / hf_qst.__version__)
    parser.add_argument(
        "--again", action="store_true", help="replace the folder of a version that was not released yet"
    )
    args = parser.parse_args()
    if args.again:
        shutil.rmtree(args.folder, ignore_errors=True)
    if args.folder.exists():
        parser.error(f"{args.folder} is there already; --again replaces it, as long as its version is not released")
    write(args.folder)
    size = sum(file.stat().st_size for file in args.folder.rglob("*"))
    print(f"{args.folder}: {len(PARTS)} adapters and models, {len(load_file(args.folder / 'expected.safetensors'))} "
          f"tensors expected, {size // 1000} KB")  # fmt: skip


if __name__ == "__main__":
    main()
