"""Nothing but safetensors and JSON is read, nothing is executed, and nothing is asked of a network."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [file for part in ("hf_qst", "kernels", "plugins") for file in (ROOT / part).rglob("*.py")]
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    "exec",
    "eval",
    "compile",
    "__import__",
    "torch.load",
    "numpy.load",
    "np.load",
    "os.system",
    "yaml.load",
}
ALLOWED = {
    ("sandbox/confined_process.py", "exec"): "runs a generated program, in a confined process",
    ("sandbox/confined_process.py", "compile"): "the same",
    ("sandbox/confined_process.py", "__import__"): "the same",
    ("problems/generated.py", "exec"): "runs the package's own templates of problems",
}
"""Where one of them is right, by the end of the path, with the reason."""


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(source: str):
    """(what, line) of every forbidden import, call and argument."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((name, node.lineno) for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            if name in FORBIDDEN_CALLS:
                yield name, node.lineno
            for argument in node.keywords:
                value = argument.value.value if isinstance(argument.value, ast.Constant) else None
                if (argument.arg, value) in (("shell", True), ("trust_remote_code", True), ("weights_only", False)):
                    yield f"{argument.arg}={value}", node.lineno


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("from marshal import loads", "marshal"),
        ("torch.load(path)", "torch.load"),
        ("x = eval(text)", "eval"),
        ("subprocess.run(c, shell=True)", "shell=True"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code=True"),
        ("model.eval()", None),
        ("re.compile(text)", None),
    ],
)
def test_the_search_finds_what_it_looks_for(source, found):
    assert [what for what, _ in uses(source)] == ([found] if found else [])


def test_the_package_reads_no_pickle_and_executes_no_text():
    assert len(SOURCES) > 100
    found = [(str(file.relative_to(ROOT)), *use) for file in SOURCES for use in uses(file.read_text(encoding="utf-8"))]
    allowed = [
        next(((end, what) for end, what in ALLOWED if file.endswith(end) and what == use), None)
        for file, use, _ in found
    ]
    wrong = [use for use, reason in zip(found, allowed, strict=True) if reason is None]
    assert not wrong, wrong
    assert set(allowed) <= set(ALLOWED)


WORK = """
import os, socket, sys, tempfile
asked = []

def refuse(*arguments, **named):
    asked.append(repr(arguments)[:100])
    raise OSError("the network is cut")

connect = socket.socket.connect
def guarded(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

socket.getaddrinfo, socket.socket.connect = refuse, guarded
try:
    socket.create_connection(("example.org", 80))
except OSError:
    pass
assert len(asked) == 1, "the guard does not see a request"
asked.clear()

import hf_qst
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from tests.conformance.methods import LINES, small
from tests.plugins.code_tokenizers import tokenizer
from hf_qst import AdaptiveTemperatureLogitsProcessor

folder = tempfile.mkdtemp()
small().save_pretrained(folder + "/base")
base = lambda: AutoModelForCausalLM.from_pretrained(folder + "/base")
for name in ("qst", "disp", "mixed_rank"):
    line = LINES[name]
    model = line.random(base())
    model.save_pretrained(f"{folder}/{name}")
    PeftModel.from_pretrained(base(), f"{folder}/{name}")
    AutoPeftModelForCausalLM.from_pretrained(f"{folder}/{name}")
    if name != "qst":
        model.merge_and_unload().save_pretrained(f"{folder}/small")
        AutoModelForCausalLM.from_pretrained(f"{folder}/small")
AdaptiveTemperatureLogitsProcessor(tokenizer("gpt2"))
print(asked)
"""


def test_work_on_local_folders_asks_nothing_of_a_network(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_QST_CACHE": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "plugins"))
    run = subprocess.run([sys.executable, "-c", WORK], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "[]", run.stdout
