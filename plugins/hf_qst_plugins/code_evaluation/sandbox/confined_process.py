"""The sandbox's process: confines itself, executes one program in a child process, and judges it.

`Sandbox` starts this file as a script in a new interpreter without site packages. Standard input carries the job as one
line of JSON and stays open while the evaluator lives. Standard output carries the verdict as JSON: `{"setup": reason}` if
nothing was run, else `{"ended": status, "passed": bool, "kind": ..., "detail": ...}`.

There are three processes, and each dies with its parent: this one, in a session of its own; the first process of a new
PID namespace, whose end kills every process in it (with namespaces); and the program. The program has none of the
evaluator's descriptors, only the writing end of a pipe to this process. Only a random secret in that pipe is a pass.
"""

import ctypes
import errno
import json
import os
import resource
import select
import signal
import sys
import types

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4
SYS_MOUNT_SETATTR, SYS_CAPSET = 442, {"x86_64": 126, "aarch64": 91}
AT_FDCWD, AT_RECURSIVE, O_PATH = -100, 0x8000, 0o10000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
# Each run gets its own user id, far from real ones: RLIMIT_NPROC counts per user and does not bind root.
FIRST_UID = 0x70000000
# Folders with Unix sockets, with files of other processes, and the host's shared memory. They are empty inside.
HIDDEN = ("/proc", "/run", "/dev/shm")
FOLDER = "/tmp/work"
LIBRARY = "/tmp/lib"

# Ways for a program to reach its caller's frames, or to skip its own tests.
INSPECTION_EVENTS = ("gc.get_", "sys.settrace", "sys.setprofile", "sys.monitoring", "ctypes.")
INSPECTION_EVENTS += ("cpython.PyInterpreterState_New",)
# Native code and other interpreters, which audit hooks do not see (Python 3.13 has no event for them).
REFUSED_MODULES = ("ctypes", "_ctypes", "_testcapi", "_testinternalcapi", "_testlimitedcapi")
REFUSED_MODULES += ("_xxsubinterpreters", "_interpreters", "_xxinterpchannels", "_interpchannels")
PROC_DEVICE = os.stat("/proc").st_dev if os.path.isdir("/proc") else None
AF_UNIX = 1
# The weak guard also refuses other processes and changes outside the folder.
PROCESS_EVENTS = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.", "pty.")
PROCESS_EVENTS += ("os.kill", "os.killpg")
CHANGE_EVENTS = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
CHANGE_EVENTS += ("os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.mkfifo", "os.mknod", "shutil.")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOST_CHANGES = 256
REPORT_BYTES = 4096
DETAIL_CHARACTERS = 300
FAILURES = ((AssertionError, "wrong"), (SyntaxError, "syntax"), (NameError, "name"), (TypeError, "type"))
FAILURES += ((MemoryError, "memory"),)

libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments) -> None:
    """Call a libc function that returns -1 on failure.

    Raises:
        OSError: naming the function.
    """
    if getattr(libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def enter_namespaces(files: int) -> None:
    """Leave network and other processes, and make the file system read-only except for `FOLDER`, a folder in memory of
    at most `files` bytes that disappears with the namespace.

    Root uses no user namespace, because it could not become another user in one.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    _call("unshare", flags | (CLONE_NEWUSER if uid else 0))
    if uid:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    _mount(b"none", "/", None, MS_REC | MS_PRIVATE)
    # Only its owner may be able to reach the interpreter's library, and this process may change its user.
    library = os.open(os.path.dirname(os.__file__), O_PATH)
    _mount(b"tmpfs", "/tmp", b"mode=0755,size=1m,nr_inodes=64", MS_NOSUID | MS_NODEV)
    os.mkdir(LIBRARY)
    _mount(f"/proc/self/fd/{library}".encode(), LIBRARY, None, MS_BIND | MS_REC)
    os.close(library)
    os.mkdir(FOLDER)
    _mount(b"tmpfs", FOLDER, b"mode=0777,size=%d,nr_inodes=1024" % files, MS_NOSUID | MS_NODEV)
    for hidden in HIDDEN:
        if os.path.isdir(hidden):
            _mount(b"tmpfs", hidden, b"mode=0555,size=4k,nr_inodes=4", MS_NOSUID | MS_NODEV)
    _mount_attributes("/", AT_RECURSIVE, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0)
    _mount_attributes(FOLDER, 0, 0, MOUNT_ATTR_RDONLY)
    os.chdir(FOLDER)
    search_library(LIBRARY)


def search_library(folder: str) -> None:
    """Import from the standard library in `folder` only, submodules of loaded packages included."""
    loaded_from = os.path.dirname(os.__file__)
    sys.path[:] = [folder, os.path.join(folder, "lib-dynload")]
    for module in list(sys.modules.values()):
        if getattr(module, "__path__", None):
            module.__path__ = [path.replace(loaded_from, folder, 1) for path in module.__path__]
    sys.path_importer_cache.clear()


def _mount(source: bytes, target: str, options: bytes | None, flags: int) -> None:
    kind = source if options else None
    _call("mount", source, target.encode(), kind, ctypes.c_ulong(flags), options)


def _mount_attributes(path: str, flags: int, add: int, remove: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(add, remove, 0, 0)
    _call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes))


def drop_privileges(uid: int) -> None:
    """Root becomes a user without rights; other users give up the rights that a new user namespace gives."""
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call("syscall", SYS_CAPSET[os.uname().machine], header, none)


def guard(weak: bool, folder: str) -> None:
    """Install an audit hook that refuses native code, inspection of the interpreter, `/proc` and network use; with
    `weak` (without namespaces) also other processes and changes outside `folder`.

    A program can change every name of `builtins` and of this module, and can reach the frame of a hook that raises. The
    verdict depends on `hook`, which therefore uses only the defaults of its arguments. `confine` only stops accidents.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] in REFUSED_MODULES]:
        del sys.modules[name]
    changes = 0

    def inside(path: object) -> bool:
        if isinstance(path, int):
            return True
        return os.path.commonpath([folder, os.path.realpath(os.fsdecode(path))]) == folder

    def confine(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event.startswith("socket.") and not _is_local(event, arguments):
            raise PermissionError(errno.EPERM, f"{event}: the sandbox has no network")
        if not weak:
            return
        if event.startswith(PROCESS_EVENTS):
            raise PermissionError(errno.EPERM, f"{event}: not in the sandbox")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS
        if writes or event.startswith(CHANGE_EVENTS):
            changes += 1
            paths = arguments[:1] if event == "open" else [a for a in arguments if isinstance(a, (str, bytes))]
            if changes > MOST_CHANGES or not all(inside(path) for path in paths):
                raise PermissionError(errno.EPERM, f"{event}: outside the sandbox's folder, or too many files")

    def hook(
        event,
        arguments,
        *,
        starts=str.startswith,
        exact=str.__str__,  # the text of an instance of a subclass of str
        first=str.partition,
        inspection=INSPECTION_EVENTS,
        modules=REFUSED_MODULES,
        stat=os.stat,
        proc=PROC_DEVICE,
        kind=type,
        number=int,
        refused=PermissionError,
        not_found=ModuleNotFoundError,
        failed=(OSError, ValueError, TypeError),
        code=errno.EPERM,
        confine=confine,
    ):
        if starts(event, inspection):
            raise refused(code, f"{event}: not in the sandbox")
        if event == "import" and first(exact(arguments[0]), ".")[0] in modules:
            raise not_found(f"{exact(arguments[0])} is not in the sandbox")
        if event == "open" and kind(arguments[0]) is not number:
            try:
                device = stat(arguments[0]).st_dev
            except failed:  # `open` will report it
                device = None
            if device is not None and device == proc:
                raise refused(code, "open: /proc is not in the sandbox")
        confine(event, arguments)

    def settrace(function):
        if function is not None:
            raise PermissionError(errno.EPERM, "sys.settrace: not in the sandbox")

    sys.settrace = settrace  # doctest sets it to None
    sys.addaudithook(hook)


def _is_local(event: str, arguments: tuple) -> bool:
    """Whether a socket event needs no network. Every event loop creates a pair of Unix sockets."""
    if event == "socket.__new__":
        return arguments[1] == AF_UNIX
    if event == "socket.sendmsg":
        return arguments[1] is None
    return event == "socket.gethostname"


def limit(job: dict) -> None:
    """Set limits, which the program and its children inherit and cannot raise."""
    cpu = job["cpu_seconds"]
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),  # SIGXCPU, then SIGKILL
        resource.RLIMIT_FSIZE: (job["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
    }
    if job["namespaces"]:  # counted per user; a real user's processes would count too
        limits[resource.RLIMIT_NPROC] = (job["processes"],) * 2
    if sys.platform == "linux":  # macOS refuses this limit
        limits[resource.RLIMIT_AS] = (job["memory_bytes"],) * 2
    for name, values in limits.items():
        hardest = resource.getrlimit(name)[1]  # the caller's own, which cannot be raised
        bounded = values if hardest == resource.RLIM_INFINITY else tuple(min(value, hardest) for value in values)
        resource.setrlimit(name, bounded)


def describe(
    error,
    *,
    kinds=FAILURES,
    kind_of=type,
    bases_of=type.__dict__["__mro__"].__get__,
    name_of=type.__dict__["__name__"].__get__,
    text=str,
) -> bytes:
    """Two lines: the kind of failure, by the exception's real class, and the exception."""
    own = kind_of(error)
    outcome = "other"
    for expected, name in kinds:
        for base in bases_of(own):
            if base is expected:
                outcome = name
    try:
        message = text(error)[:DETAIL_CHARACTERS]
        return f"{outcome}\n{name_of(own)}: {message}".encode("utf-8", "replace")
    except:  # noqa: E722  (its __str__ may be code of the program)
        return f"{outcome}\n{name_of(own)}: ".encode("utf-8", "replace")


def run_program(job: dict, secret: list[bytes], report: int) -> None:
    """Body of the program's process; never returns.

    Writes to the pipe: the secret alone if the program ran to its end; the secret and a reason if it was not run; else
    the result of `describe`, which the program can influence but which can only report a failure.
    """
    write, leave, number, execute, caught = os.write, os._exit, os.getpid, exec, sys.exc_info
    myself = number()
    try:
        try:
            _die_with_parent()
            for stream in (0, 1, 2):
                os.dup2(job["null"], stream)
            report = os.dup2(report, 3, inheritable=False)
            os.closerange(4, 256)
            os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
            limit(job)
            if job["namespaces"]:
                os.setsid()  # its old process group reaches out of the namespace, and it could kill it
                drop_privileges(FIRST_UID + job["number"])
            guard(not job["namespaces"], os.path.realpath(os.getcwd()))
            module = types.ModuleType("__problem__")
            sys.modules["__problem__"] = module  # dataclasses and pickle look up a class's module
        except (OSError, ValueError, KeyError) as error:
            write(report, secret.pop() + f"{type(error).__name__}: {error}".encode()[:DETAIL_CHARACTERS])
            leave(0)
        try:
            program = compile(job["source"], "<program>", "exec")
            # The secret leaves its list before the program starts. From then on it is in a dict on this frame's evaluation
            # stack, as are the functions that will read and write it, so no name leads to it. The key is the id of this
            # process: a fork made by the program has another one.
            write(report, {myself: secret.pop()}.pop((number, execute(program, module.__dict__))[0](), b""))
        except:  # noqa: E722  (the program may have replaced the name BaseException)
            if number() == myself:
                write(report, describe(caught()[1]))
    finally:
        leave(0)  # without the program's threads and exit handlers


def wait_for(child: int) -> int:
    """Wait status of `child`; orphans of the program that end meanwhile are reaped."""
    while True:
        ended, status = os.wait()
        if ended == child:
            return status


def run_confined(job: dict) -> dict:
    """Run the program as a grandchild of this process and return the verdict, made from the pipe after its end."""
    secret = [os.urandom(32)]
    report, program_end = os.pipe()
    alive, first_process_end = os.pipe()
    first_process = os.fork()
    if first_process == 0:
        _die_with_parent()
        program = os.fork()
        if program == 0:
            run_program(job, secret, program_end)
        code = os.waitstatus_to_exitcode(wait_for(program))
        os._exit(128 - code if code < 0 else code & 127)
    os.close(program_end)
    os.close(first_process_end)
    ready, _, _ = select.select([0, alive], [], [])
    if alive not in ready:  # standard input has ended: the evaluator is gone
        os.kill(first_process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(wait_for(first_process))
    if alive not in ready and job["folder"] is not None:
        import shutil  # a slow import that is rarely needed

        shutil.rmtree(job["folder"], ignore_errors=True)
    os.set_blocking(report, False)
    try:
        written = os.read(report, REPORT_BYTES)
    except BlockingIOError:  # empty, and with the guard a process may still hold it open
        written = b""
    if written.startswith(secret[0]) and written != secret[0]:
        return {"setup": written[len(secret[0]) :].decode("utf-8", "replace")}
    kind, _, detail = written.decode("utf-8", "replace").partition("\n")
    return {"ended": code, "passed": written == secret[0], "kind": kind, "detail": detail}


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    signal.alarm(int(job["wall_seconds"]) + 5)  # in case the parent neither ends nor kills this process
    job["null"] = os.open(os.devnull, os.O_RDWR)
    search_library(os.path.dirname(os.__file__))
    try:
        if job["namespaces"]:
            enter_namespaces(job["folder_bytes"])
        verdict = run_confined(job)
    except (OSError, KeyError) as error:
        verdict = {"setup": str(error)}
    os.write(1, json.dumps(verdict).encode())
    os.killpg(0, signal.SIGKILL)  # this process and all that the program left in its group


if __name__ == "__main__":
    main()
