"""Is it size or tokens? 0.9M parameters, trained as 16M was: as many tokens, in steps as large.

A switch at 80% of the tokens reads worse than long throughout at 0.9M, and better at 16M. But 16M also read eight times
as many tokens, in steps of eight sequences. So here 0.9M is trained as it was: 400 steps of eight sequences, the same
rows in the same order, seeds 0 to 2. The only difference from 16M is the model and its learning rate. From 0.9M as it
was recorded, tokens and the size of a step differ, and nothing else: a seed has the same untrained weights.

Both arms begin at the rate of the record, which is long throughout's own at fewer tokens. There both have seeds 0 to 2.
Then each is trained at twice and at half the rate, seed 0, as far as the machine gives time; an arm that trains better
there (mean training loss of the last `LAST` steps, which are long and the same tokens for both arms) gets its other
seeds there, too. Until then a finding is one of one rate for both.

Expected, written before any of it was trained, without a pilot.
(1) The switch at 80% minus long throughout is lower than at 1.6 million tokens, both at the recorded rate, beyond the
interval over seeds and documents. What a late switch lost was lost in the first fifth of few tokens, and at 16M short
sequences were behind only in the first 60 steps. Refuted if it is higher beyond the interval, or if a fall by half of
what the switch lost is excluded.
(2) The switch is no longer worse: the interval of the difference does not lie above zero. Refuted if it does. Then
tokens are not all, and size or its rate separates 0.9M from 16M.
(3) It is not better either, as at 16M (-0.107 nat): refuted if the interval lies below zero. Then tokens alone turn the
sign.

And of context, written before any of it was read. 16M saves more by 4,064 tokens of it than 0.9M does, but it also read
more. (4) With as many tokens, 16M still saves more than 0.9M, on the same documents and seeds; refuted by an interval
below zero. (5) With more tokens 0.9M saves more than it did; refuted by an interval below zero.
All else is open.

What came out, of three seeds at the recorded rate. (1) and (2) hold: with more tokens the switch loses less, and is no
longer worse. (3) is refuted: it reads better than long throughout, so tokens alone turn the sign. The training loss
says how: short sequences fall behind first, and lead later (Figure 12.2). (4) and (5) hold. Neither arm was trained at
another rate, nor short throughout, so this is a finding of one rate for both.
"""

from pathlib import Path

import pandas as pd

from experiments.pretraining_cells import MORE_TOKENS, Cell
from experiments.pretraining_gpu_results import BOUNDS, GPU_SIZE, HOLDS, OPEN, REFUTED, in_nats, judge_above
from experiments.pretraining_rates import LARGER, SEEDS, beyond_share, rate_name
from experiments.pretraining_results import FEWEST_SEEDS, PretrainingResults, add_cells, collect, pretraining_results
from llama_long_utils.paths import RESULTS

COLUMNS = ["expected", "found", "judged"]
SLUG = "12_curriculum_of_more_tokens"
TRIED = {"long": {1: SEEDS, 2: (0,), 0.5: (0,)}, "switch-80": {1: SEEDS, 2: (0,), 0.5: (0,)}, "short": {1: SEEDS}}


def tokens_cells() -> list[Cell]:
    """All cells, those that decide first."""
    cells = [(factor, seed, arm) for arm, tried in TRIED.items() for factor, seeds in tried.items() for seed in seeds]
    cells.sort(key=lambda one: (one[0] != 1, one[0] < 1, one[1]))
    return [Cell(rate_name(MORE_TOKENS, factor), arm, seed) for factor, seed, arm in cells]


def run_tokens(folder: Path, *, finished: bool = False, add: bool = False) -> Path:
    """Measure the cells that have no record yet, unless only `finished` ones are asked for; join them in `folder`.

    `add`: the record in `folder` keeps its cells, and gets those that are finished.
    """
    cells = [cell for cell in tokens_cells() if not (finished or add) or cell.record.is_file()]
    if not cells:
        raise ValueError("no cell is measured yet: leave out --finished and --add, or measure one with --cell")
    from experiments.pretraining import run_cell  # imports torch, which readers of the record need not
    from experiments.pretraining_context import measured_contexts

    records = [run_cell(cell) for cell in cells]
    read = [cell for cell in cells if cell.arm == "long" and cell.size == MORE_TOKENS]
    contexts = measured_contexts(read, finished=finished, tiny=False)
    if add:
        return add_cells(folder / f"{SLUG}.json", records, contexts)
    about = {"command": "python -m experiments pretraining --more-tokens"}
    return collect(records, folder, SLUG, contexts=contexts, about=about)


def tokens_results() -> PretrainingResults:
    """The committed record."""
    return pretraining_results(RESULTS / "tiny" / f"{SLUG}.json")


def judged_tokens(results: PretrainingResults, wide: PretrainingResults, large: PretrainingResults) -> pd.DataFrame:
    """A row for each expectation above, at the recorded rate: expected, found, in nats, and judged.

    `wide` is 0.9M at its own tokens, `large` is 16M.
    """
    late = results.difference(MORE_TOKENS, ("switch-80", "full"), ("long", "full"))
    pair = (results, MORE_TOKENS, "switch-80"), (wide, LARGER, "switch-80")
    fall, beyond_half = (dict(zip(BOUNDS, beyond_share(*pair, share=share), strict=True)) for share in (1, 0.5))
    fell = REFUTED if fall["low"] > 0 or beyond_half["low"] >= 0 else HOLDS if fall["high"] < 0 else OPEN
    larger = large.context_saves_more(GPU_SIZE, MORE_TOKENS, results)
    more = results.context_saves_more(MORE_TOKENS, LARGER, wide)
    rows = [
        ("the switch at 80% loses less than with fewer tokens", fall, fell),
        ("it is no longer worse than long throughout", late, REFUTED if late["low"] > 0 else HOLDS),
        (f"it is not better either (at {GPU_SIZE} it is)", late, REFUTED if late["high"] < 0 else HOLDS),
        (f"with as many tokens, context still saves {GPU_SIZE} more", larger, judge_above(larger)),
        ("with more tokens, context saves more than with fewer", more, judge_above(more)),
    ]
    few = f"{late['seeds']} seeds: too few to judge" if late["seeds"] < FEWEST_SEEDS else ""
    return pd.DataFrame([(what, in_nats(found), few or judged) for what, found, judged in rows], columns=COLUMNS)
