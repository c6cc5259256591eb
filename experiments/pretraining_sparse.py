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

All four are refuted. Below six widths full attention is far better: at equal tokens, at equal operations and in equal
seconds, although S2's steps do save time. Read with the attention it was trained with, S2 loses nearly as much. What
stands against it: S2's groups have 128 tokens here and 1,024 there, so it may be the length of the groups and not their
cost beside the rest. And of two rates S2 trains better at the higher one, an edge. So, written when this was known, S2
is trained once more at 1.4 of the rate, seed 0. Expected: it trains worse there, or better by less than 0.1 nat, and so
stays behind full attention at equal operations. Refuted if it reads better than "short-as-s2" of seed 0.

It trains worse there, and reads worse than at the recorded rate. So that is its own.

Seen afterwards: with all arms at the recorded rate, which is too high for full attention on 512 tokens, nothing is told
at equal operations, so the finding rests on rates of their own. And S2 is behind in the first tokens of a text already,
where it hides nothing. So it is trained worse, and not only blind to what lies far back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.pretraining_cells import AS_SPARSE, SHORT_AS_SPARSE, SHORT_SPARSE, SPARSE, Cell
from experiments.pretraining_gpu_results import (
    HOLDS,
    OPEN,
    REFUTED,
    as_trained,
    in_nats,
    judge_below,
    judge_no_difference,
    worse_if_above,
)
from experiments.pretraining_rates import IN_WORDS, LARGER, LAST, SEEDS, rate_name
from experiments.pretraining_results import PretrainingResults, collect, pretraining_results, read_as_trained
from llama_long_utils.paths import RESULTS

SAVED = 0.95  # of full attention's seconds
LOWER = 0.7  # of the recorded rate; long throughout is trained at its own only
HIGHER = 1.4  # at which one seed of S2 is trained on 512 tokens


@dataclass(frozen=True)
class Trio:
    """Sparse attention, full attention on as many operations, and full attention on as many tokens.

    Attributes:
        way: how their texts are read with full attention.
        steps: the column that counts their steps.
    """

    slug: str
    sparse: str
    fewer: str
    full: str
    way: str
    steps: str
    flag: str

    @property
    def arms(self) -> tuple[str, str, str]:
        """Names of the arms."""
        return self.sparse, self.fewer, self.full


LONG = Trio("12_sparse_attention", SPARSE, AS_SPARSE, "long", "full", "long_steps", "--sparse")
SHORT = Trio(
    "12_sparse_attention_on_short",
    SHORT_SPARSE,
    SHORT_AS_SPARSE,
    "short",
    "window",
    "short_steps",
    "--sparse-on-short",
)


def sparse_cells(trio: Trio) -> list[Cell]:
    """All cells of sequences of one length, seed by seed."""
    again = trio.arms if trio is SHORT else trio.arms[:2]
    pairs = [*((LARGER, arm) for arm in trio.arms), *((rate_name(LARGER, LOWER), arm) for arm in again)]
    edge = [Cell(rate_name(LARGER, HIGHER), trio.sparse, SEEDS[0])] if trio is SHORT else []
    return [*(Cell(size, arm, seed) for seed in SEEDS for size, arm in pairs), *edge]


def run_sparse(folder: Path, trio: Trio = LONG) -> Path:
    """Measure the cells that have no record yet, and join them in `folder`."""
    from experiments.pretraining import run_cell  # imports torch, which readers of the record need not

    cells = [run_cell(cell) for cell in sparse_cells(trio)]
    about = {"command": f"python -m experiments pretraining {trio.flag}"}
    return collect(cells, folder, trio.slug, more={"as_trained": read_as_trained(cells, trio.way)}, about=about)


def sparse_results(factor: float = LOWER) -> PretrainingResults:
    """The committed record, with S2 and "long-as-s2" at a factor of the recorded rate; all have the size `LARGER`."""
    results = pretraining_results(RESULTS / "tiny" / f"{LONG.slug}.json")
    ours = (results.cells.arm == "long") | (results.cells["size"] == rate_name(LARGER, factor))
    return replace(results, cells=results.cells[ours].assign(size=LARGER))


def short_results(factor: float | None = None) -> tuple[PretrainingResults, dict[str, float]]:
    """The committed record of 512 tokens, each arm at its own rate, and that rate as a factor of the recorded one.

    `factor`: one for all arms instead.
    """
    results = _short_record()
    names = {rate_name(LARGER, factor): factor for factor in (1, LOWER)}
    loss = results.cells[results.cells["size"].isin(names)].pivot_table("loss", "arm", "size")
    own = loss.loc[[SHORT.full, SHORT.sparse]].idxmin(axis="columns")
    own[SHORT.fewer] = own[SHORT.full]
    if factor:
        own[:] = rate_name(LARGER, factor)
    chosen = results.cells["size"] == results.cells.arm.map(own)
    return replace(results, cells=results.cells[chosen].assign(size=LARGER)), own.map(names).to_dict()


def _short_record() -> PretrainingResults:
    """The committed record of 512 tokens; the cells with `loss`, the mean training loss of the last steps of all."""
    results = pretraining_results(RESULTS / "tiny" / f"{SHORT.slug}.json")
    loss = results.arrays["loss"][:, -LAST:].mean(axis=1)
    return replace(results, cells=results.cells.assign(loss=loss))


def equal_operations(results: PretrainingResults, trio: Trio = LONG, size: str = LARGER) -> dict[str, Any]:
    """NLL of full attention minus S2's, both read with full attention, at as many operations, as `difference`."""
    return results.difference(size, (trio.fewer, trio.way), (trio.sparse, trio.way))


def minus_full(found: Mapping[str, Any]) -> dict[str, float]:
    """Full attention minus S2, the other way round: below zero, S2 reads better."""
    return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


def equal_operations_in_words() -> list[str]:
    """S2 minus full at equal operations, of 4,096 tokens, both at `LOWER` of the rate, and of 512, each at its own."""
    parts = (sparse_results(), LONG), (short_results()[0], SHORT)
    return [in_nats(minus_full(equal_operations(results, trio))) for results, trio in parts]


def equal_seconds(
    results: PretrainingResults, trio: Trio = LONG, size: str = LARGER, step_seconds: Mapping[str, float] | None = None
) -> tuple[float, dict[str, Any]]:
    """Steps of full attention that take as long as all of S2's, and its NLL after them minus S2's, as `difference`.

    Interpolated, seed by seed and document by document, between the two lengths that full attention was trained for, or
    extrapolated, if the steps are fewer than both.

    Args:
        step_seconds: of a step of `trio.full` and of `trio.sparse`; default: those of the cells.
    """
    steps = {arm: results.cost(size, arm, trio.steps) for arm in trio.arms}
    times = step_seconds or {arm: results.cost(size, arm, "seconds") / steps[arm] for arm in (trio.full, trio.sparse)}
    equal = steps[trio.sparse] * times[trio.sparse] / times[trio.full]
    share = np.log(equal / steps[trio.fewer]) / np.log(steps[trio.full] / steps[trio.fewer])  # 0: fewer steps, 1: all
    nats = {arm: results.nats(size, arm, 1, 4096, trio.way)[0] for arm in trio.arms}
    tokens = results.nats(size, trio.full, 1, 4096)[1]
    seeds = results.seeds(size, *trio.arms)
    full = [share * nats[trio.full][seed] + (1 - share) * nats[trio.fewer][seed] for seed in seeds]
    return equal, results.interval(np.array(full) - [nats[trio.sparse][seed] for seed in seeds], tokens)


def judged_sparse() -> pd.DataFrame:
    """A row for each expectation above: what was found at both rates, in nats, and judged."""
    table = pd.DataFrame()
    for factor in (1, LOWER):
        results = sparse_results(factor)
        whole = results.difference(LARGER, (SPARSE, "full"), ("long", "full"))
        own = as_trained(results, LARGER, rate_name(LARGER, factor))
        equal, time = equal_seconds(results)
        work, time = minus_full(equal_operations(results)), minus_full(time)
        few = results.cost(LARGER, LONG.fewer, LONG.steps)
        rows = {
            "equal tokens: S2 is worse": (whole, worse_if_above(whole)),
            "equal tokens, S2 read with its own attention: no difference": (own, judge_no_difference(own)),
            f"equal operations (full: {few:.0f} steps): S2 is better": (work, judge_below(work)),
            "equal seconds: S2 is better": (time, judge_below(time)),
        }
        table["S2 minus full, expected"] = list(rows)
        described = [f"{judged}: {in_nats(found)}" for found, judged in rows.values()]
        table[f"both cheaper arms at {IN_WORDS[factor]}"] = [
            *described[:-1],
            f"{described[-1]}, about {equal:.0f} steps",
        ]
    return table


def judged_short() -> pd.DataFrame:
    """A row for each expectation of 512 tokens, as `judged_sparse` has them: arms at rates of their own, or at one."""
    table = pd.DataFrame()
    for title, factor in {"each arm at its own rate": None, "all at the recorded rate": 1}.items():
        results, factors = short_results(factor)
        whole, first = (
            results.difference(LARGER, (SHORT.sparse, SHORT.way), (SHORT.full, SHORT.way), 1, end) for end in (4096, 16)
        )
        own = as_trained(results, LARGER, rate_name(LARGER, factors[SHORT.sparse]), (SHORT.full, SHORT.way))
        equal, time = equal_seconds(results, SHORT)
        work, time = minus_full(equal_operations(results, SHORT)), minus_full(time)
        seconds = {arm: results.cells[results.cells.arm == arm].set_index("seed").seconds for arm in SHORT.arms}
        ratio = seconds[SHORT.sparse] / seconds[SHORT.full]
        few, steps = (results.cost(LARGER, arm, SHORT.steps) for arm in (SHORT.fewer, SHORT.full))
        worse = REFUTED if work["low"] > 0 else HOLDS
        saves = REFUTED if ratio.max() < SAVED else HOLDS if ratio.min() >= SAVED else OPEN
        way = "extrapolated" if equal < few else "interpolated"
        rows = {
            "equal tokens: no difference": f"{_no_difference(whole)}: {in_nats(whole)}",
            f"equal operations (full: {few:.0f} of {steps:.0f} steps): S2 is not worse": f"{worse}: {in_nats(work)}",
            f"besides: seconds of S2 by those of full, at least {SAVED}": (
                f"{saves}: {', '.join(f'{one:.2f}' for one in ratio)}"
            ),
            "equal seconds: no difference": (f"{_no_difference(time)}: {in_nats(time)}, {way} to {equal:.0f} steps"),
            "also: equal tokens, S2 read with its own attention": in_nats(own),
            "also: equal tokens, the first 15 tokens of a text": in_nats(first),
        }
        table["S2 minus full, expected"] = list(rows)
        table[title] = list(rows.values())
    return table


def higher_rate() -> tuple[float, float]:
    """Training loss of S2 on 512 tokens at `HIGHER` of the rate and at the recorded one, of the first seed."""
    cells = _short_record().cells
    loss = cells[(cells.arm == SHORT.sparse) & (cells.seed == SEEDS[0])].set_index("size").loss
    return round(loss[rate_name(LARGER, HIGHER)], 3), round(loss[LARGER], 3)


def _no_difference(found: dict[str, Any]) -> str:
    return HOLDS if found["low"] <= 0 <= found["high"] else REFUTED
