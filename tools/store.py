"""Storing what a run left: outputs, figures, records, the adapter."""

import shutil
from pathlib import Path
from typing import Any

import nbformat

from llama_long_utils.model.adapters import find_adapter
from llama_long_utils.model.weights import weights_sha256
from llama_long_utils.paths import ADAPTERS, REPOSITORY, RESULTS, write_atomically
from llama_long_utils.records import read_record
from llama_long_utils.settings import Preset
from tools.sequence import delivered

# They differ between two runs that agree in every result.
TIMING_COLUMNS = {"tokens_per_second", "peak_gib"}


def store_outputs(preset: Preset) -> None:
    """Copy what a run of all notebooks left in runs/ to where it is committed.

    The notebooks get the outputs of their run, the figures go to figures/, and a record replaces the
    committed one only if a result differs, so that storing the same run twice changes nothing.
    """
    for notebook in delivered():
        stored = nbformat.read(notebook.path, as_version=4)
        executed = nbformat.read(preset.run_folder / "notebooks" / notebook.path.name, as_version=4)
        ran = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        count = 0
        for cell, run_cell in zip(stored.cells, ran, strict=True):
            if cell.cell_type == "code":
                count += 1
                cell.outputs, cell.execution_count = run_cell.outputs, count
                for output in cell.outputs:
                    if "execution_count" in output:
                        output["execution_count"] = count
        write_notebook(stored, notebook.path)
    for figure in sorted(preset.run_folder.glob("figures/*.png")):
        write_atomically(REPOSITORY / "figures" / figure.name, figure.read_bytes())
    quick = {notebook.slug for notebook in delivered() if notebook.record_with}
    for record in sorted(preset.run_folder.glob("records/*.json")):
        if record.stem not in quick:  # their records were stored when they were measured
            store_record(record, RESULTS / preset.name)
    adapter = find_adapter(preset)
    if adapter != ADAPTERS / preset.name and weights_sha256(adapter) != weights_sha256(ADAPTERS / preset.name):
        shutil.copytree(adapter, ADAPTERS / preset.name, dirs_exist_ok=True)


def store_record(record: Path, folder: Path) -> None:
    """Copy a record and the arrays beside it into a folder, unless it holds the same results."""
    committed = folder / record.name
    if committed.is_file() and results(committed) == results(record):
        return
    for path in sorted(record.parent.glob(f"{record.stem}.*")):
        write_atomically(folder / path.name, path.read_bytes())


def results(record: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables of a record without the columns that time the machine."""
    tables = read_record(record)["tables"]
    return {
        name: [{key: value for key, value in row.items() if key not in TIMING_COLUMNS} for row in rows]
        for name, rows in tables.items()
    }


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook atomically, ending in one newline."""
    write_atomically(path, (nbformat.writes(notebook, version=4).rstrip("\n") + "\n").encode())
