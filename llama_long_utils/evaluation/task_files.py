"""Where benchmark tasks are described, and checking their names before a model is loaded."""

import functools
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import closest

TASKS = REPOSITORY / "data" / "tasks"
HUB = "hub:"  # before the name of a task of lm-evaluation-harness that has a namesake here


def is_ours(name: str, folder: Path = TASKS) -> bool:
    """Whether a task is read from `folder`."""
    return (folder / f"{name}.yaml").is_file()


def check_names(names: Sequence[str], folder: Path = TASKS) -> None:
    """Raise ValueError, with the closest name, unless each is a task of `folder` or of lm-evaluation-harness."""
    for name in names:
        word = name.removeprefix(HUB)
        if is_ours(name, folder):
            continue
        files = harness_files()
        if re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])", files) and word in harness_names():
            continue
        ours = sorted(path.stem for path in folder.glob("*.yaml"))
        hint = closest(word, ours) or closest(word, re.findall(r"(?m)^(?:task|group|tag): *[\"']?([\w.-]+)", files))
        here = [stem for stem in ours if "dataset_path:" not in (folder / f"{stem}.yaml").read_text("utf-8")]
        offline = f"offline there are {', '.join(here)}; with the hub bold and all of lm-evaluation-harness"
        raise ValueError(f"unknown task {name!r}{hint}: {offline}")


@functools.cache
def harness_files() -> str:
    """The text of all files that describe tasks of lm-evaluation-harness: a name that is not in it is none of them."""
    (package,) = find_spec("lm_eval").submodule_search_locations
    files = (path for path in Path(package, "tasks").rglob("*") if path.is_file() and path.suffix != ".pyc")
    return "\n".join(path.read_text("utf-8", "replace") for path in files)


@functools.cache
def harness_names() -> list[str]:
    """All tasks, groups and tags of lm-evaluation-harness, which takes ten seconds to find them."""
    from lm_eval.tasks import TaskManager

    return TaskManager().all_tasks
