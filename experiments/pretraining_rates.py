"""Does a late switch lose at 0.9M parameters only because one learning rate serves all arms?

At the rate of `SIZES["0.9M"]`, which pilots had shown to suit long sequences better, the switch at 80% reads worse than
long throughout, and is behind in training before it switches. An arm may want a rate of its own. So both arms are
trained at other rates, all else equal, and compared once more, each at its best.

How a rate is chosen, written before any was tried: by the mean training loss of the last `LAST` steps of seed 0, which
are steps on long sequences and the same tokens for both arms. No held-out document is read for it. Each arm begins at
the rate of the record. It is doubled until that no longer helps; if the first doubling does not help, it is halved
until that no longer helps. So every chosen rate has a worse one on both sides. Seeds 1 and 2 are then trained at each
arm's own rate only. Seed 0 is both chosen and tested on, by different documents; seeds 1 and 2 are not chosen on.

Expected: the switch at 80% wants a higher rate than long throughout. Each at its own rate, no difference of held-out
NLL is detected, and less than half of the difference at one rate is left. If the switch is worse by more than its
interval, over seeds and documents, one rate for all was not the reason. If more than half is left within a wider
interval, it is open. Quality is called equal only if a loss of `EQUAL` is excluded, as elsewhere.

Changed after the first run, of the switch at twice the rate, whose training loss was worse: the machine gives a third
of the time that was planned. So the switch comes first, search and seeds. Long throughout is searched with what is left
of the time. Until then it keeps the recorded rate, which favours the switch: if the switch is worse all the same, a
rate of its own for long throughout would only add to that. If the switch is not worse, that is no result before long
throughout has its own rate, too.

Other switches (20%, 40%, 95%), if time is left, are trained at the rate of the switch at 80%, and are said to be.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.pretraining_results import PretrainingResults, larger_results

LAST = 40  # steps whose training loss chooses a rate
LARGER, SEEDS = "0.9M", (0, 1, 2)
RATED = {  # factors of the recorded rate that the search came to, and seeds that were trained at them
    "long": {2: (0,), 0.5: SEEDS},
    "switch-80": {2: SEEDS, 4: (0,)},
}
FACTORS = sorted({factor for tried in RATED.values() for factor in tried})


def rate_name(size: str, factor: float) -> str:
    """The name of a size that is trained at another rate."""
    return size if factor == 1 else f"{size}-x{factor:g}"


def losses_at_the_end(results: PretrainingResults, size: str, arm: str) -> dict[str, float]:
    """Mean training loss of the last steps of seed 0 at each rate an arm was trained at, by the size's name."""
    names = [rate_name(size, factor) for factor in sorted([1, *FACTORS])]
    cells = results.cells[(results.cells.arm == arm) & (results.cells.seed == 0) & results.cells["size"].isin(names)]
    found = {name: float(results.arrays["loss"][row, -LAST:].mean()) for row, name in cells["size"].items()}
    return {name: found[name] for name in names if name in found}


def at_own_rates(results: PretrainingResults, size: str) -> PretrainingResults:
    """The arms that have been trained at several rates, each at its own: their size is called "SIZE, own rates"."""
    cells = results.cells
    chosen = {}
    for arm in RATED:
        losses = losses_at_the_end(results, size, arm)
        chosen[arm] = min(losses, key=losses.__getitem__)
    own = pd.concat([cells[(cells.arm == arm) & (cells["size"] == name)] for arm, name in chosen.items()])
    return replace(results, cells=own.assign(size=f"{size}, own rates"))


def larger_sizes() -> dict[str, PretrainingResults]:
    """The larger size from its committed record: all arms at one rate, and each at its own."""
    results = larger_results()
    own = at_own_rates(results, LARGER)
    return {LARGER: results, own.cells["size"].iloc[0]: own}


def rate_table(results: PretrainingResults, size: str) -> pd.DataFrame:
    """A row for each rate, as text: the training loss that chooses an arm's rate, and held-out NLL, both of seed 0."""
    columns: dict[str, dict[str, str]] = {}
    for arm in RATED:
        losses = losses_at_the_end(results, size, arm)
        best = min(losses, key=losses.__getitem__)
        columns[f"{arm}, training loss"] = {
            name: f"**{loss:.3f}**" if name == best else f"{loss:.3f}" for name, loss in losses.items()
        }
        cells = results.cells[(results.cells.arm == arm) & (results.cells.seed == 0)]
        columns[f"{arm}, held-out NLL"] = {
            name: f"{results.mean_nll(row):.3f}" for row, name in cells["size"].items() if name in losses
        }
    table = pd.DataFrame(columns).fillna("-")
    factors = [float(name.removeprefix(f"{size}-x")) if name != size else 1.0 for name in table.index]
    table.insert(0, "rate, beside the recorded one", [f"{factor:g}" for factor in factors])
    return table.iloc[np.argsort(factors)].reset_index(drop=True)
