"""Where benchmark tasks are described, and checking their names before anything heavy is imported."""

import os
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
    (package,) = find_spec("lm_eval").submodule_search_locations
    harness = Path(package, "tasks")
    for name in names:
        word = name.removeprefix(HUB)
        if is_ours(name, folder) or _in_harness(word, harness):
            continue
        ours = sorted(path.stem for path in folder.glob("*.yaml"))
        families = [path.name for path in harness.iterdir() if path.is_dir()]
        hint = closest(word, ours) or closest(word, families)
        here = [stem for stem in ours if "dataset_path:" not in (folder / f"{stem}.yaml").read_text("utf-8")]
        offline = f"offline there are {', '.join(here)}; with the hub bold and all of lm-evaluation-harness"
        raise ValueError(f"unknown task {name!r}{hint}: {offline}")


def _in_harness(name: str, harness: Path) -> bool:
    """Whether it is a task, group or tag. 14,000 files are read as text, in half a second; the harness needs seven."""
    word = name.encode()
    key, end = rb"""^[ -]*["']?(task|group|tag)["']?:[^:]*?(?<![\w.+-])""", rb"(?![\w.+-])"
    named = re.compile(key + re.escape(word) + end, re.MULTILINE)
    for folder, _, files in os.walk(harness):  # three times as fast as rglob
        for file in files:
            if file.endswith(".yaml") or "." not in file:
                content = Path(folder, file).read_bytes()
                if word in content and named.search(content):
                    return True
    return False
