"""Runs the notebooks headless: `make run`, `make notebooks`, or one with `--only`.

A run writes below runs/PRESET/ only. Run again, it skips every notebook that finished with the same
code, preset and parameters, so an interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import time
from typing import Any

import nbformat
import papermill
import yaml

from llama_long_utils.model.weights import locate_base, weights_sha256
from llama_long_utils.notebooks import Notebook, delivered
from llama_long_utils.paths import REPOSITORY, RESULTS, write_atomically
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import Preset
from tools.readme import write_generated
from tools.store import store_outputs, store_record


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
    arguments = parser.parse_args()
    wanted = (arguments.only or "").zfill(2) if (arguments.only or "").isdecimal() else (arguments.only or "")
    chosen = [n for n in delivered() if n.slug.startswith(wanted)]
    if not chosen:
        parser.error(f"no notebook {arguments.only!r}: there are {[notebook.slug for notebook in delivered()]}")
    if arguments.store and (arguments.only or arguments.p or arguments.preset != parser.get_default("preset")):
        parser.error("--store stores a run of all notebooks at their defaults: leave out --only, --preset and -p")
    try:
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
