"""Copies of this repository to run commands in, so that the runs of its user stay as they are."""

import shutil
import subprocess
from pathlib import Path

from llama_long_utils.paths import CACHE, REPOSITORY


def copy_of_the_repository(folder: Path) -> Path:
    """A new folder with the files that git has or would add, and the same cache of corpora."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    (folder / "data" / "cache").symlink_to(CACHE)
    return folder
