"""Runs the notebooks headless: `make run`, `make notebooks`, or one with `--only`.

A run writes below runs/PRESET/ only. Run again, it passes over every notebook that finished with the same code, preset,
parameters, model, adapter and texts, and whose outputs are still as it left them.
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from multiprocessing import connection, get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from llama_long_utils.commands import run_command
from llama_long_utils.paths import REPOSITORY, RESULTS, alone, check_adapter, file_sha256, write_atomically
from llama_long_utils.presets import closest, load_preset, preset_names
from llama_long_utils.progress import FILE
from llama_long_utils.settings import Preset
from tools.sequence import Notebook, delivered

TRAINS = "05_finetune_qlora"  # the adapter that others read
# What takes most time at preset tiny: begun last, one of them would keep one process at work and the other idle.
LONGEST = ["05", "06", "10", "07", "09", "11", "12", "08", "04"]
GLANCE = 1.0  # seconds between two looks for an adapter that others wait for
PAUSE = 15.0  # seconds between two lines that say how far a notebook is
LITERALS = {"none": None, "null": None, "true": True, "false": False}


def run(
    preset: Preset, chosen: list[Notebook], parameters: dict[str, Any], *, again: bool = False, store: bool = False
) -> None:
    """Execute notebooks in order by papermill, one progress line each.

    Args:
        again: also those that finished before.
        store: before a notebook whose defaults are a quick look, measure and store its record.

    Raises:
        ValueError: a parameter that a chosen notebook does not have.
        RuntimeError: a cell failed; the notebook so far is in runs/.
    """
    for notebook in chosen:
        check_parameters(notebook, parameters)
    base_sha256 = _base_sha256(preset) if any(notebook.needs_base for notebook in chosen) else ""
    for number, notebook in enumerate(chosen, start=1):
        line = f"[{number}/{len(chosen)}] {notebook.slug}"
        if store and notebook.record_with:
            entry = f"{notebook.slug}, record"
            if execute(notebook, preset, notebook.record_with, base_sha256, entry, f"{line}, its record", again=again):
                from tools.store import store_record

                store_record(preset.run_folder / "records" / f"{notebook.slug}.json", RESULTS / preset.name)
        execute(notebook, preset, parameters, base_sha256, notebook.slug, line, again=again)
    print(f"executed notebooks: {_shown(preset.run_folder / 'notebooks')}")
    figures = [path for notebook in chosen for path in outputs(notebook, preset) if path.suffix == ".png"]
    print("figures:", *map(_shown, figures), sep="\n  ")


def run_side_by_side(
    preset: Preset, chosen: list[Notebook], parameters: dict[str, Any], workers: int, *, again: bool = False
) -> None:
    """Execute several notebooks at a time, each in a process of its own that computes on one thread.

    The processes are forks of this one, and their kernels of another, so that what takes long to import, parse or check
    is imported, parsed and checked once. What uses a GPU must be no fork: there kernels begin as they do for a single
    notebook.

    Raises:
        RuntimeError: a notebook failed; its process has said why.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before there is a process of which kernels are forked
    import torch

    from tools import kernels

    torch.set_num_threads(1)  # a fork of a process whose threads have worked hangs in its first product
    with nullcontext() if torch.cuda.is_available() else kernels.serving():
        import papermill  # noqa: F401

        if any(notebook.needs_base for notebook in chosen):
            _base_sha256(preset)
        run_key(chosen[0], preset, parameters, "")
        failed = _in_processes(preset, chosen, workers, lambda one: run(preset, [one], parameters, again=again))
    if failed:
        raise RuntimeError(f"failed, as said above: {', '.join(failed)}")


def _in_processes(
    preset: Preset, chosen: list[Notebook], workers: int, execute_one: Callable[[Notebook], None]
) -> list[str]:
    """Execute each notebook in a fork, longest first; the names of those that failed or could not begin, in order.

    What reads an adapter waits until notebook 5 has trained a new one, or has ended.
    """
    trained_before = _trained(preset)
    waiting = sorted(chosen, key=lambda one: LONGEST.index(one.slug[:2]) if one.slug[:2] in LONGEST else len(LONGEST))
    running: dict[int, tuple[ForkProcess, Notebook]] = {}
    failed: list[str] = []
    while waiting or running:
        trains = any(one.slug == TRAINS for one in [*waiting, *(one for _, one in running.values())])
        trains = trains and _trained(preset) == trained_before
        ready = [one for one in waiting if not (trains and one.needs_adapter)]
        for notebook in ready[: workers - len(running)]:
            waiting.remove(notebook)
            process = get_context("fork").Process(target=run_command, args=[partial(execute_one, notebook)])
            process.start()
            running[process.sentinel] = process, notebook
        idle = trains and waiting and len(running) < workers
        for sentinel in connection.wait(list(running), GLANCE if idle else None):
            process, notebook = running.pop(sentinel)
            process.join()
            if process.exitcode:
                left_out = [one for one in waiting if notebook.slug == TRAINS and one.needs_adapter]
                waiting = [one for one in waiting if one not in left_out]
                failed += [one.slug for one in (notebook, *left_out)]
    return sorted(failed)


def _trained(preset: Preset) -> dict[Path, int]:
    """The adapters that notebook 5 has left, each put in its place as a whole, and when."""
    return {card: card.stat().st_mtime_ns for card in preset.run_folder.glob("training/*/adapter/adapter_card.json")}


def _shown(path: Path) -> Path:
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def execute(
    notebook: Notebook,
    preset: Preset,
    parameters: dict[str, Any],
    base_sha256: str,
    entry: str,
    line: str,
    *,
    again: bool,
) -> bool:
    """Execute one notebook and return True, or False if it finished before as it would now.

    Args:
        entry: name under which runs/PRESET/done remembers that it finished.
        line: start of its progress lines.

    Raises:
        RuntimeError: a cell failed, the kernel died, or another run is at this notebook.
        OSError: the run folder cannot be written to.
    """
    done = preset.run_folder / "done"  # one file for each, so that runs side by side do not overwrite each other's
    check_writable(done)
    with alone(done / f"{notebook.slug}.lock", f"another run is executing {notebook.slug}"):
        return _execute_alone(notebook, preset, parameters, base_sha256, done / f"{entry}.json", line, again=again)


def _execute_alone(
    notebook: Notebook,
    preset: Preset,
    parameters: dict[str, Any],
    base_sha256: str,
    entry: Path,
    line: str,
    *,
    again: bool,
) -> bool:
    key = run_key(notebook, preset, parameters, base_sha256)
    if not again and finished(entry, key):
        print(f"{line}: finished before (--again runs it anew)", flush=True)
        return False
    print(f"{line} ...", flush=True)
    for name in {entry.stem, notebook.slug}:  # what they left in runs/ is overwritten from now on
        entry.with_stem(name).unlink(missing_ok=True)
    started = time.perf_counter()
    output = preset.run_folder / "notebooks" / notebook.path.name
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lines_of_progress(line):
        _papermill(notebook.path, output, {"preset": preset.name, **parameters})
    left = {str(path.relative_to(preset.run_folder)): file_sha256(path) for path in outputs(notebook, preset)}
    write_atomically(entry, json.dumps({"key": key, "outputs": left}, indent=1).encode())
    print(f"{line}: {time.perf_counter() - started:.0f} s", flush=True)
    return True


def check_writable(folder: Path, what: str = "a run") -> None:
    """Make the folder; raise OSError in words if nothing can be written to it, before anything heavy is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {_shown(folder)}: {error.strerror}; {what} writes only there") from None


@contextmanager
def _lines_of_progress(line: str) -> Iterator[None]:
    """While a notebook runs, a line now and then says how far its long cell is."""
    ended = threading.Event()
    with tempfile.NamedTemporaryFile("r", prefix="llama-long-progress-", encoding="utf-8") as file:

        def follow() -> None:
            said = ""
            while not ended.wait(PAUSE):
                file.seek(0)
                text = file.read()
                if text and text != said:  # between two bars there is none
                    print(f"{line}: {text}", flush=True)
                said = text or said

        os.environ[FILE] = file.name  # the kernel inherits it
        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            del os.environ[FILE]


def _papermill(path: Path, output: Path, parameters: dict[str, Any]) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("traitlets").setLevel(logging.CRITICAL)  # the kernel manager's lines between ours
    where = _shown(output.parent)
    try:
        papermill.execute_notebook(
            path,
            output,
            parameters=parameters,
            cwd=path.parent,
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=50"],  # not even that it was interrupted
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        raise RuntimeError(f"{error.ename}: {error.evalue} (the notebook up to there: {where})") from None
    except DeadKernelError:
        raise RuntimeError(
            f"the kernel of {path.stem} was killed, most often for lack of memory (the notebook up to there: {where})"
        ) from None


def outputs(notebook: Notebook, preset: Preset) -> list[Path]:
    """What a notebook has left in runs/: itself, its figures, its record and the arrays beside it, and what else."""
    own = (f"notebooks/{notebook.slug}.ipynb", f"figures/{notebook.slug[:2]}_*.png", f"records/{notebook.slug}.*")
    return [path for pattern in (*own, *notebook.leaves) for path in sorted(preset.run_folder.glob(pattern))]


def finished(entry: Path, key: str) -> bool:
    """Whether it finished with this key, and all that it left is still there, unchanged."""
    try:
        done = json.loads(entry.read_bytes())
        same = [file_sha256(entry.parent.parent / name) == sha256 for name, sha256 in done["outputs"].items()]
        return done["key"] == key and bool(same) and all(same)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def check_parameters(notebook: Notebook, parameters: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that the notebook does not have (papermill only warns)."""
    if "preset" in parameters:
        raise ValueError(f"give the preset as --preset {parameters['preset']}, not as a parameter")
    cells = json.loads(notebook.path.read_bytes())["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    known = [name.id for line in ast.parse(source).body if isinstance(line, ast.Assign) for name in line.targets]
    for name in parameters:
        if name not in known:
            raise ValueError(f"{notebook.slug} has no parameter {name!r}: it has {known}{closest(name, known)}")
        if name.endswith("adapter") and isinstance(parameters[name], str):
            check_adapter(parameters[name])


def run_key(notebook: Notebook, preset: Preset, parameters: dict[str, Any], base_sha256: str) -> str:
    """A hash of everything that a notebook's results depend on; comments and prose are no part of it."""
    cells = [cell for cell in json.loads(notebook.path.read_bytes())["cells"] if cell["cell_type"] == "code"]
    code = [_without_comments("".join(cell["source"])) for cell in cells]
    packages = ("llama_long_utils", "experiments", "tools")
    files = [path for name in packages for path in sorted((REPOSITORY / name).rglob("*.py"))]
    code += [_without_comments(path.read_text("utf-8")) for path in files]
    named = ["data/tasks", "data/results", "data/published", "data/adapters", "data/corpora.json"]
    text = "\n".join(code)  # presets that are shown, not those of a user's own
    shown = (name for name in preset_names() if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text))
    named += [f"presets/{name}.toml" for name in shown]
    named += sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "experiments").glob("*.toml"))
    named += [source.name for source in preset.data.mixture]
    named += [value for value in parameters.values() if isinstance(value, str)]
    folders = {name: folder_state(REPOSITORY / name) for name in named}
    adapter = ""
    if notebook.needs_adapter:
        from llama_long_utils.model.adapters import find_adapter

        try:
            adapter = file_sha256(find_adapter(preset) / "adapter_model.safetensors")
        except ValueError:
            adapter = "none"  # the notebook says so
    of_base = base_sha256 if notebook.needs_base else ""
    parts = [code, repr(preset), parameters, of_base, adapter, folders]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def folder_state(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file below a path; none for a folder that holds this repository."""
    try:
        if not path.exists() or REPOSITORY.is_relative_to(path.resolve()):
            return []
    except (OSError, ValueError):  # no name of a file, such as a text of a thousand characters
        return []
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@cache  # most files are as they were for the notebook before: half a second for each
def _without_comments(source: str) -> str:
    return ast.unparse(ast.parse(source))


def _base_sha256(preset: Preset) -> str:
    from llama_long_utils.model.weights import locate_base, weights_sha256

    return weights_sha256(locate_base(preset))


def parameter(text: str) -> Any:
    """The value of a parameter: none, a truth value, a number, a list or an object in JSON; all else is a string."""
    if text.lower() in LITERALS:
        return LITERALS[text.lower()]
    for read in (int, float, json.loads if text[:1] in ("[", "{", '"') else int):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def arguments() -> argparse.Namespace:
    """What was asked for; heavy modules are imported only after this."""
    parser = argparse.ArgumentParser(prog="python -m tools.run", description=__doc__)
    parser.add_argument("--preset", default="tiny", help="a file in presets/ (default: tiny)")
    parser.add_argument("--only", metavar="NN", help="run one notebook: its number or name")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--again", action="store_true", help="run notebooks anew that finished before")
    parser.add_argument("--store", action="store_true", help="store outputs, figures and records in the repository")
    parser.add_argument("--workers", type=int, default=1, help="notebooks at a time, on one thread each (default: 1)")
    asked = parser.parse_args()
    if asked.workers < 1 or (asked.workers > 1 and asked.store):
        parser.error(f"--workers {asked.workers}: give at least 1, and only 1 with --store")
    wanted = asked.only or ""
    wanted = wanted.zfill(2) if wanted.isdecimal() else wanted
    asked.chosen = [notebook for notebook in delivered() if notebook.slug.startswith(wanted)]
    if not asked.chosen or asked.only == "":
        parser.error(f"no notebook {asked.only!r}: there are {[notebook.slug for notebook in delivered()]}")
    if asked.store and (asked.only or asked.p or asked.preset != parser.get_default("preset")):
        parser.error("--store stores a run of all notebooks at their defaults: leave out --only, --preset and -p")
    return asked


def main() -> None:
    """The command line."""
    asked = arguments()
    preset = load_preset(asked.preset)
    parameters = {name: parameter(value) for name, value in asked.p}
    if asked.workers > 1 and len(asked.chosen) > 1:
        for notebook in asked.chosen:
            check_parameters(notebook, parameters)
        run_side_by_side(preset, asked.chosen, parameters, asked.workers, again=asked.again)
        return
    run(preset, asked.chosen, parameters, again=asked.again, store=asked.store)
    if asked.store:
        from tools.readme import write_generated
        from tools.store import store_outputs

        store_outputs(preset)
        write_generated()


if __name__ == "__main__":
    run_command(main, "interrupted: the same command continues")
