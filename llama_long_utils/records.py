"""Records: what a run measured, with where and how, as JSON that pandas reads in one line.

The schema is described in data/README.md. Numbers measured by others live in data/published/, each
file with its source, and are read here too, so that no published number stands in code.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import subprocess
import zipfile
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_long_utils.paths import PUBLISHED, REPOSITORY, RESULTS, write_atomically

if TYPE_CHECKING:  # records are read by commands that must answer at once
    import pandas as pd

SCHEMA = 1
KEYS = {"schema", "preset", "question", "provenance", "tables"}
PROVENANCE = {"command", "commit", "date", "device", "versions", "seeds", "seconds"}
AGAIN = "run its notebook or experiment again, or bring a stored one back with git checkout"


def write_record(
    folder: Path,
    slug: str,
    *,
    preset: str,
    question: str,
    tables: dict[str, pd.DataFrame],
    seeds: dict[str, int | list[int]],
    seconds: float,
    parameters: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    arrays: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write folder/SLUG.json: rows in long format, fractions of six significant digits; before it `arrays` as SLUG.npz.

    `parameters` are those of the notebook that differ from its defaults, `provenance` entries in place of this
    process' own. ValueError if a number is infinite or all of a table's numbers are NaN; then nothing is written.
    """
    for name, table in tables.items():
        numbers = table.select_dtypes("float").to_numpy(float)
        if np.isinf(numbers).any() or (numbers.size and np.isnan(numbers).all()):
            raise ValueError(f"table {name!r} of {slug} holds infinite numbers or only NaN: it is not written")
    record = {
        "schema": SCHEMA,
        "preset": preset,
        "question": question,
        "provenance": {
            "command": papermill_command(slug, {"preset": preset, **(parameters or {})}),
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
            "device": device_name(),
            "versions": {"python": platform.python_version(), **package_versions()},
            "seeds": seeds,
            "seconds": round(seconds, 1),
            **(provenance or {}),
        },
        "tables": {name: t.astype(object).where(t.notna(), None).to_dict("records") for name, t in tables.items()},
    }
    text = json.dumps(_rounded(record), indent=1, allow_nan=False) + "\n"
    text = re.sub(r"(?<=[\[{])\n {4,}|\n {3,}(?=[]}])", "", text)  # a table's row is a line
    if arrays:
        write_arrays(folder / f"{slug}.npz", arrays)
    return write_atomically(folder / f"{slug}.json", re.sub(r"\n {4,}", " ", text).encode())


def papermill_command(slug: str, parameters: dict[str, Any]) -> str:
    """The command line that executes a notebook with these parameters."""
    given = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in parameters.items())
    return f"papermill notebooks/{slug}.ipynb {given}"


def read_record(path: Path) -> dict[str, Any]:
    """A record's content; ValueError if the file is missing, half-written or not of this schema."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"record {path} is missing or corrupt ({error}): {AGAIN}") from None
    problems, record = [], record if isinstance(record, dict) else {}
    if set(record) != KEYS or record["schema"] != SCHEMA:
        problems.append(f"the keys must be {sorted(KEYS)} with schema = {SCHEMA}, found {sorted(record)}")
    else:
        if set(record["provenance"]) != PROVENANCE:
            problems.append(f"provenance needs {sorted(PROVENANCE)}, has {sorted(record['provenance'])}")
        for name, rows in record["tables"].items():
            if not rows or any(set(row) != set(rows[0]) for row in rows):
                problems.append(f"table {name!r} must have rows, all with the same columns")
    if problems:
        raise ValueError(f"record {path}: {'; '.join(problems)}")
    return record


@dataclass(frozen=True)
class Record:
    """What was measured before: a committed record and the arrays beside it, each read when it is asked for."""

    path: Path

    @cached_property
    def content(self) -> dict[str, Any]:
        return read_record(self.path)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return read_arrays(self.path.with_suffix(".npz"))

    @property
    def origin(self) -> str:
        """In words: by whom it was recorded, and when."""
        return f"recorded by us {self.content['provenance']['date']}"

    def table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        rows = pd.DataFrame(self.content["tables"][name])
        return rows.fillna(np.nan).infer_objects()  # bounds of few samples are null: numbers, not objects


def recorded(preset: str, slug: str, *, needed: bool = False) -> Record | None:
    """The committed record of a preset under this name, or None; one that is `needed` says so when it is read."""
    path = RESULTS / preset / f"{slug}.json"
    return Record(path) if needed or path.is_file() else None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write a compressed .npz that `numpy.load` reads without pickle, atomically."""
    np.savez_compressed(content := BytesIO(), **arrays)
    return write_atomically(path, content.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an .npz of `write_arrays`; ValueError if it is missing or half-written."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"arrays {path} are missing or corrupt ({error}): {AGAIN}") from None


def read_published(name: str) -> dict[str, Any]:
    """Read data/published/NAME.json: {"source": ..., ...} as transcribed or digitised."""
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def device_name() -> str:
    """The GPU's name, or what matters of the CPU: threads and instruction set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    count = f"{threads} thread{'s' * (threads > 1)}"
    return f"CPU, {count}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    """The commit of the code; "unknown" without git or outside a clone."""
    code = ["llama_long_utils", "experiments", "presets", "data/tiny-llama", "data/adapters", "data/tasks"]
    asked = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", *code])
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True).stdout
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with uncommitted changes" if changed else "")


def _rounded(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if isinstance(value, float):
        return value if value.is_integer() else float(f"{value:.6g}")  # a count may stand beside a missing one
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def package_versions() -> dict[str, str]:
    """Versions of the libraries that a result can depend on."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
