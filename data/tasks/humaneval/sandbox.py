"""Runs programs that a model wrote, away from everything else, and says whether they pass their tests.

The program and its tests run in two processes. The tests never lie in the program's process: it sees the arguments of
one call after the other and sends back plain data. So the verdict is made where the program has no code, and it
cannot be forged by a name, a printed marker, `sys.exit(0)`, `os._exit(0)`, an `__eq__` that is always true, a patched
library or a search through frames and `gc`. A wrong program passes only if it sends the values that the tests want.

Both processes run in bubblewrap (https://github.com/containers/bubblewrap): no network; their own process, IPC, host
name and mount namespaces, without /proc; of the machine's files only Python's library and the system's, read-only; a
/tmp of 16 MiB in memory; no capabilities and no root; no environment. Limits: processor time, address space, size and
number of files, no further process or thread; and a time after which both are killed with all that they started.

Not defended: faults in the kernel or in bubblewrap; reading what everybody may read in /usr/lib and Python's folder;
a program that knows the tests' answers by heart; one that sets out to fill the machine's memory, for System V segments
count towards no limit.

Without bubblewrap nothing runs, unless it is asked for with `allow_execution=True`. Then an audit hook in each process
is all there is. It refuses files, sockets, processes, signals and ctypes as models write them by accident, but code
that wants to get around it can: through `_posixsubprocess`, `os.mkfifo`, `readline`, `gc` (which reaches the hook).
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
PYTHON = [str(Path(sys.executable).resolve()), "-s", "-P", "-S", "-B", "-X", "utf8", "-c"]
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # sets of text have the same order each time
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/nix/store")
FILE_BYTES = 2**24
REFUSAL = (
    "programs that a model wrote run in bubblewrap, which {fault}: install it (Debian, Ubuntu: apt-get install "
    "bubblewrap), leave the task out, or accept a weaker guard with allow_execution"
)


@dataclass(frozen=True)
class Verdict:
    """`passed`, and in words what ended the program: "passed", an exception's name, "timed out", "killed by SIGKILL".

    A program can choose the name of its exception, so only `passed` says whether it passed.
    """

    passed: bool
    reason: str


def require_sandbox(allow_execution: bool = False) -> str:
    """What programs run in here: "bubblewrap", or "audit hook" where that cannot run and `allow_execution` is set.

    To be called before a model writes the first program: commands and notebooks pass on their switch of this name.

    Raises:
        RuntimeError: bubblewrap cannot run and `allow_execution` is not set.
    """
    fault = bubblewrap_fault()
    if fault and not allow_execution:
        raise RuntimeError(REFUSAL.format(fault=fault))
    return "audit hook" if fault else "bubblewrap"


def run_program(
    program: str,
    tests: str,
    function: str,
    *,
    given: str = "",
    allow_execution: bool = False,
    cpu_seconds: int = 5,
    memory_mib: int = 512,
) -> Verdict:
    """Whether a program's function passes its tests.

    Arguments and values travel as plain data: None, numbers, fractions, text, bytes, lists, tuples, sets, dicts and
    what extends these. Tests do not see that a function changed its arguments in place, and any other value (an
    iterator, an object) is equal to nothing.

    Args:
        program: what the model wrote, with its prompt: Python source that defines `function`.
        tests: Python source that calls `function` and raises if a value is wrong; in HumanEval `check` and its call.
        given: source that the tests may use beside it, such as helpers that stand in the prompt (with a body for the
            function that is to be written). Theirs is this one, whatever the program makes of it.
        allow_execution: as in `require_sandbox`.
        cpu_seconds: of processor, and four times that of time.
        memory_mib: of address space, in MiB.

    Raises:
        RuntimeError: as `require_sandbox`, before anything runs.
    """
    audit = require_sandbox(allow_execution) == "audit hook"
    limits = {
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_AS": memory_mib * 2**20,
        "RLIMIT_FSIZE": 0 if audit else FILE_BYTES,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_CORE": 0,
    }
    task = json.dumps({"program": program, "function": function, "given": given, "tests": tests}).encode()
    ends = socket.socketpair()
    with tempfile.TemporaryDirectory() as folder, ends[0], ends[1], contextlib.ExitStack() as running:

        def start(role: str, end: socket.socket, streams: int) -> subprocess.Popen:
            options = json.dumps({"limits": limits, "audit": audit, "channel": end.fileno()})
            command = [*PYTHON, CHILD.read_text(), role, options]
            process = subprocess.Popen(
                command if audit else [*bubblewrap(), *command],
                stdin=streams,
                stdout=streams,
                stderr=subprocess.DEVNULL,
                pass_fds=[end.fileno()],
                cwd=folder,
                env=ENVIRONMENT,
                start_new_session=True,
            )
            running.callback(_kill, process)
            end.close()  # the other side reads an end of file when the process is gone
            return process

        writer = start("program", ends[0], subprocess.DEVNULL)
        judge = start("judge", ends[1], subprocess.PIPE)
        try:
            output, _ = judge.communicate(task, timeout=4 * cpu_seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, "timed out")
        verdict = json.loads(output) if output else {"passed": False, "reason": "the tests ended without a verdict"}
        if verdict["reason"] == "ended":
            verdict["reason"] = f"ended before it answered{_signal(writer)}"
        return Verdict(**verdict)


def _kill(process: subprocess.Popen) -> None:
    """End a process and its group, if it did not end by itself."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _signal(process: subprocess.Popen) -> str:
    """What ended a process that is ending, as ": SIGKILL", or "" if no signal did. Bubblewrap adds 128 to it."""
    try:
        status = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return ""
    number = -status if status < 0 else status - 128
    return f": {signal.Signals(number).name}" if number in set(signal.Signals) else ""


def bubblewrap() -> list[str]:
    """The command and options that programs run in. Root's sandbox has no user namespace: the child becomes nobody."""
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--cap-drop", "ALL", "--hostname", "sandbox"]
    if os.geteuid() == 0:
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        options += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    library = dict.fromkeys([*SYSTEM, f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", PYTHON[0]])
    for bind, paths in (("--ro-bind", library), ("--dev-bind", ["/dev/null", "/dev/urandom"])):
        for path in filter(os.path.exists, paths):
            for parent in reversed(Path(path).parents):
                options += ["--dir", str(parent)]  # open to all; what a bind would make is open to root alone
            options += [bind, path, path]
    options += ["--perms", "1777", "--size", str(FILE_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [shutil.which("bwrap") or "bwrap", *options, "--"]


@functools.cache
def bubblewrap_fault() -> str:
    """Why bubblewrap cannot run here, or "" if it can: a program is run in it once and the answer kept."""
    if shutil.which("bwrap") is None:
        return "is not installed"
    try:
        command = [*bubblewrap(), *PYTHON, "print('ready')"]
        tried = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    if tried.stdout != "ready\n":
        return f"does not run ({(tried.stderr.strip().splitlines() or ['no output'])[-1]})"
    return ""
