"""Where things are, and writing files so that they are always whole."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LLAMA_LONG_CACHE", REPOSITORY / "data" / "cache"))
ADAPTERS = REPOSITORY / "data" / "adapters"
RESULTS = REPOSITORY / "data" / "results"
PUBLISHED = REPOSITORY / "data" / "published"
PRESETS = REPOSITORY / "presets"


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file so that at every moment either the old one or the whole new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)
    return path


def file_sha256(path: Path) -> str:
    """The hash of a file's content; OSError if there is none."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_state(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file below a path; none for a folder that holds this repository."""
    try:
        if not path.exists() or REPOSITORY.is_relative_to(path.resolve()):
            return []
    except (OSError, ValueError):  # no name of a file, such as a text of a thousand characters
        return []
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `folder`; after an error the old one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        if folder.exists():
            folder.replace(Path(scratch, "old"))
        new.replace(folder)
