"""What runs on the other side of the sandbox: confine this process, execute one program in a child of it, report.

Started by `sandbox.py` as a script of its own interpreter, without site packages. Standard input holds the job as JSON,
standard output is a file for the report: at most one line that begins with the job's token, written after the tests,
and as the last line `{"ended": wait status}`, or `{"setup": what failed}` when nothing was run.

Processes, each killed with the one before it: this one, in a session of its own; with namespaces, the first process of
a new PID namespace, with which every process in it ends; the program.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import types

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4
SYS_MOUNT_SETATTR, SYS_CAPSET = 442, {"x86_64": 126, "aarch64": 91}
AT_FDCWD, AT_RECURSIVE, O_PATH = -100, 0x8000, 0o10000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
# A user of its own for each run, far from any real one: RLIMIT_NPROC counts by user and does not bind root.
FIRST_UID = 0x70000000
# Places of Unix sockets, of other processes' files, and the host's temporary files. They are empty inside.
HIDDEN = ("/proc", "/run", "/dev/shm")
FOLDER = "/tmp/work"
LIBRARY = "/tmp/lib"

NETWORK_EVENTS = ("socket.",)
# What the weak guard refuses besides: other processes, native code, and changes outside the folder.
PROCESS_EVENTS = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.", "pty.")
PROCESS_EVENTS += ("os.kill", "os.killpg", "ctypes.")
CHANGE_EVENTS = ("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
CHANGE_EVENTS += ("os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.mkfifo", "os.mknod", "shutil.")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOST_CHANGES = 256

libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments) -> None:
    """A libc function that returns -1 on failure."""
    if getattr(libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


# --- namespaces --------------------------------------------------------------------------------------------------------


def enter_namespaces(files: int) -> None:
    """No network, no foreign processes, and a file system that is read-only but for `FOLDER`, which holds `files`
    bytes in all and is memory of this namespace: it goes with it.

    Root does without a user namespace, since only so it can become another user afterwards.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    _call("unshare", flags | (CLONE_NEWUSER if uid else 0))
    if uid:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
    _mount(b"none", "/", None, MS_REC | MS_PRIVATE)
    # The interpreter's library may lie where only its owner can reach it, and this process may change its user.
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
    """Import from the standard library in `folder` and nowhere else; also the submodules of what is loaded."""
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
    """Become a user without rights (root), or give up the rights that a new user namespace gives (anyone else)."""
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call("syscall", SYS_CAPSET[os.uname().machine], header, none)


# --- the guard inside the interpreter ------------------------------------------------------------------------------------


def guard(weak: bool, folder: str) -> None:
    """Refuse network use and, when nothing stronger holds (`weak`), other processes and changes outside `folder`."""
    changes = 0

    def inside(path: object) -> bool:
        if isinstance(path, int):
            return True
        return os.path.commonpath([folder, os.path.realpath(os.fsdecode(path))]) == folder

    def hook(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event.startswith(NETWORK_EVENTS):
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

    sys.addaudithook(hook)


# --- the program -------------------------------------------------------------------------------------------------------


def limit(job: dict) -> None:
    """Limits that the program and all it starts inherit; none can be raised again."""
    cpu = job["cpu_seconds"]
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),  # SIGXCPU, then SIGKILL
        resource.RLIMIT_FSIZE: (job["file_bytes"],) * 2,
        resource.RLIMIT_NPROC: (job["processes"],) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
    }
    if sys.platform == "linux":  # macOS refuses it
        limits[resource.RLIMIT_AS] = (job["memory_bytes"],) * 2
    for name, values in limits.items():
        hardest = resource.getrlimit(name)[1]  # of the caller; nobody may go above it
        bounded = values if hardest == resource.RLIM_INFINITY else tuple(min(value, hardest) for value in values)
        resource.setrlimit(name, bounded)


def execute(source: str) -> dict:
    """Run a program to its end; what it raised, as the exception's class with its bases, or nothing."""
    module = types.ModuleType("__problem__")
    sys.modules["__problem__"] = module  # dataclasses and pickle look a class's module up
    try:
        exec(compile(source, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        names = [base.__name__ for base in type(error).__mro__]
        try:
            message = str(error)[:300]
        except Exception:  # its own __str__ may be the program's, and fail
            message = ""
        return {"raised": names, "message": message}
    return {"raised": []}


def run_program(job: dict, report: int) -> None:
    """The last process: never returns. The report's first line appears only when `source` ran to its end or raised."""
    myself = os.getpid()
    try:
        _die_with_parent()
        for number in (0, 1, 2):
            os.dup2(job["null"], number)
        os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
        try:
            limit(job)
            if job["namespaces"]:
                drop_privileges(FIRST_UID + job["number"])
            guard(not job["namespaces"], os.path.realpath(os.getcwd()))
            outcome = execute(job["source"])
        except (OSError, ValueError, KeyError) as error:
            outcome = {"setup": f"{type(error).__name__}: {error}"}
        if os.getpid() == myself:  # and not a fork that the program made of itself
            os.write(report, f"\n{job['token']} {json.dumps(outcome)}\n".encode())
    finally:
        os._exit(0)  # without waiting for the program's threads or running its exit handlers


def fork_and_wait(run) -> int:
    """Run `run()` in a child; its wait status. Other children that end meanwhile (orphans of the program) are reaped."""
    child = os.fork()
    if child == 0:
        run()
    while True:
        ended, status = os.wait()
        if ended == child:
            return status


def main() -> None:
    report = os.dup(1)
    job = json.load(sys.stdin)
    signal.alarm(int(job["wall_seconds"]) + 5)  # should the process that started this one be gone
    job["null"] = os.open(os.devnull, os.O_RDWR)
    search_library(os.path.dirname(os.__file__))

    def program() -> None:
        run_program(job, report)

    def first_process() -> None:
        _die_with_parent()
        code = os.waitstatus_to_exitcode(fork_and_wait(program))
        os._exit(128 - code if code < 0 else code & 127)

    if job["namespaces"]:
        try:
            enter_namespaces(job["folder_bytes"])
        except (OSError, KeyError) as error:
            os.write(report, b"\n" + json.dumps({"setup": str(error)}).encode())
            return
    code = os.waitstatus_to_exitcode(fork_and_wait(first_process))
    os.write(report, b"\n" + json.dumps({"ended": code}).encode())
    os.killpg(0, signal.SIGKILL)  # this process too, and whatever the program left in its group


if __name__ == "__main__":
    main()
