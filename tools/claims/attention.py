"""C12: what attention costs, and what sparse attention saves."""

from typing import Any

import pandas as pd

from experiments.pretraining_4m import SIZE, equal_seconds_4m, results_of_4m
from experiments.pretraining_gpu_results import GPU_SIZE, as_trained, gpu_results
from experiments.pretraining_rates import LARGER
from experiments.pretraining_sparse import LOWER, SHORT, equal_operations, equal_seconds, short_results, sparse_results
from experiments.real_models import attention_share, our_faster_steps
from llama_long_utils.notebooks import NO_DIFFERENCE
from llama_long_utils.records import recorded
from tools.claims.line import AGREES, DISAGREES, UNDECIDED, Line, better_or_worse, in_nats


def full_attention(attention: dict[str, Any]) -> Line:
    """C12: judged by attention's share of a 4-bit step's time near the crossover, in two trainers."""
    width = attention["width"]
    crossing = {size: attention["times_width"] * width[size] for size in width}
    record = recorded("gpu", "04_one_gpu_budget")
    steps, device = record.table("steps"), record.content["provenance"]["device"]
    steps = steps[(steps.model == "Llama 2 7B") & steps.cap_gib.isna() & ~steps.tokens_per_second.isna()]
    theirs = steps[steps.contender.str.startswith("Trainer")].sort_values("context")
    ours = our_faster_steps(steps)
    shares = [attention_share(part, crossing["7B"]) for part in (theirs, ours)]
    judged = AGREES if max(shares) < 0.5 else DISAGREES if min(shares) > 0.5 else UNDECIDED
    results = gpu_results()
    sparse = pd.Series(results.difference(GPU_SIZE, ("s2", "full"), ("long", "full")))
    small = sparse_results()
    own = pd.Series(as_trained(results))
    work, time = (pd.Series(one) for one in (equal_operations(small), equal_seconds(small)[1]))
    below, _ = short_results()
    equal = [pd.Series(one) for one in (equal_operations(below, SHORT), equal_seconds(below, SHORT)[1])]
    middle = results_of_4m()
    of_4m = [pd.Series(one) for one in (equal_operations(middle, size=SIZE), equal_seconds_4m(middle)[1])]
    said = {LARGER: _reads_better(work, time), SIZE: _reads_better(*of_4m)}
    alike = f"{said[SIZE]}, at {SIZE}, and at {LARGER} at a lower rate"
    apart = "; ".join(f"at {name} {what}" for name, what in said.items())
    why = f"in time, of a 4-bit step; not judged by it: above 6 h {alike if said[LARGER] == said[SIZE] else apart}"
    return Line(
        "Below 6 h tokens (h: the model's width) attention is not most of the cost",
        f"attention takes half of the operations only at {crossing['70B']:,} tokens at 70B (section 2.1)",
        f"at {crossing['7B']:,} tokens (6 h at 7B) attention takes {shares[0]:.0%} of a step's time with Trainer "
        f"and PEFT, at most {shares[1]:.0%} of our faster step's, which also recomputes more when longer (notebook 4); "
        f"shifted sparse attention (S2) at equal cost (notebook 12): full minus S2 at {LARGER}, 4,096 tokens, "
        f"{in_nats(work)} nat at equal operations, {in_nats(time)} in seconds (cheaper arms: {LOWER} of the rate); "
        f"at {SIZE}, one rate, {in_nats(of_4m[0])} and {in_nats(of_4m[1])}; "
        f"512 tokens, {in_nats(equal[0])} and {in_nats(equal[1])}, each arm at its own rate; at {GPU_SIZE} and equal "
        f"tokens S2 minus full {in_nats(sparse)} nat, read as trained {in_nats(own)}",
        f"Llama 2 7B, 4-bit, random weights, one {device}, {len(theirs)} and {len(ours)} lengths, no interval; "
        f"{GPU_SIZE}, {SIZE} and {LARGER} from scratch, {sparse.seeds} seeds each, 4,096 tokens, above 6 h there; "
        f"{LARGER}, 512 tokens, 4 h",
        f"{judged}: {why}",
        why,
    )


def _reads_better(operations: pd.Series, seconds: pd.Series) -> str:
    """Which attention reads better at equal cost, in operations and in seconds, by full minus sparse."""
    better = {"worse": "sparse attention reads better", "better": "full attention reads better"}
    neither = f"{NO_DIFFERENCE} between full and sparse attention"
    by_operations, by_seconds = (better.get(better_or_worse(one), neither) for one in (operations, seconds))
    if by_operations == by_seconds:
        return f"{by_operations} at equal cost"
    return f"{by_operations} at equal operations, {by_seconds} in seconds"
