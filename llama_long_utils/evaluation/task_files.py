"""Where benchmark tasks are described, and checking their names before a model is loaded."""

import functools
from collections.abc import Sequence
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
        if is_ours(name, folder) or word in harness_names():
            continue
        ours = sorted(path.stem for path in folder.glob("*.yaml"))
        hint = closest(word, ours) or closest(word, harness_names())
        here = [stem for stem in ours if "dataset_path:" not in (folder / f"{stem}.yaml").read_text("utf-8")]
        offline = f"offline there are {', '.join(here)}; with the hub bold and all of lm-evaluation-harness"
        raise ValueError(f"unknown task {name!r}{hint}: {offline}")


@functools.cache
def harness_names() -> list[str]:
    """All tasks, groups and tags of lm-evaluation-harness, which takes ten seconds to find them."""
    from lm_eval.tasks import TaskManager

    return TaskManager().all_tasks
