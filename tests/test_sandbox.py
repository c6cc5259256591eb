"""Programs that a model wrote reach nothing outside their sandbox, and cannot choose their verdict.

Every attack is run twice. Without a sandbox its effect is seen from outside (a file, a connection, a dead process, a
secret that was read), so the attack works; in the sandbox there is none.
"""

import contextlib
import os
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox import bubblewrap_fault, require_sandbox, run_program

needs_bubblewrap = pytest.mark.skipif(bool(bubblewrap_fault()), reason=f"bubblewrap {bubblewrap_fault()}")


class World:
    """What an attack can hurt: a folder, two listeners and another process, which knows a secret."""

    def __init__(self) -> None:
        self.secret = secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(dir="/tmp"))
        self.folder.chmod(0o777)
        (self.folder / "kept").write_text(f"{self.secret}\n")
        (self.folder / "kept").chmod(0o666)
        (self.folder / f"named {self.secret}").touch()
        with contextlib.closing(sqlite3.connect(self.folder / "base")) as base, base:
            base.execute("create table t (secret)")
            base.execute("insert into t values (?)", [self.secret])
        self.memory = Path("/dev/shm", self.folder.name)
        self.listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.listeners[1].bind(str(self.folder / "listener"))
        (self.folder / "listener").chmod(0o777)
        self.listeners[1].listen()
        if sys.platform == "linux":  # an abstract name lies in no folder
            self.listeners.append(socket.socket(socket.AF_UNIX))
            self.listeners[2].bind(f"\0{self.folder}")
            self.listeners[2].listen()
        self.victim = subprocess.Popen(["sleep", "60"], env={"SECRET": self.secret}, start_new_session=True)
        self.before, self.priority = self.files(), os.getpriority(os.PRIO_PROCESS, self.victim.pid)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners:
            listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.memory.unlink(missing_ok=True)

    @property
    def names(self) -> str:
        """The first line of every attack."""
        port = self.listeners[0].getsockname()[1]
        return f"FOLDER, PORT, VICTIM = {str(self.folder)!r}, {port}, {self.victim.pid}\n"

    def files(self) -> list[tuple]:
        entries = sorted(self.folder.rglob("*"))
        states = [entry.lstat() for entry in entries]
        return [(entry.name, state.st_mode, state.st_size) for entry, state in zip(entries, states, strict=True)]

    def effects(self) -> set[str]:
        found = set()
        if self.files() != self.before or self.memory.exists():
            found.add("files")
        for listener in self.listeners:
            listener.setblocking(False)
            try:
                listener.accept()[0].close()
                found.add("network")
            except BlockingIOError:
                pass
        if self.victim.poll() is not None or os.getpriority(os.PRIO_PROCESS, self.victim.pid) != self.priority:
            found.add("process")
        return found


ATTACKS = {
    # Writing
    "open": ("files", "open(FOLDER + '/x', 'w')"),
    "os.open": ("files", "import os; os.open(FOLDER + '/x', os.O_CREAT)"),
    "pathlib": ("files", "import pathlib; pathlib.Path(FOLDER, 'x').touch()"),
    "append": ("files", "with open(FOLDER + '/kept', 'a') as file: file.write('more')"),
    "truncate": ("files", "import os; os.truncate(FOLDER + '/kept', 0)"),
    "remove": ("files", "import os; os.remove(FOLDER + '/kept')"),
    "rename": ("files", "import os; os.rename(FOLDER + '/kept', FOLDER + '/x')"),
    "chmod": ("files", "import os; os.chmod(FOLDER + '/kept', 0o644)"),
    "mkdir": ("files", "import os; os.mkdir(FOLDER + '/x')"),
    "rmtree": ("files", "import shutil; shutil.rmtree(FOLDER)"),
    "copy": ("files", "import shutil, sys; shutil.copy(FOLDER + '/kept', FOLDER + '/x')"),
    "symlink": ("files", "import os; os.symlink('/', FOLDER + '/x')"),
    "link": ("files", "import os; os.link(FOLDER + '/kept', FOLDER + '/x')"),
    "mkfifo": ("files", "import os; os.mkfifo(FOLDER + '/x')"),
    "mknod": ("files", "import os; os.mknod(FOLDER + '/x')"),
    "tempfile": ("files", "import tempfile; tempfile.mkdtemp(dir=FOLDER)"),
    "sqlite": ("files", "import sqlite3; sqlite3.connect(FOLDER + '/x').execute('create table t (a)')"),
    "logging": ("files", "import logging; logging.FileHandler(FOLDER + '/x')"),
    "readline writes": ("files", "import readline; readline.write_history_file(FOLDER + '/x')"),
    "libc": ("files", "import ctypes; ctypes.CDLL(None).creat((FOLDER + '/x').encode(), 0o644)"),
    "shared memory": (
        "files",
        "import _posixshmem, os; "
        "_posixshmem.shm_open('/' + os.path.basename(FOLDER), os.O_CREAT | os.O_RDWR, mode=0o600)",
    ),
    "thread": (
        "files",
        "import threading; thread = threading.Thread(target=open, args=(FOLDER + '/x', 'w')); "
        "thread.start(); thread.join()",
    ),
    "atexit": ("files", "import atexit; atexit.register(open, FOLDER + '/x', 'w')"),
    # Through the guard
    "frames": (
        "files",
        """
import sys
frame = sys._getframe()
while frame:
    for name in ("denied", "DENIED", "restrict", "_refuse_unless_in"):
        frame.f_globals.pop(name, None)
    frame = frame.f_back
open(FOLDER + "/x", "w")""",
    ),
    "gc": (
        "files",
        """
import gc
for found in gc.get_objects():
    if getattr(found, "__name__", "") in ("hook", "guard"):
        for cell in found.__closure__ or ():
            cell.cell_contents = "" if isinstance(cell.cell_contents, tuple) else 0
open(FOLDER + "/x", "w")""",
    ),
    # Other programs
    "subprocess": ("files", "import subprocess; subprocess.run(['touch', FOLDER + '/x'])"),
    "os.system": ("files", "import os; os.system('touch ' + FOLDER + '/x')"),
    "popen": ("files", "import os; os.popen('touch ' + FOLDER + '/x').read()"),
    "exec": ("files", "import os; os.execv('/bin/touch', ['touch', FOLDER + '/x'])"),
    "posix_spawn": (
        "files",
        "import os; os.waitpid(os.posix_spawn('/bin/touch', ['touch', FOLDER + '/x'], {}), 0)",
    ),
    "fork_exec": (
        "files",
        """
import subprocess, types
subprocess.sys = types.SimpleNamespace(audit=print, platform="linux")
subprocess.Popen(["touch", FOLDER + "/x"]).wait()""",
    ),
    "pty": ("files", "import pty; pty.spawn(['touch', FOLDER + '/x'])"),
    "multiprocessing": (
        "files",
        "import multiprocessing; process = multiprocessing.get_context('fork').Process("
        "target=open, args=(FOLDER + '/x', 'w')); process.start(); process.join()",
    ),
    "daemon": (
        "files",
        """
import os, time
if not os.fork():
    os.setsid()
    time.sleep(0.3)
    open(FOLDER + "/x", "w")
    os._exit(0)""",
    ),
    # Reading
    "read": ("secret", "return open(FOLDER + '/kept').read()"),
    "mmap": (
        "secret",
        "import mmap, os; return mmap.mmap(os.open(FOLDER + '/kept', os.O_RDONLY), 0, prot=mmap.PROT_READ)[:]",
    ),
    "linecache": ("secret", "import linecache; return linecache.getline(FOLDER + '/kept', 1)"),
    "fileinput": ("secret", "import fileinput; return list(fileinput.input(FOLDER + '/kept'))"),
    "readline reads": (
        "secret",
        "import readline; readline.read_history_file(FOLDER + '/kept'); return readline.get_history_item(1)",
    ),
    "sqlite reads": (
        "secret",
        "import sqlite3; return sqlite3.connect(FOLDER + '/base').execute('select * from t').fetchall()",
    ),
    "list": ("secret", "import os; return os.listdir(FOLDER)"),
    "glob": ("secret", "import glob; return glob.glob(FOLDER + '/*')"),
    "/proc": ("secret", "return open(f'/proc/{VICTIM}/environ').read()"),
    "environment": ("secret", "import os; return dict(os.environ)"),
    # Network
    "socket": ("network", "import socket; socket.create_connection(('127.0.0.1', PORT))"),
    "http": ("network", "import http.client; http.client.HTTPConnection('127.0.0.1', PORT, timeout=1).connect()"),
    "urllib": (
        "network",
        "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=0.2)",
    ),
    "asyncio": ("network", "import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', PORT))"),
    "unix socket": (
        "network",
        "import socket; socket.socket(socket.AF_UNIX).connect(FOLDER + '/listener')",
    ),
    "abstract socket": (
        "network",
        "import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + FOLDER)",
    ),
    "libc socket": (
        "network",
        """
import ctypes, struct
libc = ctypes.CDLL(None)
address = struct.pack("=H", 2) + struct.pack(">H", PORT) + bytes([127, 0, 0, 1]) + bytes(8)
libc.connect(libc.socket(2, 1, 0), address, len(address))""",
    ),
    # Other processes
    "kill": ("process", "import os; os.kill(VICTIM, 9)"),
    "killpg": ("process", "import os; os.killpg(VICTIM, 9)"),
    "pidfd": ("process", "import os, signal; signal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)"),
    "libc kill": ("process", "import ctypes; ctypes.CDLL(None).kill(VICTIM, 9)"),
    "priority": ("process", "import os; os.setpriority(os.PRIO_PROCESS, VICTIM, 9)"),
}


def source(world: World, code: str) -> str:
    return f"{world.names}def f():\n{textwrap.indent(code.strip(), '    ')}\n"


def attack(world: World, code: str, **options: bool) -> set[str]:
    """What a program does in the sandbox."""
    verdict = run_program(source(world, code), f"assert {world.secret!r} in str(f())", "f", **options)
    return world.effects() | ({"secret"} if verdict.passed else set())


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_work_where_nothing_stops_them(name, monkeypatch):
    expected, code = ATTACKS[name]
    with World() as world:
        monkeypatch.setenv("SECRET", world.secret)
        command = [sys.executable, "-c", f"{source(world, code)}print(f())"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        found = world.effects() | ({"secret"} if world.secret in done.stdout else set())
        deadline = time.monotonic() + 10
        while not found and time.monotonic() < deadline:  # a daemon starts, and a killed process ends, a moment later
            time.sleep(0.05)
            found = world.effects()
        assert found == {expected}


@needs_bubblewrap
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_have_no_effect_in_the_sandbox(name, monkeypatch):
    with World() as world:
        monkeypatch.setenv("SECRET", world.secret)
        found = attack(world, ATTACKS[name][1])
        if name == "daemon":
            time.sleep(1)
            found |= world.effects()
        assert found == set()


# Claims that a program passed. The right answer is 4, its tests lie in the other process.
FORGERIES = {
    "an exception named passed": "class passed(Exception): pass\ndef f(x): raise passed",
    "an exception named passed at once": "class passed(Exception): pass\nraise passed",
    "prints": "def f(x):\n    print('passed', flush=True)\n    return 5",
    "prints the verdict": """
def f(x):
    import os
    for number in range(32):
        try:
            os.write(number, b'{"passed": true, "reason": "passed"}\\n')
        except OSError:
            pass
    return 5""",
    "writes the verdict and ends": """
import os
for number in range(32):
    try:
        os.write(number, b'{"passed": true, "reason": "passed"}\\n')
    except OSError:
        pass
os._exit(0)""",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in the function": "def f(x):\n    import sys\n    sys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the function": "def f(x):\n    import os\n    os._exit(0)",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 5",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "StopIteration": "def f(x): raise StopIteration",
    "AssertionError": "def f(x): raise AssertionError",
    "excepthook": "import sys\nsys.excepthook = lambda *_: sys.exit(0)\nraise ValueError",
    "equal to everything": """
class Same:
    def __eq__(self, other): return True
def f(x): return Same()""",
    "a number equal to everything": """
class Same(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def f(x): return Same(5)""",
    "patches assert": "import builtins\nbuiltins.AssertionError = SystemExit\ndef f(x): return 5",
    "patches exec and compile": """
import builtins
builtins.exec = builtins.compile = lambda *_, **__: None
def f(x): return 5""",
    "patches json": "import json\njson.loads = json.dumps = lambda *_: '{\"passed\": true}'\ndef f(x): return 5",
    "patches its process": """
import sys
main = sys.modules["__main__"]
for name in ("judge", "send", "serve", "to_json", "from_json"):
    setattr(main, name, lambda *_: {"passed": True, "reason": "passed"})
def f(x): return 5""",
    "becomes the judge": """
import sys
frame = sys._getframe()
while frame:
    frame.f_globals["role"] = "judge"
    frame = frame.f_back
def f(x):
    sys.modules["__main__"].send(open(1, "wb"), {"passed": True, "reason": "passed"})
    return 5""",
    "defines the tests": "def check(f): pass\ndef f(x): return 5",
    "is another process": "import os\nos.fork()\ndef f(x): return 5",
    "closes its channel": "import os\nos.closerange(0, 100)\ndef f(x): return 5",
    "does not define it": "def g(x): return 4",
    "does not parse": "def f(",
    "defines it as a value": "f = 4",
    "returns a generator": "def f(x): yield 4",
    "answers without end": "def f(x): return 'a' * 10**8",
    "answers a deep list": """
def f(x):
    import sys
    sys.setrecursionlimit(10**6)
    answer = []
    for _ in range(10**5):
        answer = [answer]
    return answer""",
    "answers no JSON": """
def f(x):
    import os
    for number in range(3, 32):
        try:
            os.write(number, b"}{" * 1000 + bytes([10]))
        except OSError:
            pass""",
    "answers a list of a million digits": "def f(x): return 10**4000 * 10**4000",
}


@needs_bubblewrap
@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_cannot_choose_its_verdict(name):
    verdict = run_program(FORGERIES[name], "def check(f):\n    assert f(2) == 4\ncheck(f)", "f", cpu_seconds=1)
    assert not verdict.passed


@needs_bubblewrap
def test_the_tests_are_nowhere_in_the_programs_process():
    """Searched in all objects, frames and open files. What the function is called with is found: the search works."""
    program = """
import gc, os, sys
def everything():
    frame, found = sys._getframe(), []
    while frame:
        found += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    for number in range(32):
        try:
            os.set_blocking(number, False)
            found.append(os.read(number, 10**6))
            os.set_blocking(number, True)
        except OSError:
            pass
    return repr(gc.get_objects()) + repr(found) + repr(sys.orig_argv)
def f(word):
    text = everything()
    return [word in text, "siht yb detset"[::-1] in text]
"""
    tests = "assert f('called with this') == [True, False], 'tested by this'"
    assert run_program(program, tests, "f").passed


@needs_bubblewrap
def test_a_helper_of_the_prompt_is_the_prompts_own():
    prompt = "def double(x):\n    return 2 * x\n\ndef f(x):\n"
    tests = "assert double(f(3)) == 3"
    given = f"{prompt}    pass\n"
    assert run_program(f"{prompt}    return x / 2\n", tests, "f", given=given).passed
    redefined = f"{prompt}    return 5\ndef double(x):\n    return 3\n"
    assert not run_program(redefined, tests, "f", given=given).passed


@needs_bubblewrap
@pytest.mark.parametrize(
    "value",
    [
        *("None", "True", "-7", "0.1", "-0.0", "float('inf')", "2**60", "1j", "__import__('fractions').Fraction(1, 3)"),
        *("'\\u00e9\\ud83d'", "b'a'", "bytearray(b'a')", "[(1, [2]), {3: {4}}]", "{'a': ()}", "frozenset({1})"),
    ],
)
def test_values_travel_both_ways(value):
    program = f"def f(x):\n    return [x, x == {value}, type(x).__name__]"
    tests = f"value = {value}\nassert repr(f(value)) == repr([value, True, type(value).__name__])"
    assert run_program(program, tests, "f").passed


@needs_bubblewrap
def test_values_that_extend_plain_data_are_plain_data():
    program = """
import collections, enum
class Colour(enum.IntEnum):
    RED = 1
Pair = collections.namedtuple("Pair", "a b")
def f(x=0, *, other=0):
    return [collections.Counter("aab"), Pair(x, other), Colour.RED]
"""
    assert run_program(program, "assert f(1, other=2) == [{'a': 2, 'b': 1}, (1, 2), 1]", "f").passed


@needs_bubblewrap
def test_exceptions_reach_the_tests():
    tests = """
try:
    f(-1)
    raise SystemExit
except ValueError:
    pass
assert f(4) == 2"""
    assert run_program("import math\ndef f(x): return math.sqrt(x)", tests, "f").passed
    assert not run_program("def f(x): return 2", tests, "f").passed


ENDINGS = {
    "def f(): return 5": "AssertionError",
    "def f(): return 1 / 0": "ZeroDivisionError",
    "def f(:": "SyntaxError",
    "import numpy": "ModuleNotFoundError",
    "def f(): return input()": "EOFError",
    "def f(): return f()": "RecursionError",
    "def f(): return [0] * 10**9": "MemoryError",
    "def f(): open('/tmp/x', 'wb').write(bytes(10**9))": "MemoryError",
    "def f():\n    import threading\n    threading.Thread(target=print).start()": "RuntimeError",
    "import sys\nsys.exit(0)": "SystemExit",
    "import os\nos._exit(0)": "ended before it answered",
    "def f():\n    while True: pass": "ended before it answered: SIGKILL|timed out",
    "while True: pass": "ended before it answered: SIGKILL|timed out",
    "import time\ntime.sleep(60)": "timed out",
    "import signal\nsignal.pause()": "timed out",
    "class passed(Exception): pass\nraise passed": "passed",
}


@pytest.fixture(scope="module")
def verdicts():
    """On each program, and the seconds until then: four at a time, as some are waited for."""

    def timed(program):
        started = time.monotonic()
        return run_program(program, "assert f() == 4", "f", cpu_seconds=1), time.monotonic() - started

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(ENDINGS, pool.map(timed, ENDINGS), strict=True))


@needs_bubblewrap
@pytest.mark.parametrize(("program", "reason"), ENDINGS.items())
def test_a_verdict_says_what_ended_the_program(verdicts, program, reason):
    verdict, seconds = verdicts[program]
    assert not verdict.passed
    assert verdict.reason in reason.split("|")
    assert seconds < 8


@needs_bubblewrap
def test_limits_hold_for_what_a_program_starts_and_writes():
    """Processes, threads, files in /tmp, memory that is no address space (64 MiB of it are asked for)."""
    program = """
import os, threading
def count(action, most=64):
    for number in range(most):
        try:
            action(number)
        except (OSError, RuntimeError):
            return number
    return most
def write(number):
    with open(f"/tmp/{number}", "wb") as file:
        file.write(bytes(2**20))
def f():
    threads = count(lambda _: threading.Thread(target=int).start())
    return [count(lambda _: os.fork() or os._exit(0)), threads, count(write)]
"""
    assert run_program(program, "assert f()[:2] == [0, 0]\nassert f()[2] < 17", "f").passed


@needs_bubblewrap
def test_a_sandbox_is_nobody_and_sees_only_the_library():
    """Root's sandbox is guarded by its user as well; a read-only view and processes of its own guard everybody's."""
    program = """
import errno, os
def reason(path):
    try:
        os.mkdir(path)
    except OSError as error:
        return errno.errorcode[error.errno]
def f():
    return {
        "user": [os.getuid(), os.getgid()],
        "processes": os.getpid() < 9,
        "folders": [reason("/x"), reason("/dev/x"), reason(os.path.dirname(os.__file__) + "/x"), reason("/tmp/x")],
        "devices": sorted(os.listdir("/dev")),
    }
"""
    expected = {
        "user": [65534, 65534],
        "processes": True,
        "folders": ["EROFS", "EROFS", "EROFS", None],
        "devices": ["null", "urandom"],
    }
    assert run_program(program, f"assert f() == {expected}", "f").passed
    there = "import os\ndef f(path): return os.path.exists(path)"
    own = [str(Path(__file__)), os.path.expanduser("~/.bashrc"), "/etc/passwd", "/proc/1", "/sys", "/run", "/var"]
    assert run_program(there, f"assert not any([f(path) for path in {own}])\nassert f({os.__file__!r})", "f").passed


# What models write by accident. An attack passes the audit hook, and so do `readline` and `mkfifo`.
ACCIDENTS = ["open", "os.open", "pathlib", "append", "truncate", "remove", "rename", "chmod", "mkdir", "rmtree", "copy"]
ACCIDENTS += ["symlink", "link", "tempfile", "sqlite", "logging", "libc", "subprocess", "os.system", "popen", "exec"]
ACCIDENTS += ["posix_spawn", "pty", "multiprocessing", "daemon", "read", "mmap", "linecache", "fileinput", "/proc"]
ACCIDENTS += ["environment", "socket", "http", "urllib", "asyncio", "unix socket", "kill", "killpg"]


@pytest.fixture
def no_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    bubblewrap_fault.cache_clear()
    yield
    bubblewrap_fault.cache_clear()


def test_without_bubblewrap_nothing_runs(no_bubblewrap):
    with World() as world:
        for refused in (lambda: attack(world, "open(FOLDER + '/x', 'w')"), require_sandbox):
            with pytest.raises(RuntimeError, match=r"is not installed: install it .*apt-get install bubblewrap"):
                refused()
        assert world.effects() == set()


def test_without_bubblewrap_programs_run_when_asked(no_bubblewrap):
    assert require_sandbox(allow_execution=True) == "audit hook"
    right, tests = "import random, copy\ndef f(x): return 2 * x", "import math\nassert f(2) == math.pow(2, 2)"
    assert run_program(right, tests, "f", allow_execution=True).passed
    for name in ("an exception named passed", "writes the verdict and ends", "sys.exit", "equal to everything"):
        assert not run_program(FORGERIES[name], tests, "f", allow_execution=True).passed
    assert (
        run_program("import time\ntime.sleep(9)", tests, "f", allow_execution=True, cpu_seconds=1).reason == "timed out"
    )


@pytest.mark.parametrize("name", ACCIDENTS)
def test_without_bubblewrap_accidents_are_stopped(name, no_bubblewrap):
    with World() as world:
        assert attack(world, ATTACKS[name][1], allow_execution=True) == set()
