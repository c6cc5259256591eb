"""Train a preset's adapter: `python -m llama_long_utils.train --preset NAME`. The same command continues it.

On two GPUs: `torchrun --nproc-per-node 2 -m llama_long_utils.train --preset NAME`, which takes whole sequences on each.
Each reads a stream from the hub itself; what one of them has tokenized is not tokenized again on the same machine.
With `--context-parallel 2` both share every sequence, so that each needs about half of the memory for activations.
With `--shard-base` each keeps half of the base's layers, for a base that does not fit on one.
Preference tuning (reward, rl, dpo) runs in one process.
Several nodes need one repository folder, which all of them see. In a notebook, run it in a cell with `!` in front, or
let accelerate's `notebook_launcher` call a function that imports and calls `train_adapter`, in a new kernel.
"""

import argparse
import os
from dataclasses import replace

from llama_long_utils.commands import PYTHON, at_least, run_command
from llama_long_utils.data.sources import check_sources
from llama_long_utils.paths import ADAPTERS, check_adapter
from llama_long_utils.presets import check_model, load_preset, with_numbers
from llama_long_utils.settings import Preset

ONE_PROCESS = ("reward", "rl", "dpo")
STAGES = ("extension", "sft", *ONE_PROCESS)
NEXT = {"sft": "reward  # or rl, dpo", "reward": "rl"}  # what may follow


def train() -> None:
    """What the command does. Heavy imports come after its arguments are checked."""
    parser = argparse.ArgumentParser(prog="python -m llama_long_utils.train", description=__doc__)
    some = at_least(int, 1)
    parser.add_argument("--preset", default="tiny", help="a file in presets/ (default: tiny)")
    parser.add_argument("--stage", choices=STAGES, default="extension", help="what to train (default: the extension)")
    parser.add_argument("--steps", type=int, help="instead of the preset's or stage's; fewer warm up in proportion")
    parser.add_argument("--seed", type=int, help="instead of the preset's training.seed, or that of the stage")
    parser.add_argument("--control", action="store_true", help="keep the base's RoPE: a control without the extension")
    parser.add_argument("--adapter", type=os.path.abspath, metavar="FOLDER", help="where a stage begins")
    parser.add_argument("--report-every", type=at_least(int, 0), default=10, metavar="N", help="steps between lines")
    parser.add_argument("--context-parallel", type=some, default=1, metavar="N", help="processes that share a sequence")
    parser.add_argument("--shard-base", action="store_true", help="each process keeps a part of the base's layers")
    chosen = parser.parse_args()
    preset = load_preset(chosen.preset)
    check_model(preset.base.source, preset=preset.name)
    check_sources(preset.data.sources, preset.data.held_out)
    check_adapter(chosen.adapter)
    processes, shared = int(os.environ.get("WORLD_SIZE", "1")), chosen.context_parallel
    if chosen.stage in ONE_PROCESS and processes != 1:
        parser.error(f"--stage {chosen.stage} runs in one process: start it without a launcher")
    if chosen.stage != "extension":
        if any((chosen.control, shared > 1, chosen.shard_base)):
            parser.error("--control, --context-parallel and --shard-base are for the extension")
        return tune(preset, chosen)
    if chosen.adapter:
        parser.error("--adapter is where sft, reward, rl and dpo begin: the extension begins at the base")
    if processes % shared or (chosen.shard_base and processes == 1):
        needs, many = f"--context-parallel {shared}" if shared > 1 else "--shard-base", max(shared, 2)
        start = f"torchrun --nproc-per-node {many} -m llama_long_utils.train ..."
        parser.error(f"{needs} needs {many} processes or a multiple, not {processes}: {start}")
    settings = with_numbers(preset.training, "training", steps=chosen.steps, seed=chosen.seed)
    scaling = preset.control_rope if chosen.control else preset.extended_rope

    from llama_long_utils.training.adapter import train_adapter
    from llama_long_utils.training.processes import join_processes

    options = {"context_parallel": shared, "sharded_base": chosen.shard_base}
    trained = train_adapter(preset, settings=settings, scaling=scaling, progress=chosen.report_every, **options)
    if join_processes().is_main_process:
        last, given = trained.log[-1], f" -p {'control_' * chosen.control}adapter {trained.folder}"
        print(f"{last['step']:,} steps on {trained.label_tokens:,} labels, loss {last['loss']:.3f}: {trained.folder}")
        other = chosen.control or (chosen.steps, chosen.seed) != (None, None)  # than the notebook finds
        print(f"then: {PYTHON} -m tools.run --preset {preset.name} --only 06{given * other}", flush=True)
    join_processes().destroy_process_group()


def tune(preset: Preset, chosen: argparse.Namespace) -> None:
    """A stage after the extension: instruction tuning ("sft"), or a stage of preference tuning that follows it."""
    numbers = preset.preference
    if chosen.stage == "sft":
        tuned = with_numbers(preset.instruction, "instruction", steps=chosen.steps, seed=chosen.seed)
        preset = replace(preset, instruction=tuned)
    else:
        section = f"preference.{chosen.stage}"
        steps = {chosen.stage: with_numbers(getattr(numbers, chosen.stage), section, steps=chosen.steps)}
        preset = replace(preset, preference=with_numbers(numbers, "preference", seed=chosen.seed, **steps))
        tuned = (*preset.run_folder.glob("instruction/*/adapter"), *ADAPTERS.glob(f"{preset.name}-instruction"))
        if not chosen.adapter and not any(tuned):
            raise ValueError(f"preset {preset.name!r} has no instruction-tuned adapter: run --stage sft first")

    from llama_long_utils.model.adapters import find_adapter
    from llama_long_utils.training.instruction import tune_instructions
    from llama_long_utils.training.preferences import tune_preferences
    from llama_long_utils.training.processes import join_processes
    from llama_long_utils.training.trainer import in_words

    if chosen.stage == "sft":
        tuned = tune_instructions(preset, adapter=chosen.adapter, progress=chosen.report_every)
    else:
        start = find_adapter(preset, chosen.adapter, stage="instruction")
        tuned = tune_preferences(preset, chosen.stage, start, progress=chosen.report_every)
    if join_processes().is_main_process:
        labels = f" on {tuned.label_tokens:,} labels" if tuned.label_tokens else ""  # "rl" samples its answers
        print(f"{tuned.log[-1]['step']:,} steps{labels}, {in_words(tuned.log[-1])}: {tuned.folder}", flush=True)
        other = (chosen.steps, chosen.seed) != (None, None)  # than the next stage finds
        start = tuned.folder if chosen.stage == "sft" else chosen.adapter
        begun = f" --adapter {start}" if other or chosen.adapter else ""
        if chosen.stage == "sft" or (chosen.stage in NEXT and not other):
            print(f"then: {PYTHON} -m llama_long_utils.train --preset {preset.name}{begun} --stage", NEXT[chosen.stage])
        if chosen.stage != "reward":
            given = f"--preset {preset.name} --adapter {tuned.folder}"
            print(f"or: {PYTHON} -m tools.merge {given} --to FOLDER  # an ordinary model", flush=True)
    join_processes().destroy_process_group()


if __name__ == "__main__":
    run_command(train, "stopped before the first step: the same command begins again")
