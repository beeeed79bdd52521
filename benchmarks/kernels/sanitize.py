"""The tests on the device, and NVIDIA's compute-sanitizer over every op's Triton kernels; stages of `--all`.

    python -m benchmarks.kernels.sanitize norm_gate     # what runs under the sanitizer: an op's examples

Each op runs its registry's examples, forward and backward, in float32 and bfloat16, in a process of its own for each
tool. `memcheck` finds accesses out of bounds (each tensor in an allocation of its own, without torch's caching),
`racecheck` two threads on one word of shared memory. Where the sanitizer is not installed the record says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.measure import ROOT, hashes_of, message, python_path
from benchmarks.common.tables import markdown
from benchmarks.kernels.compiled import sources
from benchmarks.kernels.registry import OPS
from benchmarks.kernels.timing import Rows, about
from hf_qst_kernels import use_backend

TOOLS = ("memcheck", "racecheck")
# Tests are started a few at a time: one that breaks the CUDA context fails all after it in its process. Each process
# takes seconds to start and to compile, and none is timed, so that many run at once.
TESTS = ("tests/kernels", "tests/hf_qst")
PYTEST = (sys.executable, "-m", "pytest", "-q", "--rootdir", ".")
PER_TEST, PER_TOOL = 200.0, 300.0
GROUP = 4
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))
# Seconds that what was begun may go on for after the end.
LATE = 10.0


def find_sanitizer() -> str | None:
    """compute-sanitizer: of `$COMPUTE_SANITIZER`, of the path, of a CUDA toolkit; `None` without one."""
    given = os.environ.get("COMPUTE_SANITIZER")
    found = given or shutil.which("compute-sanitizer")
    if found:
        return found
    roots = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *map(str, sorted(Path("/usr/local").glob("cuda-*")))]
    places = [Path(root) / part for root in roots for part in ("bin", "compute-sanitizer", "extras/compute-sanitizer")]
    return next((str(p / "compute-sanitizer") for p in places if (p / "compute-sanitizer").is_file()), None)


def errors_in(output: str) -> int | None:
    """
    The count of a tool's summary: `ERROR SUMMARY: N errors`, or `RACECHECK SUMMARY: N hazards displayed (...)`.

    Returns:
        `None` without a summary, which is no clean run.
    """
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    return sum(map(int, counts)) if counts else None


def run_op(name: str, device: str) -> int:
    """An op's examples through its Triton kernels, forward and backward; how many there were."""
    op = next(op for op in OPS if op.name == name)
    torch.manual_seed(0)
    count = 0
    for dtype in (torch.float32, torch.bfloat16):
        for _, arguments in op.examples(dtype, device):
            leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
            with use_backend("triton"), torch.set_grad_enabled(bool(leaves)):
                outputs = op.function(**arguments)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                if leaves:
                    torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return count


def sanitize_op(sanitizer: str, tool: str, name: str, limit: float) -> dict:
    """One row: errors counted, and the end of the output where there were some or no summary."""
    command = [sanitizer, "--tool", tool, "--print-limit", "5", sys.executable, "-m", "benchmarks.kernels.sanitize"]
    variables = {"PYTHONPATH": python_path(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    row = {"tool": tool, "op": name}
    started = time.time()
    try:
        done = finished([*command, name], variables, limit)
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"not through in {limit:.0f} s"}
    output = done.stdout + done.stderr
    row |= {"errors": errors_in(output), "returned": done.returncode, "seconds": round(time.time() - started, 1)}
    ran = re.search(r"ran (\d+) examples", output)
    row["examples"] = int(ran[1]) if ran else 0
    if row["errors"] is None:
        row["failed"] = "no summary"
    elif row["errors"] or done.returncode or not ran:
        row["failed"] = f"{row['errors']} errors, exit code {done.returncode}"
    if "failed" in row:
        row["output"] = output[-3000:]
    return row


def finished(command: list[str], variables: dict, limit: float, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """
    Run to the end, or end it with all that it started.

    Raises:
        subprocess.TimeoutExpired: after `limit` seconds.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, env={**os.environ, **variables}, cwd=folder, stdout=out, stderr=err, start_new_session=True
        )
        try:
            child.wait(limit)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.wait()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    return subprocess.CompletedProcess(command, child.returncode, *texts)


def tests_marked(marker: str, paths: list[str], root: Path) -> tuple[dict[str, list[str]], str | None]:
    """
    The tests with this marker, in groups of at most `GROUP` of one function.

    Returns:
        `file::function`, with a number where it has more groups than one -> pytest's names of its tests; and what
        pytest said if there are files that it could not collect.
    """
    command = [*PYTEST, "--collect-only", "-m", marker, *paths]
    done = finished(command, {"PYTHONPATH": python_path()}, PER_TEST, root)
    functions: dict[str, list[str]] = {}
    for name in re.findall(r"^\S+\.py::\w+.*$", done.stdout, flags=re.MULTILINE):
        functions.setdefault(name.split("[")[0], []).append(name)
    groups = {}
    for function, names in functions.items():
        parts = [names[i : i + GROUP] for i in range(0, len(names), GROUP)]
        groups |= {f"{function} {i + 1}" if len(parts) > 1 else function: part for i, part in enumerate(parts)}
    # 5: there are none
    return groups, None if done.returncode in (0, 5) else (done.stdout + done.stderr)[-3000:].strip()


def run_tests(name: str, tests: list[str], marker: str, limit: float, root: Path) -> dict:
    """One row: how many of a group's tests passed, failed and were skipped, and why the first failed."""
    row = {"tests": name}
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*PYTEST, "-m", marker, "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            # torch.compile without a pool of processes of its own: other tests run at the same time
            variables = {"PYTHONPATH": python_path(), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            done = finished([*command, *tests], variables, limit, root)
        except subprocess.TimeoutExpired:
            return {**row, "failed": f"not through in {limit:.0f} s"}
        row |= {"seconds": round(time.time() - started, 1), "returned": done.returncode}
        if not report.exists():
            return {**row, "failed": f"pytest ended with {done.returncode}", "output": done.stdout[-3000:]}
        cases = ElementTree.parse(report).getroot().iter("testcase")
    counts = {"passed": 0, "failures": 0, "skipped": 0}
    for case in cases:
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        kind = "failures" if wrong is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if wrong is not None and "failed" not in row:
            row["failed"] = f"{case.get('name')}: {(wrong.get('message') or '').splitlines()[:1]}"
            row["output"] = (wrong.text or "")[-3000:]
    return {**row, **counts}


def run_device_tests(
    output: Path, until: float = float("inf"), marker: str = "gpu", paths=TESTS, root: Path = ROOT
) -> dict:
    """The tests on the device; `left` lists those there was no time for.

    Args:
        paths: of the tests' folders or files, from `root`, where they are run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = [
        file
        for path in map(root.joinpath, (*paths, "hf_qst"))
        for file in [path, *path.rglob("*.py")]
        if file.is_file()
    ]
    report = {**about(device), "sources": {**sources("*.py"), **hashes_of(files, root)}, "rows": []}
    held = Rows.resumed(report, output, until)
    groups, broken = tests_marked(marker, list(paths), root)
    report["rows"] = [row for row in report["rows"] if row["tests"] in groups]
    if broken is not None:
        report["rows"].append({"tests": "collecting", "failed": "some files could not be collected", "output": broken})
    todo = {
        name: lambda limit, name=name: run_tests(name, groups[name], marker, limit, root)
        for name in groups
        if held.find({"tests": name}) is None
    }
    left = run_in_parallel(todo, held, PER_TEST, "tests")
    order = list(groups)
    report["rows"].sort(key=lambda row: order.index(row["tests"]) if row["tests"] in groups else -1)
    held.write()
    return {**report, "left": left}


def run_in_parallel(todo: dict[str, Callable[[float], dict]], held: Rows, longest: float, what: str) -> list[str]:
    """
    Add the row of each to the report and write it, `WORKERS` at a time.

    Args:
        todo: name -> function of the seconds it may take.
        longest: seconds that each may take if there is time.

    Returns:
        The names of those that there was no time for: not begun, or stopped for want of it, which says nothing.
    """

    def one(name: str) -> dict | None:
        limit = min(longest, held.until + LATE - time.time())
        row = todo[name](limit) if limit > LATE else None
        return None if row is None or (limit < longest and "not through" in row.get("failed", "")) else row

    left = []
    with ThreadPoolExecutor(WORKERS) as pool:
        running = {pool.submit(one, name): name for name in todo}
        for ended in tqdm(as_completed(running), total=len(running), desc=what):
            row = ended.result()
            if row is None:
                left.append(running[ended])
                continue
            held.add(row)
            held.write()
    return left


def sanitize(output: Path, until: float = float("inf"), ops: list[str] | None = None) -> dict:
    """Every op under every tool; `left` lists those there was no time for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sanitizer = find_sanitizer()
    report = {**about(device), "sources": sources("*.py"), "sanitizer": version(sanitizer), "rows": []}
    held = Rows.resumed(report, output, until)
    if sanitizer is None:
        report["rows"] = [{"tool": tool, "op": None, "failed": "compute-sanitizer not found"} for tool in TOOLS]
        held.write()
        return {**report, "left": []}
    # tried again where it was not installed or could not use the device, which another machine's may
    report["rows"] = [row for row in report["rows"] if row.get("errors") is not None or "not through" in row["failed"]]
    every = [(tool, op.name) for tool in TOOLS for op in OPS if ops is None or op.name in ops]
    todo = {
        f"{tool} {name}": lambda limit, tool=tool, name=name: sanitize_op(sanitizer, tool, name, limit)
        for tool, name in every
        if held.find({"tool": tool, "op": name}) is None
    }
    left = run_in_parallel(todo, held, PER_TOOL, "sanitizer")
    order = {pair: i for i, pair in enumerate(every)}
    report["rows"].sort(key=lambda row: order.get((row["tool"], row["op"]), 0))
    held.write()
    return {**report, "left": left}


def version(sanitizer: str | None) -> str | None:
    """The sanitizer's own word."""
    if sanitizer is None:
        return None
    try:
        shown = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return message(error)
    lines = [line for line in shown.stdout.splitlines() if "ersion" in line]
    return lines[0].strip() if lines else "unknown"


def tests_table(rows: list[dict]) -> str:
    """In Markdown: tests by function."""
    counts = ("passed", "failures", "skipped", "seconds")
    lines = [
        [f"{row['tests'].split('/')[-1]}{': ' + row['failed'] if 'failed' in row else ''}"]
        + [str(row.get(name, "")) for name in counts]
        for row in rows
    ]
    return markdown(["tests", "passed", "failed", "skipped", "s"], lines)


def sanitizer_table(rows: list[dict]) -> str:
    """In Markdown: errors by op and tool."""
    found = {(row["tool"], row["op"]): row.get("failed") or row["errors"] for row in rows}
    ops = dict.fromkeys(row["op"] for row in rows)
    return markdown(["op", *TOOLS], [[op or "all", *(str(found.get((tool, op), "")) for tool in TOOLS)] for op in ops])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=[op.name for op in OPS])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: Triton's interpreter")
    args = parser.parse_args()
    print(f"ran {run_op(args.op, args.device)} examples of {args.op}")


if __name__ == "__main__":
    main()
