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

The switch at 80% chose half the recorded rate, and is still worse. Long throughout, one seed at that rate, to see which
way a rate of its own would move it, trains worse there. It chooses nothing. So half the rate holds long sequences back,
and the switch at 40%, if time is left, is trained at the recorded rate, which most of its steps want. Expected, before
it was begun, if sequences should become long early: it is better than the switch at 80% of the same rate, beyond the
interval of their seeds.

It is not: it reads as the switch at 80% does. So what is lost is lost in the first 40% of the steps, and 60% of long
ones do not regain it. The RoPE base, which the arms differ in from the start, is not why. In pilots of 160 steps at the
recorded rate, seeds 0 and 1, the last 40 steps' training loss is 5.31 and 5.44 for short sequences with the raised base
(5.34 and 5.42 without), 4.91 and 5.10 for long ones with the low base (4.97 and 5.21 with the raised one).

Added when all numbers had been seen: 0.4M and 0.9M judged together with the switch of 0.9M at its chosen rate
(planned was the recorded one), and the interval of what is left beyond half of the difference at one rate. The chosen
rate is no optimum: it is the best of four, by the training loss of one seed.

Then the two questions that this left are asked, written before either was trained. First, long throughout is searched
upwards by the rule above, as it was searched downwards already. Expected: it trains worse at twice the recorded rate,
so that the recorded one, with a worse rate on both sides, is its own, and nothing that was said changes. Refuted if it
trains better there: then the doubling goes on, seeds 1 and 2 follow at the chosen rate, and the switch is compared with
that. A long throughout which reads better than before adds to what the switch loses; one which reads worse on held-out
documents, though it trains better, takes from it, and is what would overturn the finding.

Second, does an early switch lose, too? The switch at 20%, at the recorded rate, all seeds. In the records short
sequences are behind by 0.2, 0.0 and 0.1 nat of training loss in steps 61 to 80 (seeds 0, 1, 2), by 0.4, 0.2 and 0.4 in
steps 141 to 160. And after the switch at 40% nothing is regained. So expected of the switch at 20%: it is worse than
long throughout, and better than the switch at 40%, both beyond the interval over seeds and documents. Refuted, the
first: a loss of `EQUAL` is excluded, or it is better. Refuted, the second: it is worse than the switch at 40%, or a
gain of half of that switch's loss is excluded, so that what is lost is lost in the first fifth already. All else leaves
it open. Of the switch at 95% expected: worse than long throughout, as all short steps but the last are those of the
switch at 80%; refuted if it is not worse beyond its interval.

Long throughout does train worse at twice the recorded rate, and reads worse. There the arms are level; the difference
is largest where long throughout is best. So the recorded rate is its own, and what was said stands. Both searches are
coarse, and of one seed.

The switch at 95% is worse than long throughout, as expected. So is the switch at 20%, but it is not better than the
one at 40%: it is a little worse, and a gain of half of that switch's loss is excluded. So what is lost is lost in the
first fifth already. After its switch its training loss falls further behind, as that of short sequences does. It is not
that these runs were stopped and resumed there: trained without a stop, short sequences of seed 1 have the record's
losses up to step 104, to within 1e-5.

A finer rate, asked by a reader when all of this was known. On the same texts and tokens the switch at 80% reads worse
at 0.9M than at 0.4M: 4.77 nats at its chosen rate against 4.63, while long throughout reads alike. So it may be badly
trained at 0.9M, and factors of two are coarse. It is trained at 0.7 of the recorded rate as well, seeds 0 to 2, and
then long throughout, seed 0. Rates are chosen as before. Expected, written before: the switch reads less than 0.05 nat
better than at half the rate, and at its chosen rate still worse than long throughout, beyond the interval. Refuted, the
second, if that interval holds zero: then one reads "worse at 0.9M" off a grid that is too coarse.

Written when seeds 0 and 1 were known at 0.7 of the rate, where the switch reads better than at half: the grid is made
finer once more, by seed 0 as before, at 0.6 and 0.85 for the switch, at 0.7 and 1.4 for long throughout. Seeds 1 and 2
follow at a rate that trains better than all others. Expected: long throughout stays at the recorded rate, and at the
switch's best rate at most half is left of what it loses at half the rate. Refuted if more than half is left, beyond the
interval.

Of seed 0 the switch trains best at 0.85 of the rate, by less than 0.0001 nat before 0.7. So seeds 1 and 2 follow there,
by the rule, and 0.7 stands beside it.

At 0.7 the switch reads 0.08 nat better than at half the rate: more than expected, so the grid was too coarse indeed. At
its own rate it is still worse than long throughout, as expected, by 0.09 nat with three seeds, 0.07 at 0.7 of the rate.
Whether more than half of the loss at half the rate is left is open. Long throughout keeps the recorded rate, and its
runs of seeds 0 to 2, trained again, gave the recorded losses to the last digit.
"""

from dataclasses import replace

from experiments.pretraining_results import FEWEST_SEEDS, PretrainingResults, larger_results
from llama_long_utils.notebooks import finding, shown

IN_WORDS = {
    2: "twice the rate",
    1.4: "1.4 times the rate",
    1: "the recorded rate",
    0.85: "0.85 of the rate",
    0.7: "0.7 of the rate",
    0.6: "0.6 of the rate",
    0.5: "half the rate",
    0.25: "a quarter of the rate",
}
LAST = 40  # steps whose training loss chooses a rate
LARGER, SEEDS = "0.9M", (0, 1, 2)
RATED = {  # factors of the recorded rate, and seeds that were trained at them
    "switch-80": {2: (0,), 0.85: SEEDS, 0.7: SEEDS, 0.6: (0,), 0.5: SEEDS, 0.25: (0,)},
    "long": {2: (0,), 1.4: (0,), 0.7: (0,), 0.5: (0,)},
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


def own_rate(results: PretrainingResults, size: str, arm: str = "switch-80") -> float:
    """The chosen rate of an arm, by the recorded one."""
    losses = losses_at_the_end(results, size, arm)
    best = min(losses, key=losses.__getitem__)
    return next(factor for factor in (1, *FACTORS) if rate_name(size, factor) == best)


def at_own_rate(results: PretrainingResults, size: str, factor: float = 0) -> PretrainingResults:
    """Long throughout at the recorded rate, switches at the chosen one: their size is "SIZE, switch at half the rate".

    Its runs of long throughout are those of the size itself. `factor`: of the recorded rate, not the chosen one.
    """
    factor = factor or own_rate(results, size)
    arm, name = results.cells.arm, results.cells["size"]
    ours = ((arm == "long") & (name == size)) | (arm.str.startswith("switch") & (name == rate_name(size, factor)))
    return replace(results, cells=results.cells[ours].assign(size=f"{size}, switch at {IN_WORDS[factor]}"))


def larger_sizes() -> dict[str, PretrainingResults]:
    """The larger size from its committed record: all arms at one rate, and the switch at its chosen one."""
    results = larger_results()
    own = at_own_rate(results, LARGER)
    return {LARGER: results, own.cells["size"].iloc[0]: own}


def beyond_share(*arms: tuple[PretrainingResults, str, str], share: float = 0.5) -> list[float]:
    """What the first of two arms loses to long throughout minus a share of what the second loses: value, low, high.

    Below zero, less than that share is left. Each is given as results, size and arm. Paired by seed and document.
    """
    seeds = sorted(set.intersection(*(set(results.seeds(size, arm, "long")) for results, size, arm in arms)))
    (first, tokens), (second, _) = (
        results._change(size, (arm, "full"), ("long", "full"), 1, 4096, seeds) for results, size, arm in arms
    )
    left = arms[0][0].interval(first - share * second, tokens)
    return [left[name] for name in ("value", "low", "high")]


def judge_larger(results: PretrainingResults, size: str) -> None:
    """Print what was expected of the larger size, and whether it holds, as far as its arms are measured."""
    own = at_own_rate(results, size)
    name = own.cells["size"].iloc[0]

    def judge(claim: str, arm: str, base: str, *, worse: bool = True, at: PretrainingResults = results) -> None:
        found = at.difference(name if at is own else size, (arm, "full"), (base, "full"))
        if found["seeds"] < FEWEST_SEEDS:
            each = ", ".join(f"{one:+.3f}" for one in found["each"])
            print(f"too few seeds to judge: {claim} ({each}, seed by seed)")
        else:
            shown(claim, [found[bound] for bound in ("value", "low", "high")], above=worse, digits=3)

    judge(f"{size}, all at one rate: the switch at 80% is worse", "switch-80", "long")
    finding("the rate chosen for it is higher than the recorded one", own_rate(results, size) > 1)
    judge("at the rate chosen for it, it is still worse", "switch-80", "long", at=own)
    left = beyond_share((own, name, "switch-80"), (results, size, "switch-80"))
    shown("less than half of that is left (what is left, minus half)", left, above=False, digits=3)
    halved = at_own_rate(results, size, 0.5)
    if own_rate(results, size) != 0.5:
        first, second = ((one, one.cells["size"].iloc[0], "switch-80") for one in (own, halved))
        left = beyond_share(first, second)
        shown(
            "at most half is left of its loss at half the rate (what is left, minus half)", left, above=False, digits=3
        )
    judge(f"{size}, all at one rate: a switch at 40% is better than one at 80%", "switch-40", "switch-80", worse=False)
    losses = list(losses_at_the_end(results, size, "long").values())
    best = own_rate(results, size, "long") == 1 and min(losses) not in (losses[0], losses[-1])
    finding("long throughout trains best at the recorded rate, worse at every other", best)
    if results.seeds(size, "switch-20", "long"):
        judge(f"{size}, all at one rate: the switch at 20% is worse", "switch-20", "long")
        judge("the switch at 20% is better than that at 40%", "switch-20", "switch-40", worse=False)
    if len(results.seeds(size, "switch-20", "long")) >= FEWEST_SEEDS:
        left = beyond_share((results, size, "switch-20"), (results, size, "switch-40"))
        shown(
            "it loses less than half of what that at 40% does (its loss, minus half of the other)",
            left,
            above=False,
            digits=3,
        )
    if results.seeds(size, "switch-95", "long"):
        judge(f"{size}, all at one rate: the switch at 95% is worse", "switch-95", "long")
