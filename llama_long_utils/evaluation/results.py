"""What the harness logged of a task, as metrics of each item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Metrics = dict[str, Any]
Tokens = Mapping[tuple[str, str], int]  # of a continuation, by (prompt, continuation)


@dataclass(frozen=True)
class Result:
    """What one arm scored on one task, item by item.

    Attributes:
        length: tokens of the prompts; 0 for a task of no given length.
        items: names.
        asked: a hash of the prompt and the right answer of each item.
        metrics: of each item; `written` is text, the others are numbers.
    """

    task: str
    length: int
    arm: str
    items: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)

    def values(self, metric: str) -> np.ndarray:
        """Shape (items,)."""
        return np.array([row[metric] for row in self.metrics], dtype=float)

    @property
    def numbers(self) -> list[str]:
        """Names of the metrics that are numbers."""
        return [name for name, value in self.metrics[0].items() if not isinstance(value, str)]


def logged_results(name: str, arm: str, samples: dict[str, list[dict[str, Any]]], tokens: Tokens) -> list[Result]:
    """One result for each length, from what the harness logged of one task or group.

    Args:
        samples: by the harness' own name of a task; an item is one sample for each of the task's filters.
        tokens: of each continuation whose likelihood was read.
    """
    by_length: dict[int, Result] = {}
    for leaf, logged in samples.items():
        by_item: dict[int, list[dict[str, Any]]] = {}
        for sample in logged:
            by_item.setdefault(sample["doc_id"], []).append(sample)
        for number, item in by_item.items():
            doc = item[0]["doc"]
            length = doc.get("max_length", 0)
            result = by_length.setdefault(length, Result(name, length, arm))
            result.items.append(doc.get("name") or f"{leaf}/{number}")
            result.asked.append(item[0]["prompt_hash"] + item[0]["target_hash"])
            result.metrics.append(_metrics(item, tokens))
    return list(by_length.values())


def _metrics(item: list[dict[str, Any]], tokens: Tokens) -> Metrics:
    asked, said = item[0]["arguments"], [given[0] for given in item[0]["resps"]]
    read = [(text, answer[0]) for text, answer in zip(asked, said, strict=True) if not isinstance(answer, str)]
    counts = [tokens[text] for text, _ in read]
    costs = np.array([-likelihood for _, likelihood in read])
    target = item[0]["target"]
    if len(read) == len(asked) > 1 and isinstance(target, int) and len({prompt for prompt, _ in asked}) == 1:
        return choice_metrics(costs, counts, [len(choice.strip()) for _, choice in asked], target)
    metrics: Metrics = {"answer_nll": costs[0] / counts[0]} if len(read) == 1 else {}
    length = str(item[0]["doc"].get("max_length", ""))
    for sample in item:
        suffix = "" if sample["filter"] == "none" else f" ({sample['filter']})"
        for metric in sample["metrics"]:
            if length in sample["metrics"] and metric != length:
                continue  # RULER names its one metric by the length, and gives -1 for the lengths of other items
            if isinstance(sample[metric], int | float):
                metrics[f"{'score' if metric == length else metric}{suffix}"] = float(sample[metric])
    written = [answer for answer in said if isinstance(answer, str)]
    return {**metrics, "written": written[0]} if written else metrics


def choice_metrics(costs: np.ndarray, tokens: Sequence[int], characters: Sequence[int], answer: int) -> Metrics:
    """Whether the right choice is the likeliest, in total and per character; its NLL per token, and its contrast.

    A tie is wrong. `contrast` is how far the right choice's NLL per token is below the others' mean: what makes all of
    them cheaper cancels out. Letters, of one character each, have no accuracy per character.

    Args:
        costs: NLL of the choices in nats.
        answer: number of the right one.
    """

    def likeliest(costs: np.ndarray) -> float:
        return float(costs[answer] < np.delete(costs, answer).min())

    per_token = costs / np.array(tokens)
    per_character = likeliest(costs / np.array(characters))
    return {
        "accuracy": likeliest(costs),
        **({"accuracy_per_character": per_character} if max(characters) > 1 else {}),
        "answer_nll": float(per_token[answer]),
        "contrast": float(np.delete(per_token, answer).mean() - per_token[answer]),
    }
