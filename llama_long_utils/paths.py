"""Where things are, and writing files so that they are always whole."""

import errno
import fcntl
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LLAMA_LONG_CACHE", REPOSITORY / "data" / "cache")).absolute()
ADAPTERS = REPOSITORY / "data" / "adapters"
RESULTS = REPOSITORY / "data" / "results"
PUBLISHED = REPOSITORY / "data" / "published"
PRESETS = REPOSITORY / "presets"
CARD = "adapter_card.json"  # in the folder of every adapter of ours
PACKAGED = REPOSITORY / "data" / "packaged_models.json"  # models as GGUF files in PyPI packages


def check_adapter(folder: str | Path | None) -> None:
    """ValueError if one is named, absolute or seen from the repository, that is no adapter of ours."""
    if folder and not (REPOSITORY / folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}: it is not an adapter of this collection (05_finetune_qlora)")


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file so that at every moment either the old one or the whole new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # several machines may share the folder
    try:
        scratch.write_bytes(content)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    scratch.replace(path)
    return path


def out_of_space(error: Exception) -> bool:
    """Whether a disk was full; safetensors has no number for that, only words."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)


def file_sha256(path: Path) -> str:
    """The hash of a file's content; OSError if there is none."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def alone(lock: Path, other: str) -> Iterator[None]:
    """Holds a lock, which the kernel takes back if the process dies; RuntimeError if the `other` that is named does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{other}: wait until it has ended, or stop it") from None
        yield


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `folder`; after an error the old one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        try:
            yield new
        except SafetensorError as error:
            if not out_of_space(error):
                raise
            raise OSError(errno.ENOSPC, "No space left on device: make room", str(folder)) from error
        if folder.exists():
            folder.replace(Path(scratch, "old"))
        new.replace(folder)
