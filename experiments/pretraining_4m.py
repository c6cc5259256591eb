"""4M parameters on the few tokens of 0.9M: a larger model that read as little, and sparse attention between sizes.

A switch at 80% of the tokens reads worse than long throughout at 0.9M, which read 1.6 million tokens, and better at
16M, which read 13 million. 0.9M on 13 million tokens reads better, too, in two seeds (pretraining_tokens.py). So it
seems that tokens turn the sign, not size. If that is so, a larger model on few tokens loses by the switch, as 0.9M did.

4M parameters are trained as 0.4M and 0.9M were: 400 steps of one sequence of 4,096 tokens, the same rows, seeds 0 to 2.
Rates are chosen as at 16M: pilots of 80 steps, seed 9, long and short at half, once and twice 3e-3, each by the
training loss of its last third; no held-out text is read. Switches go on with the rate of short, sparse attention has
that of long. A chosen rate at the edge of the three is called that, and no other is tried. Arms, as far as the machine
gives time: long, switch-80 and short of every seed; then "s2" and "long-as-s2" of every seed.

Expected, written before anything of this size was trained.
(1) The switch at 80% minus long throughout: worse, beyond the interval over seeds and documents. Refuted if a loss of
0.01 nat is excluded. Then few tokens are not enough to explain 0.9M.
(2) In steps 301 to 320 the training loss of short steps is behind that of long ones, beyond Student's interval of the
seeds. Refuted if it is ahead beyond it.
(3) 4,064 tokens of context save 4M more than 0.9M, on as many tokens, the same documents and seeds. Refuted by an
interval below zero.
(4) Sparse attention (S2) on long sequences throughout, read with full attention, is worse at equal tokens. Refuted if a
loss of 0.01 nat is excluded.
(5) At equal operations full attention is still better than S2, read with full attention, beyond the interval. Refuted
if it is worse beyond it. 4,096 tokens are 2.7 times six widths here: 5.3 at 0.9M, 1.8 at 16M.
(6) In equal seconds full attention is better than S2 as well, judged in the same way. Its seconds are those of steps
that were timed one after another, with nothing else on the machine, and its NLL is interpolated as at 0.9M, linear in
the logarithm of steps. (Written after (1) to (3) were known, before any sparse attention of this size was read.)
Of the exponent of context, and of short throughout in windows, nothing is expected.

What came out, of three seeds. Pilots chose 3e-3 for long and 6e-3 for short, the highest that was tried. (1), (2) and
(3) hold: on few tokens a late switch loses at 4M, too. (4) is open. (5) and (6) are refuted: S2 reads better at equal
operations and in equal seconds, as at 0.9M at a lower rate. All arms have the rate of long throughout's pilots. Far
context is worth next to nothing to a model that has read so little. And full attention's shorter run, whose schedule
ends early, trains worse at its end than the whole run does at the same steps: a part of the difference is that
schedule, and another one was not tried. By other clocks (CPU seconds of the cells, the fastest steps) full attention
still reads worse. Short throughout was not trained to its end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from experiments.pretraining_cells import AS_SPARSE, SPARSE
from experiments.pretraining_gpu_results import (
    OPEN,
    as_trained,
    in_nats,
    judge_above,
    training_lead,
    worse_if_above,
)
from experiments.pretraining_rates import LARGER
from experiments.pretraining_results import FEWEST_SEEDS, FOUR_SLUG, PretrainingResults, pretraining_results
from experiments.pretraining_sparse import LONG, equal_operations, equal_seconds, minus_full
from llama_long_utils.paths import RESULTS

SIZE = "4M"
LAST = 20  # steps at the end of a run
Found = dict[str, Any]


def results_of_4m() -> PretrainingResults:
    """The cells of 4M parameters from their committed record."""
    return pretraining_results(RESULTS / "tiny" / f"{FOUR_SLUG}.json")


def judged_4m(results: PretrainingResults, wide: PretrainingResults) -> pd.DataFrame:
    """A row for each of (1) to (3): expected, found, in nats, and judged. `wide` has 0.9M at as many tokens.

    One that lacks an arm, or has it of fewer than `FEWEST_SEEDS`, is open.
    """
    long, switch = "long", "switch-80"
    return _judged(
        results,
        (
            "the switch at 80% is worse than long throughout",
            (long, switch),
            lambda: results.difference(SIZE, (switch, "full"), (long, "full")),
            worse_if_above,
        ),
        (
            "short steps are behind in training, steps 301 to 320",
            (long, switch),
            lambda: training_lead(results, 300, 320, SIZE),
            judge_above,
        ),
        (
            f"context saves more than at {LARGER}, on as many tokens",
            (long,),
            lambda: results.context_saves_more(SIZE, LARGER, wide),
            judge_above,
        ),
    )


def judged_sparse_4m(results: PretrainingResults) -> pd.DataFrame:
    """A row for each of (4) to (6), as `judged_4m` has them, and two of which nothing was expected; S2 minus full."""
    steps = results.cells.set_index("arm").long_steps
    few = f" (full: {steps[AS_SPARSE].iloc[0]} steps)" if AS_SPARSE in steps else ""
    equal, timed = equal_seconds_4m(results) if results.seeds(SIZE, *LONG.arms) else (0.0, {})
    table = _judged(
        results,
        (
            "equal tokens: S2 is worse",
            ("long", SPARSE),
            lambda: results.difference(SIZE, (SPARSE, "full"), ("long", "full")),
            worse_if_above,
        ),
        (
            f"equal operations{few}: S2 is worse",
            (SPARSE, AS_SPARSE),
            lambda: minus_full(equal_operations(results, size=SIZE)),
            judge_above,
        ),
        (
            f"equal seconds (full: about {equal:.0f} steps): S2 is worse",
            LONG.arms,
            lambda: minus_full(timed),
            judge_above,
        ),
        (
            "also: equal tokens, S2 read with its own attention",
            ("long", SPARSE),
            lambda: as_trained(results, SIZE),
            _nothing,
        ),
        (
            f"besides: training loss of full's shorter run minus its whole run's, last {LAST} steps of the shorter",
            ("long", AS_SPARSE),
            lambda: cost_of_an_early_end(results),
            _nothing,
        ),
    )
    return table.rename(columns={"expected": "S2 minus full, expected"})


def _nothing(_found: Found) -> str:
    return "nothing was expected"


def cost_of_an_early_end(results: PretrainingResults) -> Found:
    """Training loss of "long-as-s2" minus that of "long" at the same steps, on the same tokens: its last `LAST` steps.

    The learning rate of the shorter run has decayed there, that of the other has not. Keys as `training_lead`.
    """
    end = int(results.cost(SIZE, AS_SPARSE, "long_steps"))
    return training_lead(results, end - LAST, end, SIZE, AS_SPARSE)


def equal_seconds_4m(results: PretrainingResults) -> tuple[float, Found]:
    """`equal_seconds`, by steps that were timed one after another; full attention was timed before S2 and after it."""
    speed = results.record.table("speed")
    full = speed.arm != SPARSE
    times = {"long": speed.milliseconds[full].mean(), SPARSE: speed.milliseconds[~full].mean()}
    return equal_seconds(results, size=SIZE, step_seconds=times)


Asked = tuple[str, Sequence[str], Callable[[], Found], Callable[[Found], str]]


def _judged(results: PretrainingResults, *asked: Asked) -> pd.DataFrame:
    rows = []
    for expected, arms, find, judge in asked:
        seeds = len(results.seeds(SIZE, *arms))
        found = find() if seeds else None
        few = f"{OPEN}: {seeds} of {FEWEST_SEEDS} seeds" if seeds < FEWEST_SEEDS else ""
        rows.append((expected, in_nats(found) if found else "no such arm", few or judge(found)))
    return pd.DataFrame(rows, columns=["expected", "found", "judged"])
