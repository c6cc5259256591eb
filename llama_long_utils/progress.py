"""Whether somebody watches, and how far a long computation is.

A person at a notebook sees a bar with the time left, made of HTML, which every front end shows. It takes itself away at
the end, so that a notebook saved after it holds what a headless run stores. A headless kernel writes how far it is to a
file, if the runner named one, and a command prints a line a minute.
"""

import html
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

FILE = "LLAMA_LONG_PROGRESS"  # environment variable: the file that a headless kernel writes to
PAUSE = {"bar": 0.5, "file": 1.0, "line": 60.0}  # seconds between two reports

T = TypeVar("T")


def in_kernel() -> bool:
    """Whether this code runs in a notebook's kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def headless() -> bool:
    """Whether nobody watches the cells: kernels that papermill, nbval and nbconvert start belong to no session."""
    of_no_session = "JPY_PARENT_PID" in os.environ and "JPY_SESSION_NAME" not in os.environ
    return not in_kernel() or of_no_session or FILE in os.environ


def track(items: Collection[T], what: str) -> Iterator[T]:
    """The items, one after the other, while a person sees how many are done; `what`: in a few words, what is done."""
    with progress_bar(what, len(items)) as done:
        for count, item in enumerate(items, start=1):
            yield item
            done(count)


@contextmanager
def progress_bar(what: str, total: int, already: int = 0) -> Iterator[Callable[[float], None]]:
    """A function to be called with what is done so far, of `total`; the time left does not count what was `already`."""
    way = "bar" if not headless() else "file" if FILE in os.environ else "" if in_kernel() else "line"
    started = time.monotonic()
    reported = started if way == "line" else -float("inf")  # a command says nothing in its first minute

    def done(count: float) -> None:
        nonlocal reported
        now = time.monotonic()
        if way and now - reported >= PAUSE[way]:
            reported, share = now, count / max(total, 1)
            left = (total - count) * (now - started) / (count - already) if count > already else 0
            time_left = f", about {timedelta(seconds=round(left))} left" if left else ""
            _report(way, share, f"{what}: {share:.0%}{time_left}")

    done(already)
    try:
        yield done
    finally:
        if way != "line":
            _report(way, None, "")


def _report(way: str, share: float | None, text: str) -> None:
    """Show how far it is, or with None that it has ended. All bars of a cell share one output, which is left empty."""
    if way == "line":
        print(text, flush=True)
    elif way == "file":
        Path(os.environ[FILE]).write_text(text, "utf-8")
    elif way == "bar":
        shell = sys.modules["IPython"].get_ipython()
        place = f"progress-{os.getpid()}-{shell.execution_count}"
        again, shell.progress_place = vars(shell).get("progress_place") == place, place
        bar = f'<progress max="1" value="{share}" style="width: 20em; vertical-align: middle"></progress>'
        content = {"text/html": f"{bar} {html.escape(text)}"} if text else {}
        shell.display_pub.publish(content, transient={"display_id": place}, update=again)
