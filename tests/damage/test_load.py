"""A day in the life of one process: nothing grows while it tunes, saves, reloads, generates and runs programs.

`--load` says how much of that day: 1, by `make test-load`, is 500 fine-tunings, 10,000 calls of generate and 2,000 programs.
"""

import ctypes
import gc
import os
import random
import threading
from itertools import cycle
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from hf_qst_plugins.adaptive_temperature import AdaptiveTemperatureLogitsProcessor, VocabularyTable
from hf_qst_plugins.code_evaluation import Limits, Sandbox
from tests.architectures import VOCAB
from tests.conformance.methods import IDS, LINES, logits, small
from tests.toy_data import token_dataset
from tests.trainers import plain_trainer

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count")
MIB = 1 << 20


@pytest.fixture
def load(request):
    return request.config.getoption("--load")


class Held:
    """What this process holds: file descriptors, threads, live tensors, and bytes of memory."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.descriptors = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _open(fd))
        self.threads = threading.active_count(), len(os.listdir("/proc/self/task"))
        self.tensors = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
        self.bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _open(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def require_no_growth(work, count: int, mebibytes: float) -> None:
    """Do `work(i)` `count` times; what is held after the first fifth is all that is held at the end."""
    start = max(5, count // 5)
    for i in range(start):
        work(i)
    before = Held()
    for i in range(start, count):
        work(i)
    after = Held()
    print(
        f"{count} times: {before.bytes / MIB:.1f} MiB after {start}, {after.bytes / MIB:.1f} MiB at the end; "
        f"{len(after.descriptors)} descriptors, {after.threads} threads, {after.tensors} tensors"
    )
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.tensors <= before.tensors
    assert after.bytes - before.bytes < mebibytes * MIB


def test_short_fine_tunings_with_saves_and_reloads(load, tmp_path):
    lines = cycle([LINES[name] for name in ("qst", "qst_tail", "mixed_rank", "disp")])
    data = token_dataset(8)

    def fine_tune(i):
        line = next(lines)
        trainer = plain_trainer(line.model(), tmp_path / "run", data, max_steps=2)
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(small(), tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(trainer.model))

    require_no_growth(fine_tune, max(13, int(500 * load)), 24)


def test_calls_of_generate_with_the_processor(load):
    model = LINES["qst"].random().eval()
    processor = AdaptiveTemperatureLogitsProcessor(VocabularyTable(["\n", " ", "if", "x"] * (VOCAB // 4)))

    def generate(i):
        torch.manual_seed(i)
        written = model.generate(
            input_ids=IDS[:, :4], attention_mask=torch.ones_like(IDS[:, :4]), do_sample=True, max_new_tokens=2,
            logits_processor=[processor], pad_token_id=0,
        )  # fmt: skip
        assert written.shape[1] >= 5

    require_no_growth(generate, max(50, int(10_000 * load)), 16)


HOSTILE = [
    "while True: pass",
    "import os\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass",
    "x = []\nwhile True: x.append(bytearray(64 << 20))",
    "import os, signal\nos.kill(0, signal.SIGKILL)",
    "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'passed\\n')\n    except OSError: pass\nos._exit(0)",
    "import os\nos.closerange(0, 1000)\nos._exit(0)",
    "i = 0\nwhile True:\n    open(f'f{i}', 'w').write('x' * 100_000)\n    i += 1",
    "import sys\nwhile True: sys.stdout.write('x' * 65536)",
    "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)\nos._exit(0)",
    "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
]
"""None of them may pass."""


def test_programs_one_in_a_hundred_hostile(load):
    """Every program gets the verdict that it has alone, whatever ran before it."""
    count = max(40, int(2000 * load))
    draw = random.Random(0)
    hostile = set(draw.sample(range(count), max(2, count // 100)))
    made = Sandbox(allow_execution=True, limits=Limits(wall_seconds=3, cpu_seconds=1))

    def run(i):
        if i in hostile:
            program = draw.choice(HOSTILE)
            assert made.run(program + "\nassert False").outcome != "passed", program
        else:
            right = i % 2 == 0
            program = f"def add(a, b):\n    return a + b\nassert add({i}, 1) == {i + 1 if right else i}"
            assert made.run(program).outcome == ("passed" if right else "wrong")

    require_no_growth(run, count, 16)
