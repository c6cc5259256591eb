"""Reading the record of 16M parameters: what was expected before it (pretraining_gpu.py), and how each came out."""

from typing import Any

import pandas as pd

from experiments.pretraining_rates import LARGER, beyond_share
from experiments.pretraining_results import EQUAL, GPU_SLUG, PretrainingResults, pretraining_results
from experiments.race_results import student_reach
from llama_long_utils.notebooks import measured
from llama_long_utils.paths import RESULTS

GPU_SIZE = "16M"
HOLDS, REFUTED, OPEN, NOT_ASKED = "holds", "does not hold", "undecided", "does not arise"
OTHER_WAY = "not refuted, but not as expected: it is better"
BOUNDS = ("value", "low", "high")


def gpu_results() -> PretrainingResults:
    """The cells of 16M parameters from their committed record, without seconds: several processes shared the card."""
    results = pretraining_results(RESULTS / "tiny" / f"{GPU_SLUG}.json")
    results.cells["seconds"] = float("nan")
    return results


def as_trained(
    results: PretrainingResults, size: str = GPU_SIZE, trained_at: str = "", base: tuple[str, str] = ("long", "full")
) -> dict[str, Any]:
    """NLL of sparse attention, read with the attention it was trained with, minus an (arm, way), as `difference`.

    `trained_at`: the size's name at the rate of sparse attention, in a record that has several.
    """
    long, tokens = results.nats(size, base[0], 1, 4096, base[1])
    table = results.record.table("as_trained")
    table = table[table["size"] == trained_at] if trained_at else table
    nats = table.pivot_table("nats", "seed", "document", aggfunc="sum")
    nats = nats[list(results.arrays["documents"])]
    return results.interval(nats.to_numpy() - [long[seed] for seed in nats.index], tokens)


def rate_factors(results: PretrainingResults) -> dict[str, float]:
    """The factor of the rate that long throughout and short got, and the largest that was tried."""
    table = results.record.table("choice").iloc[0]
    return {"long": table.long, "short": table.short, "highest": results.record.table("pilots").factor.max()}


def worse_if_above(found: dict[str, Any]) -> str:
    """How "it is worse", or "it saves more", comes out."""
    return HOLDS if found["low"] > 0 else REFUTED if found["high"] < EQUAL else OPEN


def judge_above(found: dict[str, Any]) -> str:
    """How "it is above zero, beyond the interval" comes out."""
    return HOLDS if found["low"] > 0 else REFUTED if found["high"] < 0 else OPEN


def judge_below(found: dict[str, Any]) -> str:
    """How "it is below zero, beyond the interval" comes out."""
    return HOLDS if found["high"] < 0 else REFUTED if found["low"] > 0 else OPEN


def judge_no_difference(found: dict[str, Any]) -> str:
    """How "no difference from long throughout is detected" comes out."""
    return REFUTED if found["low"] > 0 else OTHER_WAY if found["high"] < 0 else HOLDS


def judged_expectations(results: PretrainingResults, wide: PretrainingResults, size: str = GPU_SIZE) -> pd.DataFrame:
    """A row for each expectation of pretraining_gpu.py: expected, what was found, in nats, and judged.

    An expectation of which an arm is missing is open. `wide` has the same switch at 0.9M.
    """
    late, sparse = (results.difference(size, (arm, "full"), ("long", "full")) for arm in ("switch-80", "s2"))
    more = results.context_saves_more(size, LARGER, wide)
    worse, found, judged = late["low"] > 0, "no such arm", OPEN
    left = dict(zip(BOUNDS, beyond_share((results, size, "switch-80"), (wide, LARGER, "switch-80")), strict=True))
    half = HOLDS if left["high"] < 0 else REFUTED if left["low"] >= 0 else OPEN
    if results.seeds(size, "s2", "long-as-s2"):
        gain = results.difference(size, ("s2", "full"), ("long-as-s2", "full"))
        found, judged = in_nats(gain), judge_above(gain)
    early = "the switch is not worse"
    if worse:
        early = "no such arm"
    rows = [
        ("no difference of the switch at 80% is detected", in_nats(late), judge_no_difference(late)),
        (
            f"if it is worse, it loses less than half of what it loses at {LARGER}",
            in_nats(left) if worse else early,
            half if worse else NOT_ASKED,
        ),
        ("if it is worse, so is a switch at 20%", early, OPEN if worse else NOT_ASKED),
        ("S2 is worse at equal tokens, read with full attention", in_nats(sparse), worse_if_above(sparse)),
        ("at equal operations full attention is better than S2", found, judged),
        (
            f"4,064 tokens of context save more than at {LARGER}",
            in_nats(more),
            judge_above(more),
        ),
    ]
    return pd.DataFrame(rows, columns=["expected", "found", "judged"])


def read_besides(results: PretrainingResults, size: str = GPU_SIZE) -> pd.DataFrame:
    """What no expectation was written of, as `judged_expectations` has it."""
    switch, long, short = ("switch-80", "full"), ("long", "full"), ("short", "window")
    rows = {
        "also: S2 read with its own attention, minus long throughout": as_trained(results, size),
        "also: short throughout, in windows, minus long throughout": results.difference(size, short, long),
        "also: the switch at 80% minus short throughout, in windows": results.difference(size, switch, short),
    }
    found = [(what, in_nats(one), "nothing was expected") for what, one in rows.items()]
    return pd.DataFrame(found, columns=["expected", "found", "judged"])


def training_lead(
    results: PretrainingResults, first: int, last: int, size: str = GPU_SIZE, arm: str = "switch-80"
) -> dict[str, Any]:
    """Training loss of an arm minus that of long throughout, steps `first` to `last`, as `difference`.

    On the same tokens; the interval is Student's t of the seeds.
    """
    loss, rows = results.arrays["loss"], results.cells[results.cells["size"] == size].reset_index()
    at = rows.set_index(["arm", "seed"])["index"]
    seeds = results.seeds(size, arm, "long")
    each = pd.Series([(loss[at[arm, one]] - loss[at["long", one]])[first:last].mean() for one in seeds])
    half = student_reach(each.to_numpy())
    return {"value": each.mean(), "low": each.mean() - half, "high": each.mean() + half, "each": list(each)}


def in_nats(found: dict[str, Any]) -> str:
    """A difference with its interval, as text."""
    return measured(*(found[name] for name in BOUNDS), digits=3)
