"""Does a late switch lose at 16M parameters, too? The curriculum and sparse attention at a size that a GPU trains.

0.4M and 0.9M read 1.6 million tokens. The finding there (pretraining_rates.py): late switches lose, and what is lost is
lost in the first fifth. A sceptic says: models so small and briefly trained do nothing but begin, with one sequence a
step and at a rate that suits long sequences. So here the model is larger, a step has 8 sequences of 4,096 tokens (or
the same tokens as 64 of 512), and several times as many tokens are read: at 400 steps 13 million, two passes over the
6.2 million of the training texts, not quite one token for each parameter. That is still far from what is usual.

Rates. Pilots of `PILOTED` steps with a seed that is not reported (`PILOT_SEED`), a schedule of their own, long and
short at half, once and twice a rate. Each of the two gets the rate with the lowest mean training loss of the last third
of its pilot's steps; no held-out text is read. Switches go on with the run, and so with the rate, of short; sparse
attention has that of long. A chosen rate at the edge of the three is called that, and no other is tried.

Steps. The same for all arms but "long-as-s2": the most of `STEPS` at which the cells of three seeds that decide (long,
switch-80, short, s2) fit into the time, by the speed that was measured before. So loss decides nothing about them.

Expected of switches, written before any number of this size: no difference of the switch at 80% from long throughout is
detected, as in the paper. Refuted if it is worse by more than its interval, over seeds and documents. If it is worse:
it loses less than half of what the same switch loses at 0.9M (one rate for all arms there). Refuted if half of that or
more is left, beyond the interval. Of the first fifth: if the switch at 80% is worse, so is that at 20%. Refuted if the
switch at 20% is better than that at 80% beyond the interval, and not worse than long throughout; then what is lost is
lost late, and a switch in time avoids it. Quality is called equal only if a loss of `EQUAL` is excluded. All arms read
the same texts in the same order, each text equally often; short is read in windows of 512 tokens.

Expected of sparse attention (S2, long throughout, read with full attention): at equal tokens it is worse than long
throughout, beyond the interval; refuted if a loss of `EQUAL` is excluded. At equal operations, "long-as-s2", full
attention on fewer steps with a schedule of its own, is still better than it, beyond the interval. Refuted if it is
worse beyond the interval: then sparse attention is worth it at this size. All else is open.
At equal seconds no arm is trained: full attention's NLL is interpolated between its two lengths of training, linear in
the logarithm of steps, at the steps that take as long as those of S2 by the speeds measured alone. S2 is also read with
the attention it was trained with (`as_trained`), so that a loss is not only that of another attention than it knows.

Expected of context: 4,064 tokens of it save 16M more than 0.9M, on the same documents; an interval below zero refutes
that. That model has read more tokens as well, so size alone is not what differs.

Seconds of the cells passed on a card that several processes shared: they measure nothing. `speed` measures.

What came out, judged by pretraining_gpu_results.py, of 400 steps and seeds 0 to 2. "long-as-s2", "switch-20" and
"switch-40" were left out for time.

Switches: neither as expected nor refuted. The switch at 80% reads better than long throughout, in every seed, at about
half of the operations. So the two further expectations do not arise. What stands against it: pilots of 60 steps gave
long throughout twice the rate of short, the highest that was tried, and it was hardly better there than once the rate.
Over 400 steps it may be too high, and no arm was run at the other's rate. Nor is it the long steps that pay: short
throughout, in windows, reads a little better than the switch, and in the far half context gives the switch a little
less than long throughout. What a switch loses of far context can hardly be told where that is worth so little.

Seen afterwards: in the first 60 steps, more tokens than 0.9M read in all, long sequences train better, at each rate of
the pilots, too. Later short ones do. So what 0.9M said of late switches may hold of a beginning only. This is a lead:
size, sequences in a step and rates differ as well.

Sparse attention: worse at equal tokens, as expected, when read with full attention. All of that lies beyond the 1,024
tokens of its groups, which it never saw. Read with its own attention no difference is detected, nor is a loss of
`EQUAL` excluded. Equal operations are open, and so are equal seconds: two processes of another experiment ran beside
`speed`. At this width 4,096 tokens are above six widths.

Context: it saves 16M more than 0.9M, as expected. The exponents of both overlap.
"""

import fcntl
import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from experiments import attention as _registered  # noqa: F401 ("s2")
from experiments import pretraining_cells, pretraining_device
from experiments.pretraining import QUESTION, cut_short, long_rows, new_model, own_settings, run_cell
from experiments.pretraining_cells import (
    AS_SPARSE,
    LONG_BASE,
    PILOT_FACTORS,
    PILOTED,
    PRESET,
    SHORT_BASE,
    SIZES,
    SPARSE,
    SWITCHES,
    Cell,
    long_settings,
    short_settings,
)
from experiments.pretraining_context import context_record, measure_cell
from experiments.pretraining_device import fast_products
from experiments.pretraining_rates import SEEDS, rate_name
from experiments.pretraining_results import FOUR_SLUG, GPU_SLUG, add_cells, collect, read_as_trained
from llama_long_utils.paths import write_atomically
from llama_long_utils.records import Record, read_record, write_record
from llama_long_utils.training.trainer import train

PILOT_SEED = 9
PILOTS = [(arm, factor) for factor in PILOT_FACTORS for arm in ("long", "short")]
ARMS = ("long", "switch-80", "short", SPARSE, AS_SPARSE, "switch-20", "switch-40")  # those that decide come first
STEPS = (800, 600, 500, 400, 300, 200)
DECIDING = 1 + 0.8 + 0.2 + 1  # runs of long sequences that long, short, switch-80 and s2 of a seed take at most
ON_A_GPU = 250.0  # seconds that a card is taken for, unless others are asked for; on a CPU a seed takes hours
BEGINNING = 75.0  # seconds until the pilots are read
PAUSE = 0.5  # seconds between two looks at what others do
EAGER = "long, eager"  # not compiled
TIMED = 12  # steps, of which the last two thirds are measured


def run_seed(size: str, seed: int, seconds: float, *, steps: int = 0, share: float = 0.5) -> list[Path]:
    """The records of a seed's cells, in the order of `ARMS`: nothing begins that would end after `seconds`.

    Each record is written as soon as it is measured, and a second call measures what is missing. Processes of other
    seeds may run beside this one: together they run the pilots, and the first that has read them writes the choice.

    Args:
        steps: of each cell; 0: the most that fit, given `share` of the card.
    """
    began, known = time.monotonic(), speeds(size)
    if EAGER in known:
        pretraining_device.COMPILE = bool(known["long"] < known[EAGER])
    chosen = choose(size, lambda: steps or most_steps(size, seconds, share), began, seconds)
    set_steps(size, chosen["steps"])
    print(f"seed {seed}, after {time.monotonic() - began:.0f} s: {chosen}", flush=True)
    paths, pace, trained = [], 1.0, 0
    for arm in ARMS:
        cell = Cell(rate_name(size, chosen[rate_of(arm)]), arm, seed)
        if cell.record.is_file():
            paths.append(cell.record)
            continue
        short, long = steps_left(cell, trained)
        expected = pace * (short * chosen["short_seconds"] + long * chosen["long_seconds"]) + 5
        now = time.monotonic() - began
        if now + expected > seconds:
            print(f"seed {seed}, after {now:.0f} s: {arm} is left out, it would take {expected:.0f} s", flush=True)
            continue
        try:
            paths.append(run_cell(cell))
        except RuntimeError as error:  # memory that others have, or a loss that is not finite: the other cells go on
            print(f"seed {seed}: {arm} failed: {error}", flush=True)
            continue
        if arm == SPARSE:
            read_contexts(Cell(rate_name(size, chosen["long"]), "long", seed))
        if arm != "long":
            shutil.rmtree(cell.folder, ignore_errors=True)  # weights
        forget()
        trained, took = max(trained, short_steps(cell)), time.monotonic() - began - now
        pace = max(took - 5, 1.0) / max((expected - 5) / pace, 0.1)
        print(f"seed {seed}, after {now + took:.0f} s: {arm} took {took:.0f} s", flush=True)
    read_contexts(Cell(rate_name(size, chosen["long"]), "long", seed))
    return paths


def read_contexts(cell: Cell) -> None:
    """The loss by context of long throughout, once, if its weights are there; they are removed."""
    if cell.folder.is_dir() and not context_record(f"{cell.size}-{cell.seed}").is_file():
        measure_cell(cell)
    shutil.rmtree(cell.folder, ignore_errors=True)


def forget() -> None:
    """Give a GPU's memory back that only models of before held."""
    gc.collect()
    torch.cuda.empty_cache()


def rate_of(arm: str) -> str:
    """Whose learning rate an arm has: that of "long" or that of "short"."""
    return "short" if SWITCHES.get(arm) else "long"


def set_steps(size: str, steps: int) -> None:
    """Let all cells of a size have so many steps, pilots left out."""
    for name in (rate_name(size, factor) for factor in PILOT_FACTORS):
        SIZES[name] = replace(SIZES[name], steps=steps)


def short_steps(cell: Cell) -> int:
    """Steps of an arm on short sequences."""
    return round(SWITCHES.get(cell.arm, 0.0) * SIZES[cell.size].steps)


def steps_left(cell: Cell, trained: int) -> tuple[int, int]:
    """Steps on short and on long sequences that a cell still takes, if short ones are trained up to step `trained`."""
    short = short_steps(cell)
    return max(short - trained, 0), own_settings(cell).steps - short


def most_steps(size: str, seconds: float, share: float) -> int:
    """The most of `STEPS` at which the cells that decide fit into a share of the card's time.

    A step on short sequences counts as one on long ones, which is slower. Without a known speed, or without an end, the
    steps are the size's own.
    """
    step = speeds(size).filter(["long", EAGER]).min() / 1000
    if math.isnan(step) or math.isinf(seconds):
        return SIZES[size].steps
    budget = share * (seconds - BEGINNING)
    return next((steps for steps in STEPS if len(SEEDS) * steps * DECIDING * step <= budget), STEPS[-1])


def choose(size: str, steps: Callable[[], int], began: float, seconds: float) -> dict[str, float]:
    """The factor of the rate for "long" and "short", steps, and seconds of a step beside the other processes.

    Runs the pilots that no other process is at, and waits for the others as long as somebody is at them: on a CPU one
    takes minutes. RuntimeError if the time is over before all are finished.
    """
    path = pretraining_cells.RUNS / f"choice-{size}.json"
    while not path.is_file() and (missing := [pilot for pilot in PILOTS if not pilot_record(size, *pilot).is_file()]):
        at_work = False
        for arm, factor in missing:
            if time.monotonic() - began > seconds:
                raise RuntimeError(
                    f"not all {len(PILOTS)} pilots of {size} are finished after {seconds:g} s, so there are no rates "
                    "yet: the same command goes on with them; give it more --seconds"
                )
            with taken(pilot_record(size, arm, factor).with_suffix(".lock")) as ours:
                if ours and not pilot_record(size, arm, factor).is_file():
                    at_work = True
                    run_pilot(size, arm, factor)
                    print(f"pilot {arm}, rate x{factor:g}, after {time.monotonic() - began:.0f} s", flush=True)
        if not at_work:
            time.sleep(PAUSE)
    if not path.is_file():
        pilots = pd.concat([Record(pilot_record(size, arm, factor)).table("pilots") for arm, factor in PILOTS])
        choice = chosen_rates(pilots) | {"steps": steps()}
        decided = path.with_name(f".{path.name}.{time.monotonic_ns()}")
        write_atomically(decided, json.dumps(choice, indent=1).encode())
        with suppress(FileExistsError):  # another process was first
            path.hardlink_to(decided)
        decided.unlink()
    return json.loads(path.read_text())


@contextmanager
def taken(lock: Path) -> Iterator[bool]:
    """Whether this process has the lock, which the kernel takes back if it dies; False if another one has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def chosen_rates(pilots: pd.DataFrame) -> dict[str, float]:
    """For "long" and "short", the factor with the lowest loss, and the median seconds of a step.

    A pilot whose loss is no number has diverged. Of an arm without pilots the factor is 1.
    """
    choice = {}
    for arm in ("long", "short"):
        ended = pilots[(pilots.arm == arm) & pilots.loss.notna()]
        choice[arm] = float(ended.factor[ended.loss == ended.loss.min()].iloc[0]) if len(ended) else 1.0
        choice[f"{arm}_seconds"] = float(ended.seconds.median()) if len(ended) else 0.2
    return choice


def pilot_record(size: str, arm: str, factor: float) -> Path:
    """Where a pilot's record is."""
    return pretraining_cells.RUNS / "pilots" / f"{size}-{arm}-{factor:g}.json"


def run_pilot(size: str, arm: str, factor: float) -> Path:
    """Train an arm for some steps, and record the loss of the last third. Nothing is read."""
    name = rate_name(f"{size}-pilot", factor)
    settings = long_settings(name, PILOT_SEED)
    begun = time.perf_counter()
    loss, seconds = math.nan, math.nan
    try:
        log = trained(name, arm, settings.steps, PILOT_SEED)
    except RuntimeError as error:  # the loss is not finite
        print(f"pilot {arm}, rate x{factor:g}: {error}", flush=True)
    else:
        last = log[-max(len(log) // 3, 1) :]
        loss, seconds = sum(row["loss"] for row in last) / len(last), step_seconds(log)
    row = {"arm": arm, "factor": factor, "learning_rate": settings.learning_rate, "steps": settings.steps}
    row |= {"loss": loss, "seconds": seconds}
    return recorded(pilot_record(size, arm, factor), "pilots", [row], PILOT_SEED, time.perf_counter() - begun)


def trained(
    size: str, arm: str, steps: int, seed: int, *, attention: str = "sdpa", compiled: bool = True
) -> list[dict[str, float]]:
    """`train`'s rows of a run on long or short sequences whose weights nobody keeps."""
    settings = replace(long_settings(size, seed), steps=steps, warmup_steps=max(steps // 6, 1), checkpoint_every=steps)
    model, rows = new_model(size, LONG_BASE if arm == "long" else SHORT_BASE, seed), long_rows(settings)
    if arm == "short":
        rows, settings = cut_short(rows), short_settings(settings)
    if not compiled:
        for layer in model.model.layers:
            layer._compiled_call_impl = None
    model.set_attn_implementation(attention)
    folder = pretraining_cells.RUNS / "trials" / f"{size}-{arm}-{attention}-{compiled}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with fast_products(model.device):
            return train(model, rows, settings, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        forget()


def step_seconds(log: list[dict[str, float]]) -> float:
    """Median seconds of a step, the first third left out."""
    tokens = pd.Series([row["tokens"] for row in log]).diff()
    each = tokens / pd.Series([row["tokens_per_second"] for row in log])
    return float(each[max(len(log) // 3, 1) :].median())


def speed_record(size: str) -> Path:
    """Where the speeds are that were measured alone."""
    return pretraining_cells.RUNS / "speed" / f"{size}.json"


def speeds(size: str) -> pd.Series:
    """Milliseconds of a step by arm, as measured alone; empty without the record."""
    if not speed_record(size).is_file():
        return pd.Series(dtype=float)
    return Record(speed_record(size)).table("speed").set_index("arm").milliseconds


def measure_speed(size: str) -> Path:
    """Steps of full and of sparse attention, and of full attention not compiled: milliseconds, by their median.

    Nothing else should use the GPU, least of all while steps run; what is compiled first is kept for later processes.
    """
    begun, rows = time.perf_counter(), []
    for arm, attention, compiled in (("long", "sdpa", True), (SPARSE, SPARSE, True), (EAGER, "sdpa", False)):
        row = {"arm": arm, "milliseconds": math.nan, "tokens": math.nan, "fastest": math.nan, "peak_gib": math.nan}
        try:
            log = trained(size, "long", TIMED, PILOT_SEED, attention=attention, compiled=compiled)
        except Exception as error:  # of a compiler: the others are still measured
            print(f"{arm}: {error}", flush=True)
        else:
            row |= {"milliseconds": 1000 * step_seconds(log), "tokens": log[-1]["tokens"] / TIMED}
            row["fastest"] = 1000 * row["tokens"] / max(one["tokens_per_second"] for one in log)
            row["peak_gib"] = max(one["peak_gib"] for one in log)
        rows.append(row)
        print(row, flush=True)
    return recorded(speed_record(size), "speed", rows, PILOT_SEED, time.perf_counter() - begun)


def recorded(path: Path, table: str, rows: list[dict[str, float | str]], seed: int, seconds: float) -> Path:
    """A record of one table."""
    return write_record(
        path.parent,
        path.stem,
        preset=PRESET.name,
        question=QUESTION,
        tables={table: pd.DataFrame(rows)},
        seeds={"training": seed},
        seconds=seconds,
        provenance={"command": "python -m experiments pretraining --size SIZE"},
    )


def join(size: str, runs: Path, folder: Path, commit: str = "", *, add: bool = False) -> Path:
    """One record of a size, in `folder`, from the cells, contexts, pilots and speeds in `runs` (copied, maybe).

    Args:
        commit: of the code that measured, if git was not there.
        add: the record that is in `folder` keeps all that it has, and gets what else there is.
    """
    names = {rate_name(size, factor): size for factor in PILOT_FACTORS}
    record = folder / f"{FOUR_SLUG if size == '4M' else GPU_SLUG}.json"
    there, tables = set(), set()
    if add:
        there = set(Record(record).table("cells")[["arm", "seed"]].itertuples(index=False, name=None))
        tables = set(read_record(record)["tables"])
    found = {path: Record(path).table("cost").iloc[0] for path in sorted((runs / "cells").glob(f"{size}-*.json"))}
    found = {path: cost for path, cost in found.items() if (cost.arm, cost.seed) not in there}
    cells = sorted(
        (path for path, cost in found.items() if cost["size"] in names and cost.arm in ARMS),
        key=lambda path: (found[path].seed, ARMS.index(found[path].arm)),
    )
    if not cells:
        more_than = " that the record lacks" if add else ""
        raise ValueError(f"{runs} holds no cell of {size}{more_than}: name the folder that has cells/ in it")
    steps = {int(found[path].short_steps + found[path].long_steps) for path in cells if found[path].arm != AS_SPARSE}
    doubles = len({(found[path].arm, found[path].seed) for path in cells}) < len(cells)
    if len(steps) > 1 or doubles:
        raise ValueError(f"{runs} holds cells of several runs ({sorted(steps)} steps): join those of one")
    long = {f"{found[path]['size']}-{found[path].seed}" for path in cells if found[path].arm == "long"}
    contexts = [path for path in sorted((runs / "contexts").glob("*.json")) if path.stem in long]
    more = {}
    if contexts:
        more["contexts"] = pd.concat([Record(path).table("contexts") for path in contexts]).drop(
            columns=["model", "parameters"]
        )
    if (choice := runs / f"choice-{size}.json").is_file() and "choice" not in tables:
        more["choice"] = pd.DataFrame([json.loads(choice.read_text())])
    if (pilots := sorted((runs / "pilots").glob(f"{size}-*.json"))) and "pilots" not in tables:
        more["pilots"] = pd.concat([Record(path).table("pilots") for path in pilots], ignore_index=True)
    if (speed := runs / "speed" / f"{size}.json").is_file() and "speed" not in tables:
        more["speed"] = Record(speed).table("speed")
    if len(table := read_as_trained(cells)):
        more["as_trained"] = table.assign(size=table["size"].replace(names))
    each = f"--size {size} --seed SEED, or --cell {size} ARM SEED"
    about = {"command": f"python -m experiments pretraining {each}, then --size {size} --join"}
    if commit:
        about["commit"] = f"{commit}, named by hand: the code ran where git was not"
    if add:
        return add_cells(record, cells, contexts, called=names, more=more, about=about)
    return collect(cells, folder, record.stem, contexts=contexts, called=names, more=more, about=about)


def checked_size(size: str) -> str:
    """A size whose rates pilots choose; ValueError if it is none."""
    if size not in PILOTED:
        raise ValueError(f"unknown size {size!r}: use one of {list(PILOTED)}")
    return size


def checked_seconds(size: str, asked: float | None, gpu: bool) -> float:
    """How long a seed of this size may take: as long as asked for, or on a CPU as long as it takes.

    ValueError if there is no GPU for a size that needs one.
    """
    if SIZES[size].on_a_gpu and not (gpu or "doll" in size):
        raise ValueError(f"--size {size} is trained on a GPU, and there is no CUDA device here: use --size 4M")
    return asked or (ON_A_GPU if SIZES[size].on_a_gpu else math.inf)
