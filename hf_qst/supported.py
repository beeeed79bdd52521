"""Which method works with which type of model, read off the tables; `python -m hf_qst.supported` writes the docs page."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_qst.base_model.decoder_stack import ARCHITECTURES, WRAPPERS, register_architecture
from hf_qst.base_model.encoder_blocks import MODELS, known_types
from hf_qst.base_model.unsupported_types import UNSUPPORTED

__all__ = ["register_architecture", "supported_models"]

METHODS = ("qst", "disp", "mixed_rank")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "supported_models.md"
_HEAD = """# Supported models

By `config.model_type`; a model of text and images has the limits of its language model's type. The tables behind this page
are `hf_qst/base_model/decoder_table.py` and `encoder_blocks.py`; `python -m hf_qst.supported` writes it anew, and
`hf_qst.supported_models()` returns it. `tests/hf_qst/test_architecture_matrix.py` runs every decoder here;
[the outcome](../benchmarks/results/architecture_matrix.json) is [summed up](results/model_types.md) in the results.

For a type that is not here, the error names what its blocks hold and a known type that calls its parts the same;
`hf_qst.register_architecture("new_type", "llama")` then treats it as that type, and takes an `Architecture` of your own too.

| type | QST | DISP | mixed rank |
| --- | --- | --- | --- |
"""
_WITHOUT = """

## Language models without a row

The other types of `AutoModelForCausalLM` in transformers 5.23.

| type | why QST and DISP do not work | mixed rank |
| --- | --- | --- |
"""


def supported_models() -> dict[str, dict[str, str]]:
    """For each type of model what holds for each method: `"yes"`, `"partly, ..."`, `"no: ..."` or what it needs.

    Of `"qst"`, `"disp"` (and `prune_model`) and `"mixed_rank"`, by `config.model_type`.
    """
    found = {}
    for name, row in ARCHITECTURES.items():
        disp = f"partly, without {row.unpruned}" if row.unpruned else "yes"
        if row.pruning_refused:
            disp = f"no: {row.pruning_refused}"
        left = ", ".join(part.replace("\\", "").rstrip(".") for part in row.uncompressed)
        rank = f"partly, without {left}" if left else "yes"
        found[name] = {"qst": "yes", "disp": disp, "mixed_rank": rank}
    inside = "as its language model"
    found |= {name: {"qst": inside, "disp": inside, "mixed_rank": "yes"} for name in WRAPPERS}
    other = "no: not a decoder-only language model"
    for name in set(known_types()) - {*ARCHITECTURES, *WRAPPERS}:
        reasons = sorted(set(MODELS[name].without.values()))
        found[name] = {"qst": other, "disp": other}
        found[name]["mixed_rank"] = f"partly: what {'; '.join(reasons)}, stays" if reasons else "yes"
    named = {"mixed_rank": "layers named in `target_modules`"}
    for name, why in UNSUPPORTED.items():
        found[name] = {**found.get(name, named), "qst": f"no: {why}", "disp": f"no: {why}"}
    return dict(sorted(found.items()))


def page() -> str:
    """The text of `docs/supported_models.md`."""
    rows = [
        f"| `{name}` | " + " | ".join(verdicts[method] for method in METHODS) + " |"
        for name, verdicts in supported_models().items()
        if name not in UNSUPPORTED
    ]
    without = [
        f"| `{name}` | {why} | {supported_models()[name]['mixed_rank']} |" for name, why in sorted(UNSUPPORTED.items())
    ]
    return _HEAD + "\n".join(rows) + _WITHOUT + "\n".join(without) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}: {len(supported_models())} types\n")
