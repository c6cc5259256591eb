"""What each stage of tuning changes of a real model besides the answers asked for: short tasks.

The stages: extended, tuned on a few quotations (`sft`), then DPO or RL, each with its seeds. Items are paired.

Expected, before any stage was asked (SmolLM2-135M-Instruct): no stage changes the share of right choices of HellaSwag
or TruthfulQA beyond its interval. Their 100 questions cannot exclude 5 points, so the contrast is told beside it: how
far the right choice's NLL is below the others'. It changes by less than 0.05 nat per token in each stage. An interval
wholly beyond that, on either side, refutes it.

The shares did as expected. The contrast of HellaSwag did at each stage, that of TruthfulQA after the quotations. After
DPO and RL its intervals reach beyond 0.05 nat, upwards: undecided.

Planted numbers behind long texts were to be asked, too. Reading them for every stage took too long; none was asked.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.race_results import wider
from llama_long_utils.evaluation.benchmarks import measure
from llama_long_utils.evaluation.statistics import paired_mean
from llama_long_utils.model.adapters import find_adapter
from llama_long_utils.settings import Preset

TASKS = ("hellaswag", "truthfulqa_mc1")
MEASURES = ("accuracy_per_character", "contrast")


def stage_changes(preset: Preset, arms: Sequence[tuple[str, int, Path]]) -> pd.DataFrame:
    """What each stage changes, from answers to every item: a row for each stage, task and measure.

    `arms`: (arm, seed, its adapter), the instruction-tuned model, `sft`, among them; each other comes after that.
    Intervals: 95%, a bootstrap over items, each the mean of its seeds, or Student's t over seeds if that is wider.
    """
    found = []
    for arm, seed, folder in [("extended", 0, find_adapter(preset)), *arms]:
        answers = measure(preset, TASKS, arms=["extended"], adapter=str(folder))
        found.append(answers.melt(["task", "item"], MEASURES, "measure").assign(arm=arm, seed=seed))
    return changes_of_stages(pd.concat(found))


def changes_of_stages(answers: pd.DataFrame) -> pd.DataFrame:
    """`stage_changes` from a row for each arm, seed, task, measure and item, with its `value`."""
    rows = []
    for labels, part in answers.groupby(["task", "measure"], sort=False):
        values = part.pivot_table(index="item", columns=["arm", "seed"], values="value")
        for arm in dict.fromkeys(part.arm):
            if arm == "extended":
                continue
            since = "extended" if arm == "sft" else "sft"
            before, after = values[since].mean(axis=1), values[arm]
            change = paired_mean(before.to_numpy(), after.mean(axis=1).to_numpy())
            low, high = wider(change.low, change.high, after.sub(before, axis=0).mean())
            row = dict(zip(["task", "measure"], labels, strict=True))
            row |= {"arm": arm, "since": since, "items": len(values), "seeds": after.shape[1]}
            numbers = {"before": change.before, "after": change.after, "difference": change.difference}
            rows.append({**row, **numbers, "low": low, "high": high})
    return pd.DataFrame(rows)
