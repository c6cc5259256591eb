"""Running programs that a model wrote."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile

PASSED = "passed"


# Everything below happens in the child. An audit hook cannot be removed once it is set (PEP 578).
_CHILD = """
import json, os, resource, sys, sysconfig
task = json.load(sys.stdin)
result, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
for number in range(3):
    os.dup2(nothing, number)
if hasattr(os, "unshare"):
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    except OSError:
        pass
for name, value in task["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (value, value))
    except (AttributeError, OSError, ValueError):
        pass
library = tuple({os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")})

def guard(event, arguments, denied=tuple(task["denied"]), path=os.path.realpath, text=os.fsdecode):
    if event == "open":
        if isinstance(arguments[0], int) or path(text(arguments[0])).startswith(library):
            return
    elif not event.startswith(denied):
        return
    raise PermissionError(event)

sys.addaudithook(guard)
try:
    exec(compile(task["source"], "program", "exec"), {"__name__": "__main__"})
    outcome = "passed"
except BaseException as error:
    outcome = type(error).__name__
os.write(result, (task["secret"] + outcome).encode())
os._exit(0)
"""


_DENIED = ("socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
_DENIED += ("os.system", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
_DENIED += ("os.truncate", "os.chmod", "os.chown", "os.setxattr", "os.utime", "os.chdir", "os.chflags")


def run_program(source: str, *, cpu_seconds: int = 5, memory_mib: int = 512) -> str:
    """Run a program that a model wrote: "passed", or what ended it.

    The child is an isolated Python (`-I`, without installed packages) in an empty folder, with an empty environment, no
    input and its output thrown away. It has `cpu_seconds` of processor and twice that of time, `memory_mib` MiB of
    address space, may write no file and start no process. An audit hook refuses sockets, processes, signals, changes to
    files, ctypes, and opening anything but Python's own library (the parent's environment in /proc included); names of
    files can be listed. From Python 3.12 on Linux it also gets a network of its own with nothing in it, if the kernel
    lets it.

    This stops what models write by accident. It does **not** stop an attack: the hook and the check run in the same
    interpreter as the program, so code made to break out of Python can (and can claim to have passed), and a bug in the
    interpreter or the kernel is no wall. Limits on processes do not bind root; macOS has no limit on address space. If
    you must run hostile code, run all of this in a container or a virtual machine without network.
    """
    secret = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_AS": memory_mib * 2**20,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_CORE": 0,
    }
    task = json.dumps({"source": source, "secret": secret, "limits": limits, "denied": _DENIED})
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(task.encode(), timeout=2 * cpu_seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    outcome = output.decode(errors="replace")
    if outcome.startswith(secret):
        return outcome.removeprefix(secret)
    return f"killed by {signal.Signals(-child.returncode).name}" if child.returncode < 0 else "ended without a result"
