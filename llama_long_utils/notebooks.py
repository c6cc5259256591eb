"""What every notebook does: it starts with checked parameters, checks claims, says what it found and saves it."""

import ast
import inspect
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import preset_from_parameters
from llama_long_utils.records import device_name, recorded, write_record
from llama_long_utils.settings import Preset

_run: dict[str, Any] = {}  # of the notebook in this kernel: when it started, with which parameters


def check(claim: str, holds: bool) -> None:
    """Print a claim that holds; raise AssertionError with it if it does not."""
    if not holds:
        raise AssertionError(f"does not hold: {claim}")
    print(f"holds: {claim}")


NO_DIFFERENCE = "no difference detected"


def finding(claim: str, holds: bool) -> None:
    """Print whether a measured claim holds. Another preset may find something else, and its notebook goes on."""
    print(f"{'holds' if holds else 'does not hold'}: {claim}")


def shown(
    claim: str, found: Sequence[float], *, than: float = 0.0, above: bool = True, digits: int = 1, sign: bool = True
) -> None:
    """Print whether a number with its interval lies above `than`, as claimed, or below: "undecided" if neither."""
    _, low, high = found
    side = 1 if low > than else -1 if high < than else 0
    said = "undecided" if not side else "holds" if (side > 0) == above else "does not hold"
    print(f"{said}: {claim} ({measured(*found, digits=digits, sign=sign)})")


def say(text: str) -> None:
    """Show prose with measured numbers in it: Markdown, indented as the code is."""
    display(Markdown(inspect.cleandoc(text)))


def measured(value: float, low: float = math.nan, high: float = math.nan, *, digits: int = 2, sign: bool = True) -> str:
    """A number for prose, with its interval if there is one: "-0.083 [-0.104, -0.062]"."""
    form = f"{'+' if sign else ''}z,.{digits}f"
    bound = form.replace("z", "")  # where a bound rounds to zero, its sign tells on which side it lies
    interval = "" if math.isnan(low) else f" [{low:{bound}}, {high:{bound}}]"
    return f"{value:{form}}{interval}"


def verdict(
    value: float, low: float, high: float, below: str, above: str, level: str = NO_DIFFERENCE, *, digits: int = 3
) -> str:
    """What a difference with its interval says, for prose: `below` or `above` zero, or `level`; then the numbers."""
    if math.isnan(low):
        return f"undecided ({measured(value, digits=digits)}, too few for an interval)"
    word = below if high < 0 else above if low > 0 else level
    return f"{word} ({measured(value, low, high, digits=digits)})"


def show_table(table: pd.DataFrame, digits: int = 2) -> None:
    """Show a table as Markdown, which nbval compares: columns as they are named, floats with so many digits."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:z,.{digits}f}"
        return f"{value:,}" if type(value) is int or isinstance(value, np.integer) else str(value).replace("|", r"\|")

    numbers = [pd.api.types.is_numeric_dtype(table[name]) for name in table]
    lines = [[str(name) for name in table], ["---:" if number else "---" for number in numbers]]
    lines += [[text(value) for value in row] for row in table.itertuples(index=False, name=None)]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))


def start(namespace: dict[str, Any], parameters: dict[str, Any]) -> Preset:
    """As `preset_from_parameters`, with the notebook's `globals()`. Sets the style and silences the libraries."""
    preset = preset_from_parameters(namespace, parameters)
    _run.update(started=time.perf_counter(), parameters={name: namespace[name] for name in parameters})
    for name in ("transformers", "peft", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    from llama_long_utils.figures import use_style
    from llama_long_utils.training.host_memory import keep_freed_memory

    transformers_logging.set_verbosity_error()  # the import has set its own level
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()  # a bar of its own would stay in the stored outputs
    use_style()
    keep_freed_memory()
    return preset


def live_or_recorded(
    preset: Preset, slug: str, live: pd.DataFrame, table: str | None = None, *, own: bool = False
) -> tuple[pd.DataFrame, str]:
    """What to show, and where it comes from in words: a quick look's larger record if there is one, else `live`.

    `table` is the record's; None: its arrays, as columns. An `own` run is no quick look, or one of another adapter.
    """
    record = None if own else recorded(preset.name, slug)
    if record is None:
        return live, "computed live"
    return record.table(table) if table else pd.DataFrame(record.arrays), record.origin


def save(
    preset: Preset,
    slug: str,
    question: str,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, np.ndarray] | None = None,
    seeds: Mapping[str, Any] | None = None,
) -> None:
    """Write runs/PRESET/records/SLUG.json, and SLUG.npz beside it; parts that were kept meanwhile are removed.

    Time and parameters are those of the notebook since `start`. Seeds are, unless given, those of split and bootstrap.
    """
    folder, defaults = preset.run_folder, _defaults(slug)
    changed = {name: value for name, value in _run["parameters"].items() if defaults.get(name, _run) != value}
    write_record(
        folder / "records",
        slug,
        preset=preset.name,
        question=question,
        tables=dict(tables),
        seeds=dict(seeds or {"split": preset.data.split_seed, "bootstrap": preset.evaluation.seed}),
        seconds=time.perf_counter() - _run["started"],
        parameters=changed,
        provenance={"device": f"{device_name()}, {preset.base.dtype}"},
        arrays=dict(arrays or {}),
    )
    shutil.rmtree(folder / "measuring" / slug[:2], ignore_errors=True)
    print("recorded:", ", ".join(tables))


def _defaults(slug: str) -> dict[str, Any]:
    """The parameters of a notebook as its file has them; none if it is not in notebooks/."""
    path = REPOSITORY / "notebooks" / f"{slug}.ipynb"
    cells = json.loads(path.read_bytes())["cells"] if path.is_file() else []
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            lines = ast.parse("".join(cell["source"])).body
            return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    return {}
