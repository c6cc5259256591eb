"""Where things are, and writing files so that they are always whole."""

import os
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
