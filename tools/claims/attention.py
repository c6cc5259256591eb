"""C12: what attention costs."""

from typing import Any

from experiments.real_models import attention_share, our_faster_steps
from llama_long_utils.records import recorded
from tools.claims.line import AGREES, DISAGREES, UNDECIDED, Line


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
    least, most = (f"{share:.0%}" for share in sorted(shares))
    why = f"{least} to {most} of the time of a 4-bit step of Llama 2 7B"
    return Line(
        "Below 6 h tokens (h: the model's width) attention is not most of the cost",
        f"attention takes half of the operations only at {crossing['70B']:,} tokens at 70B (section 2.1)",
        f"at {crossing['7B']:,} tokens (6 h at 7B) {shares[0]:.0%} of a step's time with Trainer and PEFT, at most "
        f"{shares[1]:.0%} of our faster step's, which also recomputes more when longer (notebook 4)",
        f"Llama 2 7B, 4-bit, random weights, one {device}, {len(theirs)} and {len(ours)} lengths, no interval",
        f"{judged}: {why}",
        why,
    )
