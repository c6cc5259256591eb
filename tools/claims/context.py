"""C5 and C6: how loss falls with context, and whether it falls faster in larger models."""

from collections.abc import Collection
from typing import Any

import pandas as pd

from experiments.power_law import CLOSER
from experiments.pretraining_4m import SIZE, results_of_4m
from experiments.pretraining_cells import MORE_TOKENS
from experiments.pretraining_gpu_results import GPU_SIZE, gpu_results
from experiments.pretraining_rates import LARGER, larger_sizes
from experiments.pretraining_results import pretraining_results
from experiments.pretraining_tokens import tokens_results
from llama_long_utils.notebooks import measured
from llama_long_utils.records import recorded
from tools.claims.line import AGREES, BOUNDS, DISAGREES, MODELS, UNDECIDED, Line, in_nats
from tools.claims.pretraining import FROM_SCRATCH

READ_BY_CONTEXT = MODELS | {"tiny": f"{MODELS['tiny']} after its extension"}  # the others as pretrained
BY_CONTEXT = "06_loss_by_context"
FORETOLD = 0.02  # nat, by which a law may miss the loss behind the longest context


def power_law(published: dict[str, Any]) -> Line:
    """C5: judged by the error of the fitted law at a context that it was not fitted to."""
    theirs = published["figure_1_power_law"]["7B"]
    claim = "Loss falls with context c as (α/c)^β + γ"
    paper = f"β = {theirs['beta']}, γ = {theirs['gamma']} at 7B (Figure 1)"
    record = recorded("smollm2", BY_CONTEXT)
    if record is None:
        return Line(claim, paper)
    predictions, texts = record.table("predictions"), record.table("contexts").groupby("document").kind.first()
    far = predictions[predictions.context == predictions.context.max()].set_index("law")
    law, line = (far.loc[name, BOUNDS] for name in ("power law", "line in log c"))
    up_to, longest = far.fitted_up_to.iloc[0], far.context.iloc[0]
    nearer = -far.loc[CLOSER, ["value", "high", "low"]].set_axis(BOUNDS)
    ours = f"fitted up to {up_to:,} tokens and asked for {longest:,}, predicted minus measured in nats; the law "
    ours += f"{in_nats(law)}; a line in log c {in_nats(line)}; the law is nearer by {in_nats(nearer)}; "
    ours += "other models: notebook 13"
    if max(abs(law.low), abs(law.high)) < FORETOLD:
        judged = AGREES
    elif min(abs(law.low), abs(law.high)) > FORETOLD and law.low * law.high > 0:
        judged = DISAGREES
    else:
        known = (law.high - law.low) / 2
        judged = (
            f"{UNDECIDED}: the error is known to ±{known:.1f} nat; ±{FORETOLD} was needed, too much of so few texts"
        )
    return Line(
        claim,
        paper,
        ours,
        f"{MODELS['smollm2']} before its extension, {len(texts)} texts of {texts.nunique()} kinds, one seed",
        judged,
    )


def model_size(laws: dict[str, Any]) -> Line:
    """C6: judged by the intervals of the steps of beta from model to model, on the same target tokens."""
    small, large = laws["7B"]["beta"], laws["70B"]["beta"]
    claim, paper = "Larger models use context better", f"β = {small} at 7B, {large} at 70B (Figure 1)"
    record = next((found for preset in MODELS if (found := recorded(preset, BY_CONTEXT))), None)
    if record is None or len(betas := record.table("betas")) == 1:
        return Line(claim, paper)
    steps, each = (betas[betas.model.str.contains(" minus ") == whether] for whether in (True, False))
    ours = "β on the same targets behind the same contexts; "
    ours += "; ".join(f"{row.model} {measured(row.value, row.low, row.high)}" for row in steps.itertuples())
    largest, wide = gpu_results(), larger_sizes()[LARGER]
    fair = {
        f"{LARGER} minus {FROM_SCRATCH}": wide.context_saves_more(LARGER, FROM_SCRATCH, pretraining_results()),
        f"{SIZE} minus {LARGER}": results_of_4m().context_saves_more(SIZE, LARGER, wide),
        f"{GPU_SIZE} minus {LARGER}": largest.context_saves_more(GPU_SIZE, MORE_TOKENS, tokens_results()),
    }
    saved = {names: pd.Series(found) for names, found in fair.items()}
    ours += "; what context saves, in nats, from scratch on as many tokens: "
    ours += ", ".join(f"{names} {in_nats(found)}" for names, found in saved.items())
    judged = AGREES if steps.low.min() > 0 else DISAGREES if steps.high.max() < 0 else UNDECIDED
    texts = record.table("contexts").groupby("document").kind.first()
    names = ", ".join(READ_BY_CONTEXT[name] for name in each.model)
    seeds = min(found.seeds for found in saved.values())
    scale = f"{names}; {len(texts)} texts of {texts.nunique()} kinds, one seed; from scratch {seeds} seeds"
    why = f"β is known too badly; from scratch {_larger_save_more(saved.values())}"
    return Line(claim, paper, ours, scale, f"{judged}: {why}" if judged == UNDECIDED else judged, why)


def _larger_save_more(found: Collection[pd.Series]) -> str:
    """In how many pairs of sizes, trained on as many tokens, the larger one's context saves more nats."""
    count = sum(one.low > 0 for one in found)
    return f"the larger model's context saves more nats in {count} of {len(found)} pairs of sizes"
