"""The experiments, one command each: `python -m experiments NAME --help`."""

import argparse
import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from llama_long_utils.commands import at_least, run_command
from llama_long_utils.paths import REPOSITORY, RESULTS, check_adapter
from llama_long_utils.presets import closest, load_preset
from llama_long_utils.settings import METHODS, Preset

GPUS = [Path("/dev", name) for name in ("nvidiactl", "nvmap", "dxg", "kfd")]  # one of them is where a GPU is


def above(least: float, what: str, most: float = sys.float_info.max) -> Callable[[str], float]:
    """A converter for argparse: a number above `least`, at most `most`; `what` it is and an example for the message."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least < value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
        return value

    return number


rope_base = above(1, "RoPE base: give a finite number above 1, for example 1e6")
share = above(-1e-9, "share: give a number from 0 to 1", most=1.0)
seconds = above(0, "time: give seconds above 0, for example 435")
from_zero, some = at_least(int, 0), at_least(int, 1)


def arguments() -> argparse.Namespace:
    """What was asked for; heavy modules are imported only after this."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    race = commands.add_parser(
        "race", help="every arm of notebook 11 that has no record yet (hours; goes on if stopped)"
    )
    race.add_argument(
        "--times",
        type=at_least(int, 2),
        metavar="N",
        help="instead: full-length training of --methods in N times as many steps, in a record of its own",
    )
    race.add_argument("--methods", nargs="+", metavar="METHOD", help="with --times (default: none pi abf xpos_abf)")
    rate = above(0, "learning rate: give a number above 0, for example 5e-4")
    race.add_argument("--learning-rate", type=rate, help="with --times (default: the preset's)")
    arm = commands.add_parser("arm", help="one arm of the race (`make race` measures several at a time)")
    arm.add_argument("method", help="a RoPE method")
    arm.add_argument("training", help="a name in [race.trainings], or zero-shot")
    arm.add_argument("seed", type=from_zero)
    longrope = commands.add_parser("longrope", help="search LongRoPE's factors on training documents (10 minutes)")
    bases = commands.add_parser("rope-bases", help="read training documents at several RoPE bases, untrained")
    bases.add_argument("bases", type=rope_base, nargs="+", metavar="BASE")
    trainings = commands.add_parser("trainings", help="train in several ways of [race.trainings] and compare them")
    trainings.add_argument("names", nargs="+", metavar="NAME")
    quoting = commands.add_parser("quoting", help="train with several shares of sequences that quote themselves")
    quoting.add_argument("shares", type=share, nargs="+", metavar="SHARE")
    instruction = commands.add_parser(
        "instruction", help="the ablation of notebook 9 (half an hour; goes on if stopped)"
    )
    instruction.add_argument(
        "--questions", choices=["squad", "hotpotqa"], default="squad", help="to ask a real model (default: squad)"
    )
    instruction.add_argument("--arms", nargs="*", metavar="ARM", help="of a real model: measure these only, or none")
    instruction.add_argument("--seeds", type=from_zero, nargs="+", metavar="SEED", help="in place of 0 1 2")
    asking = commands.add_parser("self-instruct", help="a chat model asks about a preset's documents, for notebook 9")
    asking.add_argument("--writer", default="qwen2.5-coder-1.5b", help="the preset whose base is the chat model")
    asking.add_argument(
        "--chunks", type=some, default=60, help="to ask two questions about (default: 60; half an hour)"
    )
    preference = commands.add_parser(
        "preference", help="reward model, RL and DPO over seeds, for notebook 10 (half an hour; goes on if stopped)"
    )
    preference.add_argument("--adapter", metavar="FOLDER", help="instruction-tuned (default: as notebook 10 finds it)")
    preference.add_argument("--fresh", action="store_true", help="only the best arms, on new seeds (half an hour)")
    preference.add_argument(
        "--small", action="store_true", help="no controls or averages, texts of 2,048 tokens: for real models"
    )
    preference.add_argument("--seeds", type=from_zero, nargs="+", metavar="SEED", help="in place of 0 1 2")
    preference.add_argument("--arms", choices=["rl", "dpo"], nargs="+", help="in place of both")
    preference.add_argument(
        "--quoting",
        type=some,
        metavar="STEPS",
        help="first tune the extended adapter on short quotations, as asked",
    )
    dose = commands.add_parser("dose", help="train at growing doses in several ways, for notebook 6 (minutes on a GPU)")
    dose.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    dose.add_argument(
        "--seconds", type=seconds, default=435.0, help="begin nothing that would end later (default: 435)"
    )
    dose.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default: runs/PRESET/dose)")
    dose.add_argument("--prepare", type=Path, metavar="FILE", help="write texts and tasks as token ids, and stop")
    dose.add_argument(
        "--texts", choices=["first", "second"], default="first", help="to prepare: the set of texts (default: first)"
    )
    dose.add_argument("--inputs", type=Path, metavar="FILE", help="what --prepare wrote, maybe on another machine")
    dose.add_argument("--stages", nargs="+", metavar="WAY:STEPS", help="in place of those in experiments/dose.toml")
    dose.add_argument(
        "--tokens-at-once", type=some, metavar="TOKENS", help="of sequences trained together (a CPU has no room)"
    )
    dose.add_argument("--adapters", type=Path, nargs="+", metavar="FILE", help="of an earlier run: read, train none")
    dose.add_argument("--no-bases", action="store_true", help="do not read the untrained arms again")
    dose.add_argument("--record-of", type=Path, nargs="+", metavar="FOLDER", help="write the record of earlier runs")
    dose.add_argument("--doll", action="store_true", help="a few steps and texts, to see that everything runs")
    dose.add_argument(
        "--record", action="store_true", help="write the record into data/results, not beside the results"
    )
    context = commands.add_parser(
        "context", help="the loss of the same targets behind shorter and longer contexts, for notebook 13 (minutes)"
    )
    for command in (context, race, arm, longrope, bases, trainings, quoting, instruction, asking, preference, dose):
        command.add_argument("--preset", default="tiny", help="a file in presets/ (default: tiny)")
    pretraining = commands.add_parser(
        "pretraining", help="small models from scratch, short sequences first, and data mixes, for notebook 12 (hours)"
    )
    pretraining.add_argument("--cell", nargs=3, metavar=("SIZE", "ARM", "SEED"), help="measure this one only")
    pretraining.add_argument("--finished", action="store_true", help="join the cells that are measured, and no others")
    pretraining.add_argument("--add", action="store_true", help="the record keeps what it has, and gets finished cells")
    pretraining.add_argument("--sparse", action="store_true", help="sparse attention at equal cost, nothing else")
    pretraining.add_argument("--sparse-on-short", action="store_true", help="the same, trained on 512 tokens")
    pretraining.add_argument("--more-tokens", action="store_true", help="0.9M at the tokens of 16M (four hours)")
    pretraining.add_argument(
        "--size", help="a size with rates by pilots, with --seed, --speed or --join: 4M, or 16M on a GPU"
    )
    pretraining.add_argument(
        "--seed", type=from_zero, help="measure this seed's cells; several processes may run at a time"
    )
    pretraining.add_argument(
        "--seconds", type=seconds, help="begin nothing that would end later (default: 250 on a GPU, on a CPU no end)"
    )
    pretraining.add_argument("--steps", type=some, default=0, help="of each cell (default: the most that fit)")
    pretraining.add_argument("--card", type=share, default=0.5, help="share of the GPU that is ours (default: 0.5)")
    pretraining.add_argument("--speed", action="store_true", help="measure steps, on a GPU that nothing else uses")
    pretraining.add_argument("--join", type=Path, metavar="FOLDER", help="one record of what is in FOLDER/cells")
    pretraining.add_argument("--out", type=Path, default=RESULTS / "tiny", metavar="FOLDER", help="of that record")
    pretraining.add_argument("--commit", default="", help="of the code that measured, if git was not there, for --join")
    bench = commands.add_parser("bench", help="measure training steps, for notebook 4 (hours; goes on if stopped)")
    bench.add_argument("--trainers", action="store_true", help="only those beside other trainers (an hour of one core)")
    gpu = commands.add_parser(
        "gpu", help="measure training steps on a GPU against the ledger, for notebook 4 (9 minutes)"
    )
    gpu.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda (default), or cpu with --doll")
    gpu.add_argument("--doll", action="store_true", help="tiny shapes: a rehearsal without a GPU")
    gpu.add_argument(
        "--seconds", type=seconds, default=480.0, help="nothing starts that would end later (default: 480)"
    )
    gpu.add_argument(
        "--out", type=Path, default=REPOSITORY / "runs" / "gpu", help="folder of the record (default: runs/gpu)"
    )
    corpus = commands.add_parser("corpus", help="read a corpus that streams, and kill the reader (half an hour)")
    corpus.add_argument("--gib", type=above(0, "size: give GiB above 0, for example 1"), default=1.0, metavar="SIZE")
    corpus.add_argument("--out", type=Path, default=RESULTS / "tiny", metavar="FOLDER", help="of the record")
    commands.add_parser("tiny-llama", help="train data/tiny-llama again (one to two hours; needs a C++ compiler)")
    asked = parser.parse_args()
    for name in ("methods", "learning_rate"):
        if asked.command == "race" and getattr(asked, name) and not asked.times:
            parser.error(f"--{name.replace('_', '-')} is for a longer race: give --times N with it")
    if asked.command == "gpu" and asked.device == "cpu" and not asked.doll:
        parser.error("a CPU is too slow for models of 8B parameters: add --doll")
    maybe = any(map(Path.exists, GPUS)) or shutil.which("nvidia-smi")  # torch, which knows, takes a minute
    if asked.command == "gpu" and asked.device == "cuda" and not maybe:
        parser.error("there is no GPU here: --device cpu --doll rehearses the command without one")
    of_a_gpu = asked.command == "pretraining" and (asked.steps or asked.speed or asked.join or asked.seed is not None)
    if of_a_gpu and not asked.size:
        parser.error("--seed, --steps, --speed and --join are for a size with rates by pilots: add --size 4M or 16M")
    if asked.command == "pretraining" and asked.size and asked.seed is None and not (asked.speed or asked.join):
        parser.error("of a size with rates by pilots, name what to do: --seed, --speed or --join")
    return asked


def run_dose_checked(preset: Preset, asked: argparse.Namespace) -> Path:
    """The dose experiment's record or inputs, after checks that cost nothing."""
    from experiments.dose_settings import doll, read_doses, read_stages, way_of_label, ways_of
    from tools.run import check_writable

    doses, out = read_doses(preset.name), asked.out or preset.run_folder / "dose"
    record = RESULTS / preset.name if asked.record else None
    if asked.texts == "second" and (asked.doll or not asked.prepare):
        raise ValueError(
            "the second set of texts is for adapters that are trained already: give --prepare FILE with it"
        )
    if asked.doll and asked.record:
        raise ValueError("a doll's numbers are no record: leave out --record or --doll")
    if asked.doll:
        doses = doll(doses, preset)
    if asked.tokens_at_once:
        doses = dataclasses.replace(doses, tokens_at_once=asked.tokens_at_once)
    if asked.stages:
        ways = ways_of(preset, doses.other_bases)
        doses = dataclasses.replace(doses, stages=read_stages(asked.stages, ways))
    if asked.record_of:
        from experiments.dose_record import write_dose_record

        for run in asked.record_of:
            if list(run.glob("answers-full*-s0-*.json")):
                from experiments.task_requests import write_task_record

                print(write_task_record(preset, run, record or out, doses.tasks))
        return write_dose_record(asked.record_of, record or out, preset=preset.name)
    results = out / "results.jsonl"
    if results.exists():
        before = results.read_text()
        same = f'"stages": {json.dumps(doses.stages)}' in before and not asked.adapters
        if not same or '"kind": "end"' in before:
            raise ValueError(f"{out} holds results of an earlier run: name another folder with --out, or remove it")
    adapters = asked.adapters or ()
    for file in (asked.inputs, *adapters):
        if file and not file.is_file():
            raise ValueError(
                f"there is no file {file}: --inputs takes what --prepare wrote, --adapters the adapter-*.safetensors "
                "that an earlier run left in its folder"
            )
    for file in adapters:
        way_of_label(file.stem.removeprefix("adapter-").rpartition("-")[0], ways_of(preset, doses.other_bases))
    check_writable(asked.prepare.absolute().parent if asked.prepare else out, "the experiment")
    if asked.device == "cpu" or asked.prepare:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU
    elif not importlib.import_module("torch").cuda.is_available():
        raise ValueError("there is no CUDA device here: use --device cpu, which takes hours, or --doll with it")
    from experiments.dose import run_dose
    from experiments.dose_inputs import load_inputs, prepare, save_inputs
    from llama_long_utils.model.weights import load_tokenizer

    if asked.inputs:
        inputs = load_inputs(asked.inputs)
    else:
        inputs = prepare(preset, doses, load_tokenizer(preset.base.source), asked.texts, doll=asked.doll)
    if asked.prepare:
        save_inputs(inputs, asked.prepare)
        return asked.prepare
    options = {"seconds": asked.seconds, "bases": not asked.no_bases, "sixteen_bit": not asked.no_bases}
    options["adapters"] = adapters
    command = " ".join(["python -m experiments", *sys.argv[1:]])
    try:
        return run_dose(preset, doses, inputs, out, **options, command=command, record=record)
    except KeyboardInterrupt:
        raise RuntimeError(f"interrupted: the same command goes on from what is kept in {out}") from None


def check_names(preset: Preset | None, asked: argparse.Namespace) -> None:
    """ValueError for what a command cannot know or would pass over, before anything heavy is imported."""
    trainings = [*preset.race.trainings] if preset else []
    methods, names = (asked.methods or [], []) if asked.command == "race" else ([], getattr(asked, "names", []))
    if asked.command == "arm":
        methods, names, trainings = [asked.method], [asked.training], [*trainings, "zero-shot"]
    for kind, given, known in (("RoPE method", methods, METHODS), ("training", names, trainings)):
        for name in given:
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r}: use one of {[*known]}{closest(name, [*known])}")
    chosen = asked.command == "instruction" and (asked.arms is not None or asked.seeds or asked.questions != "squad")
    if chosen and preset.instruction.questions == "quotations":
        raise ValueError(
            f"--arms, --seeds and --questions are for a preset whose [instruction] names a record of questions, as "
            f"smollm2 does: preset {preset.name!r} measures every arm on quotations, so leave them out"
        )
    if asked.command == "self-instruct":
        load_preset(asked.writer)
    if asked.command == "preference":
        check_adapter(asked.adapter)
    if asked.command in ("gpu", "corpus"):
        from tools.run import check_writable

        check_writable(asked.out, "the experiment")


def run(asked: argparse.Namespace) -> Path | None:
    """The record that the command wrote, if it writes one."""
    preset = load_preset(asked.preset) if "preset" in asked else None
    check_names(preset, asked)
    if asked.command == "race":
        from experiments.race import race_arms, run_race
        from experiments.race_longer import longer_race
        from experiments.race_longer_results import AT_QUARTER, METHODS, OTHER_RATE, QUARTER, SLUG, TIMES

        if asked.times:
            methods, rate = asked.methods or [*METHODS], asked.learning_rate
            longer, arms = longer_race(preset, asked.times, methods, rate)
            options = f" --times {asked.times} --methods {' '.join(methods)}"
            options += f" --learning-rate {rate:g}" if rate else ""
            study = {None: {*METHODS}, QUARTER: {*AT_QUARTER}}  # what its records must have
            own = asked.times == TIMES and study.get(rate, {""}) <= {*methods}
            folder = RESULTS / preset.name if own else preset.run_folder / "records"
            return run_race(longer, arms, folder, OTHER_RATE if rate else SLUG, options)
        return run_race(preset, race_arms(preset), RESULTS / preset.name)
    if asked.command == "arm":
        from experiments.race import Arm, race_arms, run_arm

        arm = Arm(asked.method, asked.training, asked.seed)
        if arm not in race_arms(preset):
            raise ValueError(f"preset {preset.name!r} has no arm {arm}: see METHODS in settings.py and its [race]")
        return run_arm(preset, arm)
    if asked.command in ("longrope", "rope-bases", "trainings", "quoting"):
        from experiments import searches

        if asked.command == "longrope":
            return searches.search_longrope(preset, rounds=120, texts=6, seed=0)
        if asked.command == "rope-bases":
            return searches.search_rope_base(preset, asked.bases, texts=2, seed=0)
        if asked.command == "quoting":
            return searches.compare_quoting(preset, asked.shares, seed=0)
        return searches.compare_trainings(preset, asked.names, seed=0)
    if asked.command == "instruction":
        if preset.instruction.questions != "quotations":
            from experiments import instruction_questions as real

            arms = real.ARMS if asked.arms is None else asked.arms
            if unknown := {*arms} - {*real.ARMS}:
                raise ValueError(f"no such arm: {sorted(unknown)}. There are: {[*real.ARMS]}")
            return real.tune_and_ask(preset, RESULTS / preset.name, asked.questions, arms, asked.seeds or real.SEEDS)
        from experiments.instruction import ablate

        return ablate(preset, RESULTS / preset.name)
    if asked.command == "self-instruct":
        from experiments.self_instruct import generate

        return generate(preset, load_preset(asked.writer), asked.chunks, RESULTS / asked.writer)
    if asked.command == "preference":
        from experiments import preference, preference_fresh
        from llama_long_utils.model.adapters import find_adapter

        out, scope = RESULTS / preset.name, preference.SMALL if asked.small else preference.Scope()
        if asked.quoting:
            adapter = preference.quoting_adapter(preset, asked.quoting)
        else:
            adapter = find_adapter(preset, asked.adapter, stage="instruction")
        if asked.fresh:
            return preference_fresh.run_fresh(preset, adapter, out)
        scope = dataclasses.replace(scope, seeds=asked.seeds or scope.seeds, arms=asked.arms or scope.arms)
        return preference.run_preference(preset, adapter, out, scope)
    if asked.command == "context":
        from experiments import context_law

        return context_law.measure(preset, RESULTS / preset.name)
    if asked.command == "gpu":
        from experiments import gpu_budget

        return gpu_budget.run(asked.device, asked.seconds, asked.out, doll=asked.doll)
    if asked.command == "dose":
        return run_dose_checked(preset, asked)
    if asked.command == "pretraining":
        from experiments.pretraining_cells import checked_cell

        cell = checked_cell(*asked.cell) if asked.cell else None
        from experiments import pretraining

        if asked.size:
            from experiments import pretraining_gpu as gpu

            size = gpu.checked_size(asked.size)
            if asked.join:
                return gpu.join(size, asked.join, asked.out, asked.commit, add=asked.add)
            on_gpu = importlib.import_module("torch").cuda.is_available()
            limit = gpu.checked_seconds(size, asked.seconds, on_gpu)
            if asked.speed:
                return gpu.measure_speed(size)
            gpu.run_seed(size, asked.seed, limit, steps=asked.steps, share=asked.card)
            return None
        if cell:
            return pretraining.run_cell(cell)
        if asked.sparse or asked.sparse_on_short:
            from experiments import pretraining_sparse as sparse

            return sparse.run_sparse(RESULTS / "tiny", sparse.SHORT if asked.sparse_on_short else sparse.LONG)
        if asked.more_tokens:
            from experiments import pretraining_tokens as tokens

            return tokens.run_tokens(RESULTS / "tiny", finished=asked.finished, add=asked.add)
        pretraining.run_all(RESULTS / "tiny", finished=asked.finished, add=asked.add)
    if asked.command == "bench":
        from experiments import bench

        record = bench.compare_trainers()
        return record if asked.trainers else bench.main()
    if asked.command == "corpus":
        from experiments import corpus

        return corpus.run(asked.gib, REPOSITORY / "runs" / "corpus" / f"{asked.gib:g}", asked.out)
    if asked.command == "tiny-llama":
        from experiments import tiny_llama

        tiny_llama.main()
    return None


def main() -> None:
    """The command line: runs it and says where the record is."""
    record = run(arguments())
    if record:
        print(record)


if __name__ == "__main__":
    run_command(main, "interrupted: the same command goes on from here")
