"""Records the outcome of the matrix of model types in benchmarks/results/architecture_matrix.json, and prints its tables.

    python -m pytest -m "" -p tests.record_matrix tests/hf_qst/test_architecture_matrix.py

With `-k` some types are tried; the outcomes that the file has of others stay. A verdict is what `supported_models()` says, where all
checks of that method passed, and otherwise which of them failed or were left out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_qst
from benchmarks.common.measure import ROOT, environment, write_json
from benchmarks.common.tables import markdown
from tests.popular_lines import BEFORE, LINES

PATH = ROOT / "benchmarks" / "results" / "architecture_matrix.json"
METHODS = {"qst": "side_tun|rotary", "disp": "pruned", "mixed_rank": "compressed"}
NAMES = {"qst": "QST", "disp": "DISP", "mixed_rank": "mixed rank"}
# Of 92 types of decoders that were tried with transformers 5.23 when the table had ten rows.
TYPES_BEFORE = {"tried": 92, "worked": 10}

_outcomes: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_runtest_logreport(report):
    found = re.search(r"test_architecture_matrix\.py::(\w+)\[(.+)\]$", report.nodeid)
    if found is None or (report.when != "call" and report.passed):
        return
    reason = f": {report.longrepr[2]}" if report.skipped else ""
    refused = dict(report.user_properties).get("refused")
    _outcomes[found[2]][found[1]] = f"refused: {refused}" if refused else report.outcome + reason


def verdict(kind: str, method: str, checks: dict[str, str]) -> str:
    """What holds for a type and a method, after its checks."""
    own = {name: outcome for name, outcome in checks.items() if re.search(METHODS[method], name)}
    refused = [outcome for outcome in own.values() if outcome.startswith("refused: ")]
    if refused:
        return f"no: {refused[0].removeprefix('refused: ')}"
    bad = [f"{name}: {outcome}" for name, outcome in own.items() if outcome != "passed"]
    if bad or not own:
        return "; ".join(bad) or "not tried"
    return hf_qst.supported_models()[kind][method]


def works(said: str) -> bool:
    return said == "yes" or said.startswith(("partly", "as its language model"))


def summary(types: dict[str, dict]) -> dict:
    """Of each line and method whether all its types work; of transformers' causal language models those with QST."""
    lines = {
        line: {method: [types[kind][method] if kind in types else "not tried" for kind in kinds] for method in METHODS}
        for line, kinds in LINES.items()
    }
    counts = {method: sum(all(map(works, said[method])) for said in lines.values()) for method in METHODS}
    causal = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in hf_qst.supported_models()]
    said = {kind: types.get(kind, hf_qst.supported_models()[kind]) for kind in causal}
    listed = {method: sum(works(row[method]) for row in said.values()) for method in METHODS}
    passed = {method: sum(works(row[method]) for row in types.values()) for method in METHODS}
    return {
        "lines": lines, "lines_that_work": counts, "types_tried": len(types), "types_that_work": passed,
        "causal_lm_types": len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "causal_lm_types_listed": listed,
        "before": {"types": TYPES_BEFORE, "lines": sorted(BEFORE)},
    }  # fmt: skip


def pytest_sessionfinish():
    old = json.loads(PATH.read_text()) if PATH.exists() else {"types": {}}
    where = environment(torch.device("cpu"))
    types = old["types"]
    for kind, checks in _outcomes.items():
        types[kind] = {"checks": {**types.get(kind, {}).get("checks", {}), **checks}, "commit": where["commit"]}
    for kind, row in types.items():
        types[kind] = row | {method: verdict(kind, method, row["checks"]) for method in METHODS}
    if _outcomes:
        write_json(PATH, {**where, "summary": summary(types), "types": dict(sorted(types.items()))})


def pytest_terminal_summary(terminalreporter):
    if not PATH.exists():
        return
    found = json.loads(PATH.read_text())["summary"]
    rows = [
        [line, "yes" if line in BEFORE else "no", *("; ".join(dict.fromkeys(said[method])) for method in METHODS)]
        for line, said in found["lines"].items()
    ]
    terminalreporter.write_line(markdown(["line", "before", *NAMES.values()], rows, text=5))
    for name in ("lines_that_work", "types_tried", "types_that_work", "causal_lm_types", "causal_lm_types_listed"):
        terminalreporter.write_line(f"{name}: {found[name]}")
