"""C8 and C9: the data mix, and short sequences first, by notebook 12's models."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from experiments.pretraining_4m import SIZE, results_of_4m
from experiments.pretraining_cells import MORE_TOKENS
from experiments.pretraining_gpu_results import GPU_SIZE, gpu_results, rate_factors
from experiments.pretraining_rates import LARGER, larger_sizes
from experiments.pretraining_results import (
    CONTENT,
    EQUAL,
    FEWEST_SEEDS,
    FIRST_ORDERS,
    LENGTH,
    MIXED,
    PretrainingResults,
    copying_results,
    heavier,
    mixed_results,
    pretraining_results,
)
from experiments.pretraining_results import SLUG as CURRICULUM
from experiments.pretraining_tokens import tokens_results
from llama_long_utils.notebooks import NO_DIFFERENCE, measured
from llama_long_utils.records import recorded
from tools.claims.line import AGREES, BOUNDS, DISAGREES, MARGIN, MODELS, UNDECIDED, Line, better_or_worse, in_nats

TRAINED_ON = "tiny-llama"  # the model of notebook 12 that copies from its context
MORE_READ = f"{LARGER} on {GPU_SIZE}'s tokens"
FROM_SCRATCH = "0.4M"  # parameters of the models of notebook 12 that have all arms and seeds


def data_mix(table: dict[str, Any]) -> Line:
    """C8: judged by whether length or content moves a far measure more, in NLL and in copying."""
    names = "Long mix", "Llama 2 mix, long text removed"
    rows = [pd.Series(table["rows"][name], table["columns"]) for name in names]
    quality, qmsum = (f"{rows[0][task]:+.0f}% with the new mix, {rows[1][task]:+.0f}%" for task in ("quality", "qmsum"))
    paper = f"over Llama 2: QuALITY {quality} with Llama 2's own, long texts removed; QMSum {qmsum} (Table 7)"
    line = Line("The data mix matters more than the length of texts", paper)
    return line if recorded("tiny", MIXED) is None else with_mixes_of_a_copying_model(line)


def with_mixes_of_a_copying_model(line: Line) -> Line:
    """The line of the data mix, judged by the model to which far context is worth something."""
    effects = mixed_results().content_or_length(TRAINED_ON)
    far = effects[effects.place == "far"].set_index(["change", "measure"])
    said = (
        f"{change} {in_nats(far.loc[change, 'NLL'])} nat and "
        f"{measured(*far.loc[(change, 'copying'), ['value', 'low', 'high']], digits=1)} points"
        for change in (LENGTH, CONTENT)
    )
    ours = f"far NLL and share copied from over 1,024 tokens back: {'; '.join(said)}"
    orders = far.seeds[[LENGTH, CONTENT]].min()
    scale = f"{MODELS['tiny']}, which copies, trained on, {orders} orders of the texts (seeds)"
    moved = [
        f"{change} moves far {measure}"
        for (change, measure), row in far.loc[[LENGTH, CONTENT]].iterrows()
        if not row.low <= 0 <= row.high
    ]
    by_nll, by_copying = (heavier(effects, measure) for measure in ("NLL", "copying"))
    why = f"{by_nll} weighs more by loss, {by_copying} by share of quotes copied"
    if by_nll == by_copying == "neither":
        why = "; ".join(["neither weighs more, beyond the interval", *moved])
    judged = UNDECIDED
    if by_nll == by_copying != "neither":
        judged = AGREES if by_nll == "content" else DISAGREES
    fresh = {measure: heavier(effects, measure, skip=FIRST_ORDERS) for measure in ("NLL", "copying")}
    newer = f"{fresh['NLL']} by NLL, {fresh['copying']} by copying"
    why += ", in a paired test chosen afterwards"
    judged += (
        f": {why}; on the orders that came later alone, {newer}; 'better' means of the same kind as the test texts"
    )
    return replace(line, ours=ours, scale=scale, verdict=judged, why=why)


def short_then_long(flops: dict[str, Any], perplexity: dict[str, Any]) -> Line:
    """C9: the switch at 80% beside long throughout, at each size from scratch and in a model that copies."""
    saved = 1 - flops["flops"][-1] / flops["flops"][0]
    books = [perplexity["rows"][row][perplexity["columns"].index("books")] for row in (-1, 0)]
    qasper, quality = (flops["long_tasks"][task] for task in ("Qasper", "QuALITY"))
    paper = f"{saved:.0%} fewer operations, {books[0]} against {books[1]} perplexity on books, "
    paper += f"but {qasper[-1]} against {qasper[0]} on Qasper, {quality[-1]} against {quality[0]} on QuALITY "
    paper += "(Tables 10, 11)"
    claim = "Pretraining on short sequences and switching to long ones late costs less at equal quality"
    if recorded("tiny", CURRICULUM) is None:
        return Line(claim, paper)
    (size, wide), largest = list(larger_sizes().items())[-1], gpu_results()
    scratch = {
        FROM_SCRATCH: _late_switch(pretraining_results(), FROM_SCRATCH),
        LARGER: _late_switch(wide, size),
        SIZE: _late_switch(results_of_4m(), SIZE),
        GPU_SIZE: _late_switch(largest, GPU_SIZE),
        MORE_READ: _late_switch(tokens_results(), MORE_TOKENS),
    }
    scratch = {name: found for name, found in scratch.items() if found.seeds >= FEWEST_SEEDS}
    rates = rate_factors(largest)
    few = rate_factors(results_of_4m())
    own = {LARGER: size != LARGER, SIZE: few["long"] != few["short"], GPU_SIZE: rates["long"] != rates["short"]}
    line = with_a_copying_model(Line(claim, paper), scratch, rates, own_rates=[name for name in own if own[name]])
    times = few["short"] / few["long"]
    higher = f"; at {SIZE} the switch has {times:.0f} times the rate of long throughout" if times > 1 else ""
    return replace(line, verdict=line.verdict + higher)


def _late_switch(results: PretrainingResults, size: str) -> Any:
    """The switch at 80% beside long throughout."""
    return results.curriculum(size).set_index("arm").loc["switch-80"]


def with_a_copying_model(
    line: Line, scratch: dict[str, Any], rates: dict[str, float], *, own_rates: Sequence[str] = ()
) -> Line:
    """The line of short-then-long pretraining: by sizes from scratch, and by the model that has far context to lose.

    Args:
        scratch: the switch at 80% beside long throughout, by size.
        rates: of the last size, `rate_factors`.
        own_rates: the sizes whose arms were trained at different rates.
    """
    results = copying_results()
    late = _late_switch(results, TRAINED_ON)
    less, near = late.copied_less, results.copying(TRAINED_ON, "switch-80", "long", 1, 256)
    points = measured(*(100 * less[name] for name in BOUNDS), digits=1)
    costs = [one.flops for one in scratch.values()]
    reads = "; ".join(f"{size} {in_nats(one)} nat" for size, one in scratch.items())
    ours = (
        f"switch at 80% minus long throughout, from scratch: {reads}, at {min(costs):.0%} to {max(costs):.0%} of the "
    )
    ours += f"operations; in the tiny Llama, which copies, {points} points copied from over 1,024 tokens back"
    steps = f"{late.long_steps:.0f} of {late.short_steps + late.long_steps:.0f} steps long"
    sizes = ", ".join(size for size in scratch if size != MORE_READ)
    scale = f"Llamas of {sizes} from scratch{f', and {MORE_READ}' * (MORE_READ in scratch)}, "
    scale += f"{scratch[GPU_SIZE].seeds} seeds each; {MODELS['tiny']}, "
    scale += f"trained on, {late.seeds} orders of the texts, {steps}"
    read = {size: better_or_worse(one) for size, one in scratch.items()}
    words = {"better": "better", "worse": "worse", NO_DIFFERENCE: "not shown to differ"}
    found = {word: [size for size in read if read[size] == word] for word in words}
    whys = [f"{words[word]} at {' and at '.join(sizes)}" for word, sizes in found.items() if sizes]
    whys = whys if found["better"] or found["worse"] else []
    scale += f"; arms with rates of their own: {', '.join(own_rates)}" if own_rates else ""
    whys = [f"from scratch a late switch reads {', '.join(whys)}"] if whys else []
    copies = f"a model that copies then copies less, {'near and far' if near['high'] < 0 else 'far back'}"
    lost = less["high"] < 0
    counts = ", ".join(f"{words[word]} in {len(sizes)}" for word, sizes in found.items() if sizes)
    brief = f"of {len(read)} trainings from scratch a late switch reads {counts}" if whys else ""
    brief = "; ".join(filter(None, [brief, "a model that copies then copies less" * lost]))
    why = "; ".join([*whys, *([copies] if lost else [])])
    against, equal = bool(lost or found["worse"]), [size for size, one in scratch.items() if one.high < EQUAL]
    if against:
        judged = f"{UNDECIDED if equal else DISAGREES}: {why}"
        why = brief
    elif len(equal) == len(scratch) and less["low"] > -MARGIN:
        judged = f"{AGREES}: {(why := 'from scratch, and in a model that copies')}"
    else:
        why = f"a loss of {EQUAL} nat or of {100 * MARGIN:.0f} points is not excluded everywhere"
        judged = f"{UNDECIDED}: {why}"
    judged += "; far context is worth little from scratch"
    if GPU_SIZE in equal and rates["long"] > rates["short"]:
        edge = ", the highest tried" if rates["long"] == rates["highest"] else ""
        judged += f"; at {GPU_SIZE} long throughout has {rates['long'] / rates['short']:.0f} times the rate{edge}"
    return replace(line, ours=ours, scale=scale, verdict=judged, why=why)
