"""The tests on the device, and NVIDIA's compute-sanitizer over every op's Triton kernels.

    python -m benchmarks.kernels_sanitize                     # both; writes results/kernels_sanitize_<chip>.json
    python -m benchmarks.kernels_sanitize --run nf4_linear    # what runs under the sanitizer: an op's examples

Each op runs its registry's examples, forward and backward, in float32 and bfloat16, in a process of its own for each
tool. `memcheck` finds accesses out of bounds (each tensor in an allocation of its own, without torch's caching),
`racecheck` two threads on one word of shared memory. Where the sanitizer is not found the record says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.kernels_compiled import sources
from benchmarks.kernels_timing import about, message
from benchmarks.measure import ROOT, write_json

RESULTS = Path(__file__).parent / "results"
TOOLS = ("memcheck", "racecheck")
# Tests are started function by function: one that breaks the CUDA context fails all after it in its process.
TESTS = ("tests/kernels", "tests/hf_qst")
PYTEST = (sys.executable, "-m", "pytest", "-q", "--rootdir", ".")
PER_TEST, PER_TOOL = 300.0, 300.0


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
    What a tool counted: of `ERROR SUMMARY: N errors`, or racecheck's `RACECHECK SUMMARY: N hazards displayed (...)`.

    Returns:
        `None` where it printed no summary, which is no clean run.
    """
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    return sum(map(int, counts)) if counts else None


def run_op(name: str, device: str) -> int:
    """An op's examples through its Triton kernels, forward and backward; how many there were."""
    from hf_qst_kernels import use_backend
    from hf_qst_kernels.registry import OPS
    from tests.kernels.compared import results

    op = next(op for op in OPS if op.name == name)
    torch.manual_seed(0)
    count = 0
    with use_backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            for _, arguments in op.examples(dtype, device):
                results(op.function, arguments)
                count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return count


def sanitize_op(sanitizer: str, tool: str, name: str, limit: float) -> dict:
    """One row: errors counted, and the end of the output where there were some or no summary."""
    command = [sanitizer, "--tool", tool, "--print-limit", "5", sys.executable, "-m", "benchmarks.kernels_sanitize"]
    variables = {"PYTHONPATH": python_path(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    row = {"tool": tool, "op": name}
    started = time.time()
    try:
        done = finished([*command, "--run", name], variables, limit)
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


def python_path() -> str:
    """Where this project's packages lie, before what was set."""
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])


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


def functions_marked(marker: str, paths: list[str], root: Path) -> list[str]:
    """`file::function` of the tests with this marker."""
    command = [*PYTEST, "--collect-only", "-m", marker, *paths]
    listed = finished(command, {"PYTHONPATH": python_path()}, PER_TEST, root).stdout
    return list(dict.fromkeys(re.findall(r"^(\S+\.py::\w+)", listed, flags=re.MULTILINE)))


def run_tests(function: str, marker: str, limit: float, root: Path) -> dict:
    """One row: how many of a function's tests passed, failed and were skipped, and why the first failed."""
    row = {"tests": function}
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*PYTEST, "-m", marker, "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            done = finished([*command, function], {"PYTHONPATH": python_path()}, limit, root)
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


def resumed(path: Path, report: dict, key: Callable[[dict], tuple]) -> tuple[dict, set]:
    """The report with the rows that its file holds of the same sources, and their keys."""
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(name) == report[name] for name in ("sources", "machine")):
            report["rows"] = before["rows"]
    return report, {key(row) for row in report["rows"]}


def run_device_tests(
    output: Path, until: float = float("inf"), marker: str = "gpu", paths=TESTS, root: Path = ROOT
) -> dict:
    """The tests on the device; `left` lists those there was no time for.

    Args:
        paths: of the tests' folders or files, from `root`, where they are run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {**about(device), "sources": {**sources("*.py"), **hashes_of(paths, root)}, "rows": []}
    report, done = resumed(output, report, lambda row: (row["tests"],))
    left = []
    for function in tqdm(functions_marked(marker, list(paths), root), desc="tests", unit="function"):
        if (function,) in done:
            continue
        if time.time() >= until:
            left.append(function)
            continue
        limit = min(PER_TEST, max(30.0, until - time.time()))
        row = run_tests(function, marker, limit, root)
        if limit < PER_TEST and "not through" in row.get("failed", ""):
            left.append(function)  # stopped for want of time, which says nothing
            continue
        report["rows"].append(row)
        write_json(output, report)
    write_json(output, report)
    return {**report, "left": left}


def hashes_of(paths, root: Path) -> dict[str, str]:
    """Hashes of the tests' own files."""
    import hashlib

    files = [
        file for path in paths for file in ([root / path] if (root / path).is_file() else (root / path).glob("*.py"))
    ]
    return {f"tests/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def sanitize(output: Path, until: float = float("inf"), ops: list[str] | None = None) -> dict:
    """Every op under every tool; `left` lists those there was no time for."""
    from hf_qst_kernels.registry import OPS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sanitizer = find_sanitizer()
    report = {**about(device), "sources": sources("*.py"), "sanitizer": version(sanitizer), "rows": []}
    report, done = resumed(output, report, lambda row: (row["tool"], row.get("op")))
    left = []
    if sanitizer is None:
        report["rows"] = [{"tool": tool, "op": None, "failed": "compute-sanitizer not found"} for tool in TOOLS]
        write_json(output, report)
        return {**report, "left": left}
    report["rows"] = [row for row in report["rows"] if row["op"] is not None]  # it was not found before
    every = [(tool, op.name) for tool in TOOLS for op in OPS if ops is None or op.name in ops]
    for tool, name in tqdm(every, desc="sanitizer", unit="op"):
        if (tool, name) in done:
            continue
        if time.time() >= until:
            left.append(f"{tool} {name}")
            continue
        limit = min(PER_TOOL, max(30.0, until - time.time()))
        row = sanitize_op(sanitizer, tool, name, limit)
        if limit < PER_TOOL and "not through" in row.get("failed", ""):
            left.append(f"{tool} {name}")
            continue
        report["rows"].append(row)
        write_json(output, report)
    write_json(output, report)
    return {**report, "left": left}


def version(sanitizer: str | None) -> str | None:
    """What it says of itself."""
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
    lines = ["| tests | passed | failed | skipped | s |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        cells = [str(row.get(name, "")) for name in ("passed", "failures", "skipped", "seconds")]
        lines.append(f"| {row['tests'].split('/')[-1]}{': ' + row['failed'] if 'failed' in row else ''} | "
                     f"{' | '.join(cells)} |")  # fmt: skip
    return "\n".join(lines)


def sanitizer_table(rows: list[dict]) -> str:
    """In Markdown: errors by op and tool."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    found = {(row["tool"], row["op"]): row.get("failed") or row["errors"] for row in rows}
    lines = [f"| op | {' | '.join(TOOLS)} |", f"| --- | {' | '.join(['---:'] * len(TOOLS))} |"]
    for op in ops:
        lines.append(f"| {op or 'all'} | {' | '.join(str(found.get((tool, op), '')) for tool in TOOLS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None, metavar="OP", help="only run this op's examples, in this process")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="with --run; cpu: the interpreter")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.run is not None:
        print(f"ran {run_op(args.run, args.device)} examples of {args.run}")
        return
    if not torch.cuda.is_available():
        parser.error("the kernels run on a CUDA device, and torch finds none")
    from hf_qst_kernels.break_even import chip_of

    chip = chip_of(torch.cuda.get_device_name())
    print(tests_table(run_device_tests(args.output_dir / f"kernels_tests_{chip}.json")["rows"]))
    print(sanitizer_table(sanitize(args.output_dir / f"kernels_sanitize_{chip}.json")["rows"]))


if __name__ == "__main__":
    main()
