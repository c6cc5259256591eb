"""Measures short and long tasks before and after an extension. A stopped run continues where it was."""

import argparse
import sys
import time

from llama_long_utils.cache import digest
from llama_long_utils.commands import at_least, run_command, tokens
from llama_long_utils.evaluation.task_files import check_names
from llama_long_utils.paths import RESULTS, check_adapter
from llama_long_utils.presets import check_model, load_preset
from llama_long_utils.settings import ARMS

DEFAULT = ["hellaswag", "truthfulqa_mc1", "gsm8k", "humaneval", "squad", "hotpotqa", "mmlu"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    count = at_least(int, 1)
    parser.add_argument("--preset", required=True, help="a file in presets/")
    parser.add_argument("--tasks", nargs="+", default=DEFAULT, help="in data/tasks, or of lm-evaluation-harness")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["base", "extended"], help="the first is before")
    parser.add_argument("--items", type=count, help="of each task (default: all of a short one)")
    parser.add_argument("--long-count", type=count, default=50, help="of a long task, per length (50)")
    parser.add_argument("--lengths", nargs="+", type=tokens, default=[], help="of long prompts (default: the preset's)")
    parser.add_argument("--adapter", default="", help="its folder (default: the newest of the preset)")
    parser.add_argument("--allow-execution", action="store_true", help="run written programs without bubblewrap")
    parser.add_argument("--record", action="store_true", help="write to data/results, not to runs/PRESET/records")
    options = vars(parser.parse_args())
    name, tasks, record = (options.pop(key) for key in ("preset", "tasks", "record"))
    if len(set(options["arms"])) < max(2, len(options["arms"])):
        parser.error(f"--arms {' '.join(options['arms'])}: name two or more that differ, the first is before")
    started = time.perf_counter()
    preset = load_preset(name)
    if (longest := max(options["lengths"], default=0)) > preset.extension.window:
        parser.error(f"--lengths {longest} is above the window of {name}, {preset.extension.window}: use shorter ones")
    check_model(preset.base.source, preset=name)
    check_names(tasks)
    check_adapter(options["adapter"])
    folder = preset.run_folder / "records" / digest(tasks, options)  # a short run, as notebook 8's, leaves a long one

    import pandas as pd

    from llama_long_utils.evaluation.benchmarks import delta_table, measure, write_results

    items, (before, *others) = measure(preset, tasks, **options), options["arms"]
    path = write_results(
        preset,
        items,
        RESULTS / preset.name if record else folder,
        deltas=pd.concat([delta_table(items, before, other) for other in others]),
        seconds=time.perf_counter() - started,
        provenance={"command": " ".join(["python -m tools.benchmark", *sys.argv[1:]])},
    )
    print(path)


if __name__ == "__main__":
    run_command(main, "stopped: the same command continues where it was")
