"""Where benchmark tasks are described, and checking their names before anything heavy is imported."""

import difflib
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llama_long_utils.paths import REPOSITORY

TASKS = REPOSITORY / "data" / "tasks"
HUB = "hub:"  # before the name of a task of lm-evaluation-harness that has a namesake here


def is_ours(name: str, folder: Path = TASKS) -> bool:
    """Whether a task is read from `folder`."""
    return (folder / f"{name}.yaml").is_file()


def check_names(names: Sequence[str], folder: Path = TASKS) -> None:
    """Raise ValueError, with the closest name, unless each is a task of `folder` or of lm-evaluation-harness."""
    for name in names:
        if is_ours(name, folder) or _in_harness(name.removeprefix(HUB)):
            continue
        ours = sorted(path.stem for path in folder.glob("*.yaml"))
        families = [path.name for path in _harness_folder().iterdir() if path.is_dir()]
        bare = name.removeprefix(HUB)
        near = difflib.get_close_matches(bare, ours, n=1) or difflib.get_close_matches(bare, families, n=1)
        hint = f": did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown task {name!r}{hint} Offline there are {', '.join(ours)}; with the hub "
            "all of lm-evaluation-harness"
        )


def _harness_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("lm_eval is not installed: pip install -e .")
    return Path(spec.submodule_search_locations[0], "tasks")


def _in_harness(name: str) -> bool:
    """Whether it is a task, group or tag. Files are read as text: the harness needs seven seconds to say so."""
    word = name.encode()
    key, end = rb"""^[ -]*["']?(task|group|tag)["']?:[^:]*?(?<![\w.+-])""", rb"(?![\w.+-])"
    named = re.compile(key + re.escape(word) + end, re.MULTILINE)
    files = (path for path in _harness_folder().rglob("*") if path.suffix in ("", ".yaml") and path.is_file())
    contents = (file.read_bytes() for file in files)
    return any(word in content and named.search(content) for content in contents)
