"""Functions with docstrings to complete: those of the standard library to learn from, HumanEval's problems as a test."""

from __future__ import annotations

import ast
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from examples.corpus import SourceFile
from hf_qst_plugins.code_evaluation import Problem, evaluate_together, read_samples

NEW_TOKENS, ROWS = 128, 82
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": NEW_TOKENS}


def documented_functions(files: Sequence[SourceFile]) -> Iterator[tuple[str, str]]:
    """(signature and docstring, body) of every function and method that has both, dedented, without decorators."""
    for file in files:
        lines = file.text.split("\n")
        for node in ast.walk(ast.parse(file.text)):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
                continue
            start = node.lineno - 1
            text = textwrap.dedent("\n".join(lines[start : node.end_lineno])).split("\n")
            split = node.body[0].end_lineno - start
            yield "\n".join(text[:split]) + "\n", "\n".join(text[split:]) + "\n"


def solved(model: nn.Module, tokenizer, problems: Sequence[Problem]) -> list[str]:
    """The problems whose tests the model's greedy completion passes."""
    workers = torch.get_num_threads()  # not a worker a core: several processes may measure at once
    with tempfile.TemporaryDirectory() as folder:
        settings = {"greedy": GREEDY}
        evaluate_together(model, tokenizer, problems, settings, folder, 1, ROWS, workers=workers, allow_execution=True)
        _, samples = read_samples(Path(folder) / "greedy.jsonl")
    return sorted(sample["task_id"] for sample in samples if sample["outcome"] == "passed")
