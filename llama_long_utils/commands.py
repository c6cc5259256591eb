"""How a command ends: one line for what went wrong, and the exit code that a shell expects."""

import os
import re
import sys
import time
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any, NoReturn

from llama_long_utils.paths import CACHE

PYTHON = ".venv/bin/python"  # as README has it, for what a command names to be run next
INTERRUPTED, CLOSED = 130, 141  # 128 + SIGINT, 128 + SIGPIPE


def tokens(text: str) -> int:
    """A converter for argparse: a number of tokens, 1 or more; "32768", "32,768" and "32K" are the same."""
    parts = re.fullmatch(r"([1-9][\d,_]{0,11})(k?)", text.strip(), re.IGNORECASE)
    if not parts:
        raise ArgumentTypeError(f"{text!r} is no number of tokens: write 32768 or 32K")
    return int(re.sub("[,_]", "", parts[1])) * (1024 if parts[2] else 1)


def at_least(kind: type, least: float) -> Any:
    """A converter for argparse: a finite number of this kind, `least` or more."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < 1e12:
            raise ArgumentTypeError(f"{text} must be a number of {least:g} or more")
        return value

    number.__name__ = kind.__name__
    return number


def gibibytes(text: str) -> float:
    """A converter for argparse: GiB, by which the memory of GPUs is sold; "24", "24GB" and "24 GiB" are the same."""
    try:
        return at_least(float, 0.1)(re.sub(r"\s*gi?b?$", "", text, flags=re.IGNORECASE))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no number of GiB: write 24 or 24GB") from None


def run_command(main: Callable[[], object], interrupted: str = "interrupted") -> NoReturn:
    """Run it and exit: 0, or 1 with one line on stderr, or as a shell shows Ctrl-C and a closed pipe."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # what libraries will change, and use themselves
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of texts beyond a base's old window
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(str(stop) or interrupted, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        raise SystemExit(CLOSED) from None
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # if the first process failed, too, torchrun ends this one now: one says what was wrong
        file = getattr(error, "filename", None)
        elsewhere = "; LLAMA_LONG_CACHE=FOLDER puts the cache elsewhere" * str(file).startswith(str(CACHE))
        said = f"{file}: {error.strerror}{elsewhere}" if file and error.strerror else str(error)
        raise SystemExit(f"error: {' '.join(said.split())}") from None
    raise SystemExit(0)
