"""What the harness logged of a task, as metrics of each item."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Metrics = dict[str, Any]
KEYS = ["task", "length", "arm", "item", "asked", "written"]


def logged_items(
    name: str, arm: str, samples: dict[str, list[dict[str, Any]]], tokens: Mapping[tuple[str, str], int]
) -> pd.DataFrame:
    """One row for each item, from what the harness logged of one task or group.

    Columns: task, length (tokens of the prompts; 0: of no given length), arm, item (its name), asked (a hash of prompt
    and right answer), written (text, if any was written), and one for each metric. `samples` are by the harness' own
    name of a task, one for each of its filters; `tokens` those of each (prompt, continuation) that was read.
    """
    rows = []
    for leaf, logged in samples.items():
        by_item: dict[int, list[dict[str, Any]]] = {}
        for sample in logged:
            by_item.setdefault(sample["doc_id"], []).append(sample)
        for number, item in by_item.items():
            first, length = item[0], item[0]["doc"].get("max_length", 0)
            named = first["doc"].get("name") or f"{leaf}/{number}"
            row = {"task": name, "length": length, "arm": arm, "item": named}
            asked = first["prompt_hash"] + first["target_hash"]
            rows.append({**row, "asked": asked, **_metrics(item, str(length), tokens)})
    return pd.DataFrame(rows)


def _metrics(item: list[dict[str, Any]], length: str, tokens: Mapping[tuple[str, str], int]) -> Metrics:
    asked, target = item[0]["arguments"], item[0]["target"]
    metrics: Metrics = {}
    read = []
    for text, (answer, *_) in zip(asked, item[0]["resps"], strict=True):
        if isinstance(answer, dict):
            metrics |= answer
        elif isinstance(answer, str):
            metrics["written"] = answer
        else:
            read.append((-answer[0], tokens[text]))
    if len(read) == len(asked) > 1 and isinstance(target, int) and len({prompt for prompt, _ in asked}) == 1:
        return choice_metrics(*np.array(read).T, [len(choice.strip()) for _, choice in asked], target)
    if len(read) == 1:
        metrics["answer_nll"] = read[0][0] / read[0][1]
    for sample in item:
        suffix = "" if sample["filter"] == "none" else f" ({sample['filter']})"
        # RULER names its one metric by the length, and gives -1 for the lengths of other items.
        names = [length] if length in sample["metrics"] else sample["metrics"]
        for name in names:
            if isinstance(sample[name], int | float):
                metrics[f"{'score' if name == length else name}{suffix}"] = float(sample[name])
    return metrics


def choice_metrics(
    costs: np.ndarray, tokens: Sequence[int] | np.ndarray, characters: Sequence[int], answer: int
) -> Metrics:
    """Whether the right choice is the likeliest, in total and per character; its NLL per token, and its contrast.

    `costs` are the choices' NLL in nats, `answer` the right one's number; a tie is wrong. `contrast` is how far its NLL
    per token is below the others' mean: what makes all of them cheaper cancels out. Letters, of one character each,
    have no accuracy per character.
    """
    per_token, per_character = costs / np.array(tokens), costs / np.array(characters)
    metrics = {"accuracy": float(costs[answer] < np.delete(costs, answer).min())}
    if max(characters) > 1:
        metrics["accuracy_per_character"] = float(per_character[answer] < np.delete(per_character, answer).min())
    contrast = float(np.delete(per_token, answer).mean() - per_token[answer])
    return {**metrics, "answer_nll": float(per_token[answer]), "contrast": contrast}
