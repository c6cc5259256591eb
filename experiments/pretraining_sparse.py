"""Is sparse attention worth its steps? Shifted sparse attention (S2) at 0.9M parameters, at equal cost.

At 16M a GPU's time ended before full attention was trained at S2's operations, and its seconds were measured beside
other processes. Here both are asked at a size that a CPU trains. Its width is 128, so 4,096 tokens are 32 widths: far
above the six below which the paper says that attention is not most of the cost.

Arms, seeds 0 to 2, all at the recorded rate, with the texts in one order: "s2" reads as many tokens as "long" does;
"long-as-s2" is full attention on as many steps as multiply as much as S2's, with a schedule of its own. At equal
seconds no arm is trained: NLL is interpolated between "long-as-s2" and "long", linear in the logarithm of steps, at the
steps that take as long as those of S2, by CPU seconds of one thread.

Expected, written before any of it was trained. At equal tokens S2 read with full attention is worse than long
throughout, beyond the interval over seeds and documents; refuted if a loss of `EQUAL` is excluded. Read with the
attention it was trained with, no difference is detected; refuted if it is worse beyond the interval. At equal
operations full attention, which then reads about a third of the tokens, is worse than S2 read with full attention,
beyond the interval: at so few tokens more of them count most. Refuted if it is better beyond the interval. At equal
seconds the same, judged in the same way. All else is open.

At the recorded rate, which is long throughout's own (pretraining_rates.py), seeds of S2 lie up to 0.4 nat apart, and so
do those of "long-as-s2" by half of that; all but its own attention is open. A rate may be too high for them alone. So,
written when this was known, both are trained again at 0.7 of the rate, all seeds, and held against long throughout at
its own. Expected, judged as above: seeds lie less than 0.1 nat apart, and what was expected before holds.

At 0.7 of the rate seeds of S2 lie 0.12 nat apart, those of "long-as-s2" 0.04. At equal operations and in equal seconds
full attention is worse, as expected. At equal tokens S2's loss is open: its interval just holds zero.

That is far above the crossover. What does full attention buy below it? 512 tokens are 4 widths. So the same is asked of
training on 512 tokens throughout, at the same two rates, all seeds: "short" (full attention), "short-s2" and
"short-as-s2", read in windows of 512 tokens that slide by half. Each arm is judged at the rate, of the two, at which it
trains better: mean training loss of the last 40 steps that "short" and "short-s2" share, mean over seeds; for
"short-as-s2", whose steps are others, the rate of "short".

Expected, written before any of these was trained, without a pilot. S2 multiplies about a tenth less there, so full
attention at S2's operations has about 36 steps fewer of 400. A tenth of the steps is worth 0.04 to 0.1 nat to a model
this young (that is what the loss falls by between 212 and 400 long steps, shared out over the logarithm). What lies
further back than 128 tokens is worth less than 0.05 nat to it. So, read with full attention in windows:
(1) at equal tokens no difference of S2 is detected; refuted if S2 is worse or better beyond the interval. (2) At equal
operations full attention is not better beyond the interval; refuted if it is. (3) S2's steps take at least 0.95 of the
seconds of full attention's, so that it saves no time to speak of; refuted if they take less, in all three seeds.
(4) In equal seconds no difference is detected; refuted if either is better beyond the interval.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.pretraining_cells import AS_SPARSE, SHORT_AS_SPARSE, SHORT_SPARSE, SPARSE, Cell
from experiments.pretraining_gpu_results import (
    as_trained,
    in_nats,
    judge_above,
    judge_no_difference,
    worse_if_above,
)
from experiments.pretraining_rates import IN_WORDS, LARGER, SEEDS, rate_name
from experiments.pretraining_results import PretrainingResults, collect, pretraining_results, read_as_trained
from llama_long_utils.paths import RESULTS

SLUG, SHORT_SLUG = "12_sparse_attention", "12_sparse_attention_on_short"
ARMS = (SPARSE, AS_SPARSE, "long")
SHORT_ARMS = (SHORT_SPARSE, SHORT_AS_SPARSE, "short")
LOWER = 0.7  # of the recorded rate; long throughout is trained at its own only


def sparse_cells(*, short: bool = False) -> list[Cell]:
    """All cells of 4,096 tokens, or of 512, seed by seed."""
    lower = rate_name(LARGER, LOWER)
    arms, again = (SHORT_ARMS, SHORT_ARMS) if short else (ARMS, ARMS[:2])
    pairs = [*((LARGER, arm) for arm in arms), *((lower, arm) for arm in again)]
    return [Cell(size, arm, seed) for seed in SEEDS for size, arm in pairs]


def run_sparse(folder: Path, *, short: bool = False) -> Path:
    """Measure the cells of 4,096 tokens, or of 512, that have no record yet, and join them in `folder`."""
    from experiments.pretraining import run_cell  # imports torch, which readers of the record need not

    cells = [run_cell(cell) for cell in sparse_cells(short=short)]
    about = {"command": f"python -m experiments pretraining --sparse{'-on-short' * short}"}
    as_trained = read_as_trained(cells, "window" if short else "full")
    return collect(cells, folder, SHORT_SLUG if short else SLUG, more={"as_trained": as_trained}, about=about)


def sparse_results(factor: float = LOWER) -> PretrainingResults:
    """The committed record, with S2 and "long-as-s2" at a factor of the recorded rate; all have the size `LARGER`."""
    results = pretraining_results(RESULTS / "tiny" / f"{SLUG}.json")
    ours = (results.cells.arm == "long") | (results.cells["size"] == rate_name(LARGER, factor))
    return replace(results, cells=results.cells[ours].assign(size=LARGER))


def equal_operations(results: PretrainingResults) -> dict[str, Any]:
    """NLL of full attention minus S2's, both read with full attention, at as many operations, as `difference`."""
    return results.difference(LARGER, (AS_SPARSE, "full"), (SPARSE, "full"))


def equal_seconds(results: PretrainingResults) -> tuple[float, dict[str, Any]]:
    """Steps of full attention that take as long as all of S2's, and its NLL after them minus S2's, as `difference`.

    Interpolated, seed by seed and document by document, between the two lengths that full attention was trained for.
    """
    seconds, steps = ({arm: results.cost(LARGER, arm, column) for arm in ARMS} for column in ("seconds", "long_steps"))
    equal = steps["long"] * seconds[SPARSE] / seconds["long"]
    share = np.log(equal / steps[AS_SPARSE]) / np.log(steps["long"] / steps[AS_SPARSE])  # 0: of the shorter, 1: longer
    nats = {arm: results.nats(LARGER, arm, 1, 4096)[0] for arm in ARMS}
    tokens = results.nats(LARGER, "long", 1, 4096)[1]
    full = [share * nats["long"][seed] + (1 - share) * nats[AS_SPARSE][seed] for seed in nats["long"]]
    return equal, results.interval(np.array(full) - [nats[SPARSE][seed] for seed in nats["long"]], tokens)


def judged_sparse() -> pd.DataFrame:
    """A row for each expectation above: what was found at both rates, in nats, and judged."""
    table = pd.DataFrame()
    for factor in (1, LOWER):
        results = sparse_results(factor)
        whole = results.difference(LARGER, (SPARSE, "full"), ("long", "full"))
        own, work = as_trained(results, LARGER, rate_name(LARGER, factor)), equal_operations(results)
        equal, time = equal_seconds(results)
        few = results.cost(LARGER, AS_SPARSE, "long_steps")
        rows = {
            "S2 is worse at equal tokens": (whole, worse_if_above(whole)),
            "S2, read with its own attention: no difference is detected": (own, judge_no_difference(own)),
            f"full attention is worse at S2's operations, in {few:.0f} steps": (work, judge_above(work)),
            "full attention is worse in S2's seconds": (time, judge_above(time)),
        }
        table["expected"] = list(rows)
        told = [f"{judged}: {in_nats(found)}" for found, judged in rows.values()]
        table[f"S2 at {IN_WORDS[factor]}"] = [*told[:-1], f"{told[-1]}, about {equal:.0f} steps"]
    return table
