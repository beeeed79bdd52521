"""Programs that fail their tests and try to pass all the same, and correct ones that look like them."""

import time

import pytest

from hf_qst_plugins.code_evaluation import Limits, Sandbox, SandboxError

LIMITS = Limits(wall_seconds=4, cpu_seconds=2)
STARTED = pytest.mark.parametrize("isolation", ["namespaces", "guard"])

REPLACING = {
    "json.dumps": "import json\njson.dumps = lambda *a, **k: '{\"raised\": []}'",
    "json.loads": "import json\njson.loads = lambda *a, **k: {'passed': True, 'raised': []}",
    "os.write": "import os\nwrite = os.write\nos.write = lambda fd, data: write(fd, data[:32])",
    "os._exit": "import os\nos._exit = lambda code: None",
    "os.getpid": "import os\nos.getpid = lambda: 1",
    "os.fdopen": "import os, sys\nos.fdopen = lambda *a: None\nsys.stdout = sys.stderr = None",
    "sys.exc_info": "import sys\nsys.exc_info = lambda: (None, None, None)",
    "every builtin": "import builtins\nfor name in dir(builtins):\n    if name not in ('setattr', 'dir'):\n"
    "        setattr(builtins, name, lambda *a, **k: True)",
    "exception classes": "import builtins\nclass Never(Exception): pass\n"
    "builtins.BaseException = builtins.Exception = builtins.AssertionError = Never",
    "everything of the caller": "import __main__\nfor name in list(vars(__main__)):\n"
    "    setattr(__main__, name, lambda *a, **k: b'passed')",
    "everything of os": "import os, posix\nfor module in (os, posix):\n    for name in list(vars(module)):\n"
    "        setattr(module, name, lambda *a, **k: b'passed')",
    "sys.modules": "import sys\nsys.modules.clear()",
}
ENDING = {
    "exit 0": "raise SystemExit(0)",
    "sys.exit": "import sys\nsys.exit()",
    "_exit": "import os\nos._exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "excepthook": "import sys\nsys.excepthook = sys.unraisablehook = lambda *a: None",
    "signals": "import os, signal\nfor number in range(1, 64):\n"
    "    try: signal.signal(number, lambda *a: os._exit(0))\n    except (OSError, ValueError): pass",
    "a timer": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile True: pass",
    "a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
}
RAISING = {
    "a false class": "class Lie(Exception):\n    __class__ = type(None)\nraise Lie",
    "a false class by property": "class Lie(Exception):\n    __class__ = property(lambda self: int)\nraise Lie",
    "a false metaclass": "class Meta(type):\n    __mro__ = ()\n    __name__ = property(lambda cls: 1 / 0)\n"
    "    def mro(cls): return [cls, Exception, BaseException, object]\n"
    "    def __eq__(cls, other): return True\n    def __hash__(cls): return 0\n"
    "    def __instancecheck__(cls, other): return False\n"
    "class Lie(Exception, metaclass=Meta): pass\nraise Lie",
    "a false text": "class Lie(Exception):\n    def __str__(self): return 'passed\\n{\"raised\": []}'\nraise Lie",
    "a text that exits": "import os\nclass Lie(Exception):\n    def __str__(self): os._exit(0)\nraise Lie",
    "a text that raises": "class Lie(Exception):\n    def __str__(self): raise SystemExit(0)\n    __repr__ = __str__\nraise Lie",
    "a text that is none": "class Lie(Exception):\n    def __str__(self): return None\nraise Lie",
    "a text that never ends": "class Lie(Exception):\n    def __str__(self):\n        while True: pass\nraise Lie",
    "a long text": "class Lie(Exception):\n    def __str__(self): return 'x' * 100_000_000\nraise Lie",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "what setting up would raise": "raise OSError('no namespaces')",
}
SEARCH = """
import os, sys
seen, found = set(), []
def walk(value, depth):
    if id(value) in seen or depth > 6: return
    seen.add(id(value))
    if isinstance(value, bytes) and len(value) >= 16: found.append(value)
    parts = []
    if isinstance(value, dict): parts += [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)): parts += value
    for name in ('f_locals', 'f_globals', 'f_builtins', 'f_code', 'f_back', 'co_consts', '__closure__', '__defaults__',
                 '__kwdefaults__', '__dict__', '__self__', '__func__', '__code__', 'cell_contents', 'tb_frame', 'args'):
        try: parts.append(getattr(value, name))
        except Exception: pass
    for part in parts: walk(part, depth + 1)
sys.setrecursionlimit(100_000)
frame = sys._getframe()
while frame is not None:
    walk(frame, 0)
    frame = frame.f_back
try: __import__('ctypes')
except ImportError as error:
    trace = error.__traceback__
    while trace is not None:
        walk(trace.tb_frame, 0)
        trace = trace.tb_next
for secret in found:
    try: os.write(3, secret)
    except OSError: pass
"""
LOOKING = {
    "frames": SEARCH,
    "frames alone": SEARCH + "\nos._exit(0)",
    "gc.get_objects": "import gc\nfound = gc.get_objects()",
    "gc.get_referents": "import gc, sys\nfound = gc.get_referents(sys._getframe(1))",
    "gc.get_referrers": "import gc, os\nfound = gc.get_referrers(os.getpid)",
    "ctypes": "import ctypes\nctypes.string_at(id(object()), 16)",
    "ctypes by a name that lies": "class Name(str):\n    __eq__ = lambda *a: False\n    __hash__ = str.__hash__\n"
    "    startswith = partition = lambda *a: ('', '', '')\n__import__(Name('ctypes')).string_at(0)",
    "a profiler": "import sys\nsys.setprofile(lambda frame, event, value: None)",
    "its own memory": "open('/proc/self/mem', 'rb')",
    "its own memory from there": "import os\nos.chdir('/proc/self')\nopen('mem', 'rb')",
    "its own descriptors": "import os\nos.open('/proc/self/fd/3', os.O_RDONLY)",
    "another interpreter": "try: import _xxsubinterpreters as other\nexcept ImportError: import _interpreters as other\n"
    "other.create()",
    "monitoring": "import sys\nsys.monitoring.use_tool_id(1, 'x')\n"
    "sys.monitoring.register_callback(1, sys.monitoring.events.CALL, print)",
    "a jump over the test": "import sys\ndef trace(frame, event, value):\n    if event == 'line': frame.f_lineno = 8\n"
    "    return trace\nsys._getframe().f_trace = trace\nsys.settrace(trace)\n",
    "a jump in the caller": "import sys\ndef trace(frame, event, value):\n    return trace\n"
    "frame = sys._getframe()\nwhile frame:\n    frame.f_trace = trace\n    frame = frame.f_back\nsys.settrace(trace)",
}
EACH = "import os\nfor fd in range(3, 64):\n    try: {}\n    except OSError: pass\n"
MOVING = {
    "closing": "import os\nos.closerange(0, 256)",
    "seeking": EACH.format("os.lseek(fd, 1 << 40, 0)"),
    "seeking and writing": EACH.format("os.lseek(fd, 1 << 40, 0); os.write(fd, b'x')"),
    "truncating": EACH.format("os.ftruncate(fd, 1 << 40)"),
    "writing": EACH.format('os.write(fd, b\'passed\\n{"raised": [], "passed": true}\')'),
    "sending a file": "open('f', 'w').write('passed' * 100)\nfile = open('f')\n"
    + EACH.format("os.sendfile(fd, file.fileno(), 0, 600)"),
    "another pipe in its place": "import os\nreader, writer = os.pipe()\nos.dup2(writer, 3)",
    "its null device in its place": "import os\nos.dup2(0, 3)",
    "many copies": "import os\nfor _ in range(50): os.dup(3)",
    "filling": "import os\nos.set_blocking(3, False)\ntry:\n    while True: os.write(3, b'x' * 4096)\n"
    "except BlockingIOError: pass",
    "filling for ever": "import os\nwhile True: os.write(3, b'x' * 4096)",
    "a thread that fills": "import os, threading, time\ndef fill():\n    while True: os.write(3, b'wrong')\n"
    "threading.Thread(target=fill, daemon=True).start()\ntime.sleep(0.05)",
}
FORKING = {
    "guessing in forks": "import os, time\ndef guess():\n    for number in range(4):\n        if os.fork() == 0: return number\n"
    "    time.sleep(0.5)\n    return -1\nassert guess() == 3",
    "a fork goes on": "import os\nif os.fork():\n    os._exit(0)",
    "a fork writes": "import os, time\nif os.fork() == 0:\n    for _ in range(100):\n        os.write(3, b'passed')\n"
    "    os._exit(0)\ntime.sleep(0.1)",
    "a fork waits for the end": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)",
    "another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', ''])",
    "its parent is killed": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "its parent is stopped": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
    "names of its callers": "import sys\nframe = sys._getframe()\nwhile frame:\n    for name in list(frame.f_locals):\n"
    "        try: frame.f_locals[name] = lambda *a: 1\n        except Exception: pass\n    frame = frame.f_back",
    "its group is killed": "import os, signal\nos.killpg(0, signal.SIGKILL)",
}
CHEATS = {**REPLACING, **ENDING, **RAISING, **LOOKING, **MOVING, **FORKING}


def sandbox(isolation, limits=LIMITS):
    made = Sandbox(allow_execution=True, limits=limits, isolation=isolation)
    try:
        made.run("")
    except SandboxError as error:
        pytest.skip(str(error))
    return made


@STARTED
@pytest.mark.parametrize("cheat", CHEATS)
def test_a_program_that_fails_its_test_does_not_pass(isolation, cheat):
    made, started = sandbox(isolation), time.perf_counter()
    outcome = made.run(CHEATS[cheat] + "\nassert 1 == 2\n")
    assert outcome.outcome not in ("passed", "syntax"), outcome
    assert len(outcome.detail) < 1000
    assert time.perf_counter() - started < LIMITS.wall_seconds + 6


@STARTED
def test_the_reports_channel_is_a_pipe_and_the_only_open_one(isolation):
    program = (
        "import os, stat\nopened = []\nfor fd in range(256):\n    try: opened.append((fd, os.fstat(fd).st_mode))\n"
    )
    program += "    except OSError: pass\nassert [fd for fd, _ in opened] == [0, 1, 2, 3]\n"
    program += "assert all(stat.S_ISCHR(mode) for _, mode in opened[:3]) and stat.S_ISFIFO(opened[3][1])\n"
    program += "try: os.read(3, 1)\nexcept OSError: pass\nelse: raise ValueError"
    assert sandbox(isolation).run(program).outcome == "passed"


def test_an_exception_is_told_by_its_true_class():
    made = sandbox("auto")
    lie = "class Lie(AssertionError):\n    __class__ = TypeError\nraise Lie('no')"
    assert made.run(lie)[:2] == ("wrong", "Lie: no")
    named = "class AssertionError(Exception): pass\nraise AssertionError('no')"
    assert made.run(named)[:2] == ("other", "AssertionError: no")


LOOPS = {
    "run": "async def one():\n    await asyncio.sleep(0)\n    return 1\nassert asyncio.run(one()) == 1",
    "new_event_loop": "async def one(): return 1\nloop = asyncio.new_event_loop()\n"
    "assert loop.run_until_complete(one()) == 1\nloop.close()",
    "gather": "async def double(x):\n    await asyncio.sleep(0.001)\n    return 2 * x\n"
    "async def all_of(): return await asyncio.gather(*map(double, range(20)))\n"
    "assert asyncio.run(all_of(), debug=True) == [2 * x for x in range(20)]",
    "queue and timeout": "async def main():\n    queue = asyncio.Queue()\n    asyncio.create_task(queue.put(3))\n"
    "    return await asyncio.wait_for(queue.get(), 1)\nassert asyncio.run(main()) == 3",
    "threads": "async def main(): return await asyncio.to_thread(sum, [1, 2])\nassert asyncio.run(main()) == 3",
    "in a thread": "import threading\nasync def one(): results.append(1)\nresults = []\n"
    "thread = threading.Thread(target=lambda: asyncio.run(one()))\nthread.start()\nthread.join()\nassert results == [1]",
    "a failing one": "async def one(): raise ValueError\ntry: asyncio.run(one())\nexcept ValueError: pass\nelse: assert 0",
}


@STARTED
@pytest.mark.parametrize("name", LOOPS)
def test_event_loops_run(isolation, name):
    outcome = sandbox(isolation).run("import asyncio\n" + LOOPS[name])
    assert outcome.outcome == "passed", outcome


@STARTED
@pytest.mark.parametrize(
    "program",
    [
        "import socket\none, two = socket.socketpair()\none.sendall(b'x')\none.sendmsg([b'y'])\nassert two.recv(2) == b'xy'",
        "import selectors, socket\none, two = socket.socketpair()\nselector = selectors.DefaultSelector()\n"
        "selector.register(one, selectors.EVENT_READ)\ntwo.send(b'x')\nassert selector.select(1)",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n"
        "    assert list(pool.map(abs, [-1] * 40)) == [1] * 40",
        "def f():\n    '''\n    >>> f()\n    1\n    '''\n    return 1\n"
        "import doctest\ndoctest.run_docstring_examples(f, globals())",
        "import collections, dataclasses, enum, inspect, logging, multiprocessing, traceback, typing, unittest, uuid\n"
        "uuid.uuid4()\nP = collections.namedtuple('P', 'x')\nassert P(1).x == 1\n"
        "try: 1 / 0\nexcept ZeroDivisionError: assert 'ZeroDivision' in traceback.format_exc()",
        "import gc\ngc.collect()\ngc.disable()",
    ],
)
def test_correct_programs_that_use_such_means_pass(isolation, program):
    outcome = sandbox(isolation).run(program)
    assert outcome.outcome == "passed", outcome


@STARTED
@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.socket(socket.AF_INET)",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/x')",
        "import socket\nsocket.socket(socket.AF_UNIX).bind('x')",
        "import socket\nsocket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', 'y')",
        "import socket\nsocket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendmsg([b'x'], [], 0, 'y')",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import asyncio\nasync def main(): await asyncio.open_connection('127.0.0.1', 22)\nasyncio.run(main())",
        "import asyncio\nasync def main(): await asyncio.open_unix_connection('/run/x')\nasyncio.run(main())",
    ],
)
def test_a_network_is_refused_all_the_same(isolation, program):
    outcome = sandbox(isolation).run(program)
    assert outcome.outcome == "other" and "PermissionError" in outcome.detail, outcome
