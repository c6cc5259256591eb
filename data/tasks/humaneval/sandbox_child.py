"""The two processes of `sandbox.run_program`: one runs the program, one its tests. Standard library only.

Both are started from this file's text. Calls and answers travel as lines of JSON through a pair of sockets.
"""

import builtins
import contextlib
import fractions
import json
import os
import resource
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, BinaryIO

NOBODY = 65534
ANSWER_BYTES = 2**20  # of one call or answer
READ_ONLY = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
DENIED = ("os.", "socket.", "subprocess.", "ctypes.", "shutil.", "sqlite3.", "pty.", "fcntl.", "signal.pthread_kill")


class ProgramError(Exception):
    """An exception of the program that is no built-in one, or the end of its process."""


class Opaque:
    """A value that is no plain data: equal to nothing, and true or false as it was in the program."""

    def __init__(self, truth: bool) -> None:
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth


def to_json(value: Any) -> Any:
    """Plain data as what JSON can write: containers become {type: content}."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # a subclass travels as what it extends
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: list(value)}
    if isinstance(value, fractions.Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if isinstance(value, dict):
        return {"dict": [[to_json(key), to_json(entry)] for key, entry in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [to_json(entry) for entry in value]}
    return {"opaque": bool(value)}


def from_json(value: Any) -> Any:
    """The value that `to_json` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "opaque":
        return Opaque(bool(content))
    if kind in ("complex", "fraction"):
        return (complex if kind == "complex" else fractions.Fraction)(*content)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray)(content)
    if kind == "dict":
        return {from_json(key): from_json(entry) for key, entry in content}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](from_json(entry) for entry in content)


def send(stream: BinaryIO, message: Any) -> None:
    """Write one line."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > ANSWER_BYTES:
        raise OverflowError(f"more than {ANSWER_BYTES} bytes")
    stream.write(line)
    stream.flush()


def restrict(limits: dict[str, int], audit: bool) -> None:
    """Give up root, set the limits (from `resource`), and without a sandbox around the process set an audit hook."""
    if not audit and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):  # macOS has no limit on address space
            resource.setrlimit(getattr(resource, name), (value, value))
    if audit:
        library = tuple({os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")})
        sys.addaudithook(_refuse_unless_in(library))


def _refuse_unless_in(library: tuple[str, ...]) -> Callable[[str, tuple], None]:
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    real, text, denied, allowed = os.path.realpath, os.fsdecode, DENIED, READ_ONLY

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            refused = not isinstance(path, int) and (flags & writing or not real(text(path)).startswith(library))
        else:
            refused = event.startswith(denied) and event not in allowed
        if refused:
            raise PermissionError(event)

    return hook


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Run the program that the first line holds, then answer every further line with its function's value."""
    task = json.loads(incoming.readline())
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(task["program"], "program", "exec"), names)
        function = names[task["function"]]
    except BaseException as error:
        return send(outgoing, {"error": type(error).__name__})
    send(outgoing, {"value": None})
    for line in incoming:
        try:
            positional, named = from_json(json.loads(line))
            send(outgoing, {"value": to_json(function(*positional, **named))})
        except BaseException as error:
            send(outgoing, {"error": type(error).__name__})


def judge(task: dict[str, Any], incoming: BinaryIO, outgoing: BinaryIO) -> dict[str, Any]:
    """Run the tests, whose calls of the function go to the program's process: {passed, reason}."""

    def receive() -> Any:
        line = incoming.readline(ANSWER_BYTES)
        if not line.endswith(b"\n"):
            raise ProgramError("ended")
        answer = json.loads(line)
        if "error" not in answer:
            return from_json(answer["value"])
        name = str(answer["error"])[:80]
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            raise kind("in the program")
        raise ProgramError(name)

    def function(*positional: Any, **named: Any) -> Any:
        send(outgoing, to_json((positional, named)))
        return receive()

    try:
        send(outgoing, {"program": task["program"], "function": task["function"]})
        receive()
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(task["given"], "given", "exec"), names)
        names[task["function"]] = function
        exec(compile(task["tests"], "tests", "exec"), names)
    except ProgramError as error:
        return {"passed": False, "reason": str(error)}
    except BaseException as error:
        return {"passed": False, "reason": type(error).__name__}
    return {"passed": True, "reason": "passed"}


def main() -> None:
    """Run as `python -c TEXT ROLE OPTIONS`; options: {limits, audit, channel} (the number of a socket)."""
    role, options = sys.argv[1], json.loads(sys.argv[2])
    channel = options.pop("channel")
    incoming, outgoing = os.fdopen(channel, "rb"), os.fdopen(os.dup(channel), "wb")
    sys.argv[:] = [""]
    if role == "program":
        restrict(**options)
        serve(incoming, outgoing)
    else:
        task, verdict = json.load(sys.stdin), os.fdopen(os.dup(1), "wb")
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):  # what tests print is no verdict
            os.dup2(nothing, number)
        restrict(**options)
        send(verdict, judge(task, incoming, outgoing))
    os._exit(0)  # nothing that the program registered runs any more


if __name__ == "__main__":
    main()
