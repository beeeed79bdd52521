"""The sandbox, on programs that try what generated programs may do. Each runs under both kinds of isolation."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hf_qst_plugins.code_evaluation import OUTCOMES, ExecutionNotAllowedError, Limits, Sandbox, SandboxError
from hf_qst_plugins.code_evaluation import sandbox as sandbox_module
from hf_qst_plugins.code_evaluation.sandbox.run_folder import run_folder

LIMITS = Limits(wall_seconds=4, cpu_seconds=2)
STARTED = pytest.mark.parametrize("isolation", ["namespaces", "guard"])


def sandbox(isolation, limits=LIMITS):
    made = Sandbox(allow_execution=True, limits=limits, isolation=isolation)
    if isolation == "namespaces":
        try:
            made.run("")
        except SandboxError as error:
            pytest.skip(str(error))
    return made


@pytest.fixture
def outside():
    """A folder that everybody may write to, and not below /tmp, which namespaces hide."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@STARTED
def test_outcomes_are_told_apart(isolation):
    programs = {
        "import math, json, re, collections, dataclasses\nassert math.sqrt(4) == 2": "passed",
        "assert 1 + 1 == 3": "wrong",
        "def f(:": "syntax",
        "  x = 1\n y = 2": "syntax",
        "x = 1\0": "syntax",
        "undefined": "name",
        "1 + ''": "type",
        "int('x')": "other",
        "def f(): f()\nf()": "other",
        "'\\ud800'.encode()": "other",
        "class Odd(AssertionError): pass\nraise Odd": "wrong",
        "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd": "other",
        "class Odd(BaseException): pass\nraise Odd": "other",
    }
    outcomes = [result.outcome for result in sandbox(isolation).run_all(programs, workers=2)]
    assert outcomes == list(programs.values())
    assert set(outcomes) <= set(OUTCOMES)


@STARTED
@pytest.mark.parametrize(
    ("program", "outcomes"),
    [
        ("while True: pass", {"timeout"}),
        ("import time\ntime.sleep(60)", {"timeout"}),
        ("import os\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass", {"timeout", "other"}),
        ("import os\nwhile True: os.fork()", {"timeout", "other"}),
        ("x = bytearray(10 << 30)", {"memory"}),
        ("x = []\nwhile True: x.append(bytes(64 << 20))", {"memory"}),  # touches no page, which can take long
        ("i = 0\nwhile True:\n    open(f'f{i}', 'w').write('x' * 100_000)\n    i += 1", {"other"}),
        ("i = 0\nwhile True:\n    open(f'f{i}', 'w')\n    i += 1", {"other"}),
        ("file = open('f', 'wb')\nwhile True: file.write(b'x' * 65536)", {"other"}),
        ("import socket\nsocket.create_connection(('1.1.1.1', 53), 60)", {"other"}),
        ("import socket\nsocket.socket().connect(('127.0.0.1', 22))", {"other"}),
        ("import urllib.request\nurllib.request.urlopen('http://1.1.1.1')", {"other"}),
        ("import os, signal\nos.kill(0, signal.SIGKILL)", {"killed", "other"}),
        ("import ctypes\nctypes.string_at(0)", {"killed", "other"}),
        ("input()", {"other"}),
    ],
)
def test_what_does_not_end_well_is_a_counted_failure(isolation, program, outcomes):
    started = time.perf_counter()
    assert sandbox(isolation).run(program).outcome in outcomes
    assert time.perf_counter() - started < 15
    assert sandbox(isolation).run("assert True").outcome == "passed"


@STARTED
@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos.closerange(0, 1000)",
        'import os\nfor fd in range(1, 64):\n    try: os.write(fd, b\'passed\\n{"raised": []}\\n{"ended": 0}\')\n'
        "    except OSError: pass\nos._exit(0)",
        "import os\nif os.fork():\n    os._exit(0)",
        "import threading, os\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
        "import sys\nsys.settrace(lambda *_: sys.exit(0))\ndef f(): pass\nf()",
    ],
)
def test_ending_before_the_tests_is_no_pass(isolation, program):
    assert sandbox(isolation).run(program + "\nassert False").outcome in {"killed", "other"}


@STARTED
def test_output_and_leftover_threads_do_no_harm(isolation):
    program = "import sys, threading, time\nprint('x' * 10_000_000)\nsys.stderr.close()\nsys.stdout.close()\n"
    program += "threading.Thread(target=time.sleep, args=(60,)).start()"
    result = sandbox(isolation).run(program)
    assert result.outcome == "passed" and result.seconds < 3


@STARTED
def test_nothing_is_written_outside_the_programs_folder(isolation, outside):
    target = outside / "kept"
    target.write_text("before")
    os.chmod(target, 0o666)
    attempts = [
        f"open({str(outside / 'new')!r}, 'w')",
        f"open({str(target)!r}, 'a').write('x')",
        f"import os\nos.remove({str(target)!r})",
        f"import os\nos.rename({str(target)!r}, 'mine')",
        f"import os\nos.mkdir({str(outside / 'folder')!r})",
        f"import os\nos.chmod({str(target)!r}, 0)",
        f"import os\nos.truncate({str(target)!r}, 0)",
        f"import os\nos.symlink({str(target)!r}, 'link')\nopen('link', 'w')",
        f"import shutil\nshutil.rmtree({str(outside)!r})",
        "open('../up', 'w')",
    ]
    made = sandbox(isolation)
    assert {made.run(attempt).outcome for attempt in attempts} == {"other"}
    assert target.read_text() == "before" and [path.name for path in outside.iterdir()] == ["kept"]


@STARTED
def test_its_own_folder_is_usable_new_each_time_and_gone(isolation):
    program = "import os, tempfile\nassert os.listdir() == []\nopen('mine', 'w').write('x')\nos.mkdir('sub')\n"
    program += "with tempfile.NamedTemporaryFile('w') as file: file.write('x')\nraise ValueError(os.getcwd())"
    made = sandbox(isolation)
    details = [made.run(program).detail for _ in range(2)]
    assert all(detail.startswith("ValueError: /") for detail in details)
    assert not any(Path(detail.removeprefix("ValueError: ")).exists() for detail in details)


@STARTED
def test_the_environment_and_packages_of_the_caller_are_not_there(isolation, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    made = sandbox(isolation)
    assert made.run("import os\nassert 'API_KEY' not in os.environ").outcome == "passed"
    assert made.run("import torch").detail.startswith("ModuleNotFoundError")


def test_hash_order_is_the_same_in_every_run():
    made = sandbox("auto")
    assert len({made.run("raise ValueError(str(set('abcdefghijk')))").detail for _ in range(4)}) == 1


def _sandbox_processes() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"confined_process.py" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc to see processes")
def test_no_process_of_a_program_outlives_it():
    program = (
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)\n"
    )
    made, before = sandbox("namespaces"), _sandbox_processes()
    assert made.run(program).outcome == "passed"
    assert made.run(program + "time.sleep(600)").outcome == "timeout"
    # Other runs on this machine start processes of that name too, but theirs end: ours would sleep for minutes.
    left, deadline = _sandbox_processes() - before, time.monotonic() + 20
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left &= _sandbox_processes()
    assert not left


def test_namespaces_hide_the_host_and_cannot_be_undone():
    made = sandbox("namespaces")
    assert made.run("import os\nassert os.listdir('/proc') == [] and os.listdir('/tmp/work') == []").outcome == "passed"
    assert made.run("import os\nassert os.geteuid() != 0\nos.setuid(0)").outcome == "other"


KERNEL = """
import ctypes, os, sys
sys.path.insert(0, {folder!r})
import confined_process
confined_process.enter_namespaces(1 << 20)
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
confined_process.drop_privileges(confined_process.FIRST_UID)
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x10000000 | 0x20000)
assert libc.mount(b"none", b"/", None, 32 | 4096, None) == -1
for path in ("/tmp/lib/os.py", "/etc/new", "/tmp/new"):
    try: open(path, "a")
    except OSError: continue
    raise SystemExit(path)
open("mine", "w").write("x")
"""


def test_the_kernel_holds_native_code_too():
    """Without the guard inside the interpreter, which refuses native code before."""
    sandbox("namespaces")
    code = KERNEL.format(folder=str(Path(sandbox_module.__file__).parent))
    done = subprocess.run([sys.executable, "-S", "-s", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def folders():
    return {path for path in Path(tempfile.gettempdir()).glob("hf_qst_*") if path.is_dir()}


WAIT = "import os\nos.mkdir('d')\nopen('d/f', 'w').write('x')\nos.chmod('d', 0)\nopen('started', 'w')\nwhile True: pass"
EVALUATOR = """
import sys
from hf_qst_plugins.code_evaluation import Limits, Sandbox
limits = Limits(wall_seconds=60, cpu_seconds=60)
Sandbox(allow_execution=True, isolation="guard", limits=limits).run({program!r})
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, new and for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed_evaluator(temporary):
    """Start an evaluation, and kill it as soon as its program runs."""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", EVALUATOR.format(program=WAIT)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not list(temporary.glob("hf_qst_run_*/started")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert folders()
    finally:
        process.kill()
        process.wait()


def test_an_evaluation_that_is_killed_takes_program_and_folder_with_it(temporary):
    killed_evaluator(temporary)
    deadline = time.monotonic() + 20
    while folders() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folders()


def test_what_a_killed_evaluation_left_is_removed_by_the_next(temporary):
    abandoned = temporary / "hf_qst_run_abandoned"
    (abandoned / "shut").mkdir(parents=True)
    (abandoned / "shut" / "file").write_text("x")
    (abandoned / "shut").chmod(0)
    abandoned.chmod(0)
    other = temporary / "hf_qst_run_file"
    other.write_text("not a folder")
    with run_folder() as used:
        Sandbox(allow_execution=True, isolation="guard")
        assert folders() == {Path(used)} and other.exists()
    assert not folders()


def test_namespaces_leave_no_folder_to_remove(temporary):
    made = sandbox("namespaces")
    assert made.run("open('f', 'w').write('x')").outcome == "passed"
    assert list(temporary.iterdir()) == []


def test_results_come_in_the_order_of_the_programs():
    programs = ["import time\ntime.sleep(0.5)", "assert 0", "", "undefined"]
    outcomes = [result.outcome for result in sandbox("auto").run_all(programs, workers=4)]
    assert outcomes == ["passed", "wrong", "passed", "name"]


@pytest.mark.parametrize("value", [False, None, 1, "yes"])
def test_execution_must_be_asked_for(value):
    with pytest.raises(ExecutionNotAllowedError, match="allow_execution=True"):
        Sandbox(allow_execution=value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Limits(wall_seconds=0), ["Limits.wall_seconds", "0"]),
        (lambda: Limits(memory_bytes=1.5), ["Limits.memory_bytes", "1.5"]),
        (lambda: Sandbox(allow_execution=True, isolation="vm"), ["isolation", "'vm'", "'guard'"]),
        (lambda: Sandbox(allow_execution=True, isolation="guard").run(b"x"), ["source", "bytes"]),
        (lambda: list(Sandbox(allow_execution=True, isolation="guard").run_all([""], 0)), ["workers", "0"]),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)
