"""What each stage of tuning changes of a real model besides the answers asked for: short tasks, and far words.

The stages: extended, tuned on a few quotations (`sft`), then DPO or RL, each with its seeds. Items are paired.

Expected, before any stage was asked (SmolLM2-135M-Instruct):
- HellaSwag and TruthfulQA: no stage changes the share of right choices beyond its interval. Their 100 questions cannot
  exclude 5 points, so the contrast is told beside it: how far the right choice's NLL is below the others'. It changes
  by less than 0.05 nat per token in each stage. An interval wholly beyond that, on either side, refutes it.
- Planted numbers behind 8,192 and 16,384 tokens (the old window is 8,192): a stage that makes long text dearer makes
  them less likely. So DPO and RL, which cost 0.05 nat, lower their log-probability, and the extended model's
  quotations raise it: quoting is what was asked for. An interval on the other side of 0 refutes either.
- Copies of the text's own words: the same, weaker.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from transformers import PreTrainedTokenizerBase

from experiments.dose_questions import COLUMNS, ask, haystacks
from experiments.race_results import wider
from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.benchmarks import measure
from llama_long_utils.evaluation.statistics import paired_mean
from llama_long_utils.model.adapters import find_adapter
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import weights_sha256
from llama_long_utils.progress import track
from llama_long_utils.settings import Preset

TASKS = ("hellaswag", "truthfulqa_mc1")
SHORT = ("accuracy_per_character", "contrast")
FAR = ("exact", "log_probability")
LENGTHS = (8192, 16_384)
TEXTS, KEYS = 3, 20  # held-out documents, the longest of each source; statements planted in each


def stage_changes(
    preset: Preset,
    arms: Sequence[tuple[str, int, Path]],
    held_out: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
) -> pd.DataFrame:
    """What each stage changes, from answers to every item: a row for each stage, task, length and measure.

    `arms`: (arm, seed, its adapter), the instruction-tuned model, `sft`, among them; each other comes after that.
    Intervals: 95%, a bootstrap over items, each the mean of its seeds, or Student's t over seeds if that is wider.
    """
    texts = {one.source: one for one in sorted(held_out, key=lambda one: one.tokens) if one.tokens > max(LENGTHS)}
    stacks = haystacks([*texts.values()][:TEXTS], tokenizer, LENGTHS, keys=KEYS)
    found = []
    for arm, seed, folder in [("extended", 0, find_adapter(preset)), *arms]:
        short = measure(preset, TASKS, arms=["extended"], adapter=str(folder))
        items = short.melt(["task", "length", "item"], SHORT, "measure").dropna()
        own = replace(cache, inputs={**cache.inputs, "adapter": weights_sha256(folder)})
        model = load_arm(preset, "extended", adapter=folder)
        rows = []
        for stack in track(stacks, f"behind {TEXTS} texts: {arm}, seed {seed}"):
            rows += own.value("behind a text", lambda m=model, one=stack: ask(m, one), stack=stack)
        far = pd.DataFrame(rows, columns=COLUMNS)
        far["item"] = far.text.astype(str) + "/" + far.number.astype(str)
        far = far.rename(columns={"kind": "task"}).melt(["task", "length", "item"], FAR, "measure")
        found.append(pd.concat([items, far]).assign(arm=arm, seed=seed))
    return changes_of_stages(pd.concat(found))


def changes_of_stages(answers: pd.DataFrame) -> pd.DataFrame:
    """`stage_changes` from a row for each arm, seed, task, length, measure and item, with its `value`."""
    rows = []
    for labels, part in answers.groupby(["task", "length", "measure"], sort=False):
        values = part.pivot_table(index="item", columns=["arm", "seed"], values="value")
        for arm in dict.fromkeys(part.arm):
            if arm == "extended":
                continue
            since = "extended" if arm == "sft" else "sft"
            before, after = values[since].mean(axis=1), values[arm]
            change = paired_mean(before.to_numpy(), after.mean(axis=1).to_numpy())
            low, high = wider(change.low, change.high, after.sub(before, axis=0).mean())
            row = dict(zip(["task", "length", "measure"], labels, strict=True))
            row |= {"arm": arm, "since": since, "items": len(values), "seeds": after.shape[1]}
            numbers = {"before": change.before, "after": change.after, "difference": change.difference}
            rows.append({**row, **numbers, "low": low, "high": high})
    return pd.DataFrame(rows)
