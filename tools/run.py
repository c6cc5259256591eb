"""Runs the notebooks headless: `make run`, `make notebooks`, or one with `--only`.

A run writes below runs/PRESET/ only. Run again, it skips every notebook that finished with the same
code, preset and parameters, so an interrupted run goes on where it stopped.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import time
from dataclasses import asdict
from typing import Any

import nbformat
import papermill
import yaml

from experiments.race import arm_record, collect, race_arms
from experiments.searches import compare_trainings, search_longrope, search_rope_base
from llama_long_utils.model.weights import locate_base, weights_sha256
from llama_long_utils.notebooks import Notebook, delivered
from llama_long_utils.paths import REPOSITORY, RESULTS, write_atomically
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import Preset
from tools.readme import write_generated
from tools.store import store_outputs, store_record, write_notebook


def run(
    preset: Preset, chosen: list[Notebook], parameters: dict[str, Any], *, again: bool = False, store: bool = False
) -> None:
    """Execute notebooks in order by papermill, one progress line each.

    Args:
        again: also those that finished before.
        store: before a notebook whose defaults are a quick look, measure and store its record.

    Raises:
        ValueError: a parameter that a chosen notebook does not have.
        papermill.PapermillExecutionError: a cell failed; the notebook so far is in runs/.
    """
    for notebook in chosen:
        check_parameters(notebook, parameters)
    base_sha256 = weights_sha256(locate_base(preset))
    for number, notebook in enumerate(chosen, start=1):
        line = f"[{number}/{len(chosen)}] {notebook.slug}"
        if store and notebook.record_with:
            entry = f"{notebook.slug}, record"
            if execute(notebook, preset, notebook.record_with, base_sha256, entry, f"{line}, its record", again=again):
                store_record(preset.run_folder / "records" / f"{notebook.slug}.json", RESULTS / preset.name)
        execute(notebook, preset, parameters, base_sha256, notebook.slug, line, again=again)
    figures = sorted(preset.run_folder.glob("figures/*.png"))
    print(f"executed notebooks: {(preset.run_folder / 'notebooks').relative_to(REPOSITORY)}")
    print("figures:", *(path.relative_to(REPOSITORY) for path in figures), sep="\n  ")


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
        entry: name under which done.json remembers that it finished.
        line: start of its progress lines.
    """
    done_file = preset.run_folder / "done.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    key = run_key(notebook, preset, parameters, base_sha256)
    if done.get(entry) == key and not again:
        print(f"{line}: finished before (--again runs it anew)", flush=True)
        return False
    print(f"{line} ...", flush=True)
    for name in {entry, notebook.slug}:  # what they left in runs/ is overwritten from now on
        done.pop(name, None)
    write_atomically(done_file, json.dumps(done, indent=1).encode())
    started = time.perf_counter()
    output = preset.run_folder / "notebooks" / notebook.path.name
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        notebook.path,
        output,
        parameters={"preset": preset.name, **parameters},
        cwd=notebook.path.parent,
        progress_bar=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # no warnings of the kernel between our lines
    )
    done[entry] = key
    write_atomically(done_file, json.dumps(done, indent=1).encode())
    print(f"{line}: {time.perf_counter() - started:.0f} s", flush=True)
    return True


def race(preset: Preset, *, workers: int) -> None:
    """Measure every arm of the race that has no record yet, then join all of them in the committed record.

    Each arm is a papermill execution of the first part of 11_ablations, up to the cell tagged "arm".

    Args:
        workers: arms at a time; with several, each computes on one thread.
    """
    notebook = next(notebook for notebook in delivered() if notebook.slug == "11_ablations")
    base_sha256 = weights_sha256(locate_base(preset))
    arms = race_arms(preset)
    waiting = [arm for arm in arms if not arm_record(preset, arm, base_sha256).is_file()]
    print(f"{len(arms)} arms, {len(arms) - len(waiting)} of them measured before", flush=True)
    first_part = nbformat.read(notebook.path, as_version=4)
    last = next(n for n, cell in enumerate(first_part.cells) if "arm" in cell.metadata.get("tags", []))
    first_part.cells = first_part.cells[: last + 1]
    folder = preset.run_folder / "race"
    write_notebook(first_part, folder / "arm.ipynb")
    (folder / "arms").mkdir(exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if workers > 1 else {}
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=os.environ.update, initargs=(threads,)) as pool:
        running = {
            pool.submit(
                papermill.execute_notebook,
                folder / "arm.ipynb",
                folder / "arms" / f"{arm.method}-{arm.training}-{arm.seed}.ipynb",
                parameters={"preset": preset.name, **asdict(arm)},
                cwd=notebook.path.parent,
                progress_bar=False,
                extra_arguments=["--IPKernelApp.log_level=40"],
            ): arm
            for arm in waiting
        }
        for number, done in enumerate(concurrent.futures.as_completed(running), start=len(arms) - len(waiting) + 1):
            try:
                done.result()
            except Exception:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            print(f"[{number}/{len(arms)}] {running[done]}", flush=True)
    collected = collect(preset, base_sha256, preset.run_folder / "records")
    store_record(collected, RESULTS / preset.name)


def check_parameters(notebook: Notebook, parameters: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that the notebook does not have (papermill only warns)."""
    if "preset" in parameters:
        raise ValueError(f"give the preset as --preset {parameters['preset']}, not as a parameter")
    known = papermill.inspect_notebook(notebook.path)
    for name in {"preset", *parameters}:
        if name not in known:
            raise ValueError(f"{notebook.slug} has no parameter {name!r}: it has {sorted(known)}")


def run_key(notebook: Notebook, preset: Preset, parameters: dict[str, Any], base_sha256: str) -> str:
    """A hash of everything a notebook's results depend on."""
    cells = [cell.source for cell in nbformat.read(notebook.path, as_version=4).cells]
    key = hashlib.sha256(json.dumps([cells, parameters, base_sha256], sort_keys=True).encode())
    modules = sorted((REPOSITORY / "llama_long_utils").glob("*.py"))
    for path in [*modules, REPOSITORY / "presets" / f"{preset.name}.toml"]:
        key.update(path.read_bytes())
    return key.hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llama_long_utils.run", description=__doc__)
    parser.add_argument("--preset", default="tiny", help="a file in presets/ (default: tiny)")
    parser.add_argument("--only", metavar="NN", help="run one notebook: its number or name")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("--again", action="store_true", help="run notebooks anew that finished before")
    parser.add_argument("--store", action="store_true", help="store outputs, figures and records in the repository")
    parser.add_argument("--race", action="store_true", help="measure every arm of 11_ablations and store its record")
    parser.add_argument("--longrope", action="store_true", help="search LongRoPE's factors and store their record")
    parser.add_argument("--rope-bases", type=float, nargs="+", help="measure the base at these and store the record")
    parser.add_argument("--trainings", nargs="+", help="train in these ways of [race] and store what they are worth")
    parser.add_argument("--workers", type=int, default=1, help="with --race: arms at a time (default: 1)")
    arguments = parser.parse_args()
    wanted = (arguments.only or "").zfill(2) if (arguments.only or "").isdecimal() else (arguments.only or "")
    chosen = [n for n in delivered() if n.slug.startswith(wanted)]
    if not chosen:
        parser.error(f"no notebook {arguments.only!r}: there are {[notebook.slug for notebook in delivered()]}")
    if arguments.store and (arguments.only or arguments.p or arguments.preset != parser.get_default("preset")):
        parser.error("--store stores a run of all notebooks at their defaults: leave out --only, --preset and -p")
    try:
        if arguments.longrope:
            print(search_longrope(load_preset(arguments.preset), rounds=120, texts=6, seed=0))
            return
        if arguments.rope_bases:
            print(search_rope_base(load_preset(arguments.preset), arguments.rope_bases, texts=2, seed=0))
            return
        if arguments.trainings:
            print(compare_trainings(load_preset(arguments.preset), arguments.trainings, seed=0))
            return
        if arguments.race:
            race(load_preset(arguments.preset), workers=arguments.workers)
            return
        parameters = {name: yaml.safe_load(value) for name, value in arguments.p}
        run(load_preset(arguments.preset), chosen, parameters, again=arguments.again, store=arguments.store)
    except papermill.PapermillExecutionError as error:
        where = (REPOSITORY / "runs" / arguments.preset / "notebooks").relative_to(REPOSITORY)
        raise SystemExit(f"error: {error.ename}: {error.evalue}\n(the notebook up to there: {where})") from None
    except (ValueError, RuntimeError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.store:
        store_outputs(load_preset(arguments.preset))
        write_generated()


if __name__ == "__main__":
    main()
