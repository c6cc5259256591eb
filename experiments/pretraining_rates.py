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

Other switches (20%, 40%, 95%), if time is left, are trained at the rate of the switch at 80%, and are said to be.
"""

LAST = 40  # steps whose training loss chooses a rate
FACTORS = (0.25, 0.5, 2, 4, 8)  # of the recorded rate, at most


def rate_name(size: str, factor: float) -> str:
    """The name of a size that is trained at another rate."""
    return f"{size}-x{factor:g}"
