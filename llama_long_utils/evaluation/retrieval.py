"""Scoring retrieval: by probability and by what is written, and the effective length."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from llama_long_utils.evaluation.retrieval_items import RetrievalItem
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.model.loss import causal_lm, in_compute_dtype
from llama_long_utils.records import item_results
from llama_long_utils.settings import Retrieval


@dataclass(frozen=True)
class Reply:
    """What a model makes of a question.

    Attributes:
        log_probabilities: of the answer's tokens, each given the prompt and the answer up to there, in nats:
            float32 of shape (answer tokens,).
        likeliest: whether each of them is the likeliest token there: bool of the same shape.
        written: the tokens of greedy decoding, as many as the answer has; None if nothing was generated.
    """

    log_probabilities: np.ndarray
    likeliest: np.ndarray
    written: np.ndarray | None


@torch.no_grad()
def replies(model: PreTrainedModel | PeftModel, items: Sequence[RetrievalItem], *, generate: bool) -> list[Reply]:
    """Score items of one prompt length and one answer length in ONE forward pass over prompt and answer.

    Logits exist at the answer's tokens only. Generation goes on from the keys and values of the same pass, after
    those of the answer are removed: no prompt is read twice. They take 16 GiB for 32,768 tokens of Llama 2 7B, so
    without generation none are kept.

    Raises:
        ValueError: prompts or answers differ in length.
    """
    if len({(len(item.prompt), len(item.answer_ids)) for item in items}) != 1:
        raise ValueError("items scored together need prompts of one length and answers of one length: group them")
    model.eval()
    inner, count = causal_lm(model), len(items[0].answer_ids)
    head = inner.get_output_embeddings()
    rows = np.stack([np.concatenate([item.prompt, item.answer_ids]) for item in items])
    ids = torch.from_numpy(rows).to(model.device)
    cache = DynamicCache(config=inner.config) if generate else None

    def logits(ids: torch.Tensor, last: int) -> torch.Tensor:
        """After the last tokens: fp32 of shape (items, last, vocabulary)."""
        with in_compute_dtype(model):
            hidden = inner.model(input_ids=ids, past_key_values=cache, use_cache=generate).last_hidden_state
        return head(hidden[:, -last:].to(head.weight.dtype)).float()

    of_answers = logits(ids, count + 1)[:, :-1].log_softmax(-1)  # the last token has nothing after it
    answers = ids[:, -count:]
    log_probabilities = of_answers.gather(-1, answers[..., None])[..., 0].cpu().numpy()
    likeliest = of_answers.argmax(-1)
    written = None
    if generate:
        cache.crop(-count)
        tokens = [likeliest[:, :1]]
        while len(tokens) < count:
            tokens.append(logits(tokens[-1], 1).argmax(-1))
        written = torch.cat(tokens, dim=1).cpu().numpy()
    right = (likeliest == answers).cpu().numpy()
    return [Reply(log_probabilities[n], right[n], None if written is None else written[n]) for n in range(len(items))]


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RetrievalItem],
    settings: Retrieval,
) -> pd.DataFrame:
    """Both scores of every item, one row each.

    Columns: task, length, number, depth, place, document, log_probability (nats, mean over the answer's tokens),
    probability (its exponential: the geometric mean over tokens), all_likeliest, same_tokens (whether greedy decoding
    writes the answer's tokens), rouge_l (0 to 100), exact (the answer's words), wrote ("answer", "other": what
    answers another question of `RetrievalItem.others`, or "else"), answer, written. What concerns generation is missing
    at lengths beyond `tasks.generate_up_to`.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((len(item.prompt), len(item.answer_ids)), []).append(index)
    rows: dict[int, dict] = {}
    for (prompt, answer), members in groups.items():
        length, at_once = prompt + answer, settings.prompts_at_once
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            generate = length <= settings.tasks.generate_up_to
            found = replies(model, [items[index] for index in part], generate=generate)
            rows |= {index: _row(tokenizer, items[index], one) for index, one in zip(part, found, strict=True)}
    return pd.DataFrame([rows[index] for index in range(len(items))])


def score_resumably(
    path: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RetrievalItem],
    settings: Retrieval,
) -> pd.DataFrame:
    """`score`, whose rows are kept in the JSON file `path` as they come: an interrupted run goes on.

    The file must stand for the model; see `perplexity.fingerprint`.
    """

    def measure(part: list[RetrievalItem]) -> list[dict]:
        return score(model, tokenizer, part, settings).to_dict("records")

    return pd.DataFrame(item_results(path, items, measure, at_once=2 * settings.prompts_at_once))


def _row(tokenizer: PreTrainedTokenizerBase, item: RetrievalItem, reply: Reply) -> dict:
    log_probability = float(reply.log_probabilities.mean(dtype=np.float64))
    row = {
        "task": item.task,
        "length": len(item.prompt) + len(item.answer_ids),
        "number": item.number,
        "depth": item.depth,
        "place": item.place,
        "document": item.document,
        "log_probability": log_probability,
        "probability": float(np.exp(log_probability)),
        "all_likeliest": float(reply.likeliest.all()),
        "same_tokens": np.nan,
        "rouge_l": np.nan,
        "exact": np.nan,
        "wrote": None,
        "answer": item.answer,
        "written": None,
    }
    if reply.written is not None:
        written = tokenizer.decode(reply.written, skip_special_tokens=True)
        found = rouge_l(item.answer, written)
        row |= {"same_tokens": float((reply.written == item.answer_ids).all()), "rouge_l": found}
        row |= {"exact": float(found == 100), "wrote": _wrote(item, written), "written": written}
    return row


def _wrote(item: RetrievalItem, written: str) -> str:
    of_answer = rouge_l(item.answer, written)
    of_others = max((rouge_l(other, written) for other in item.others), default=0.0)
    if of_answer == 100:
        return "answer"
    return "other" if of_others >= 80 and of_others > of_answer else "else"  # four of a number's five digits


def summary(rows: pd.DataFrame, by: Sequence[str], *, bootstrap_samples: int, seed: int) -> pd.DataFrame:
    """Means over items with 95% intervals from resampling questions (a needle at all its depths is one).

    Args:
        rows: from `score`, with a column `arm`.
        by: columns to group by, for example arm, task and length.

    Returns:
        Columns of `by`, items, log_probability, probability, probability_low, probability_high, all_likeliest,
        exact, rouge_l, rouge_l_low, rouge_l_high.
    """
    table = []
    for names, group in rows.groupby([*by], sort=False):
        questions = group.groupby("number", sort=False)
        weights = Bootstrap(len(questions), bootstrap_samples, seed).weights() / len(questions)
        row = {**dict(zip(by, names, strict=True)), "items": len(group)}
        for column in ("log_probability", "probability", "all_likeliest", "exact", "rouge_l"):
            row[column] = float(group[column].mean())
            if column in ("probability", "rouge_l"):
                low, high = np.percentile(weights @ questions[column].mean().to_numpy(dtype=float), [2.5, 97.5])
                row |= {f"{column}_low": float(low), f"{column}_high": float(high)}
        table.append(row)
    return pd.DataFrame(table)


def rouge_l_by_chance(rows: pd.DataFrame) -> pd.Series:
    """Mean ROUGE-L of what was written against the answers to the OTHER questions of the same arm, task and length.

    What the right form alone is worth ("a ... and a ... under the", any five digits), with the right answer nowhere in
    sight. One value for each row with something written.
    """
    found = {}
    for _, group in rows.dropna(subset="rouge_l").groupby(["arm", "task", "length"]):
        answers = group.drop_duplicates("number")
        for row in group.itertuples():
            others = answers.answer[answers.number != row.number]
            found[row.Index] = np.mean([rouge_l(answer, row.written) for answer in others]) if len(others) else np.nan
    return pd.Series(found, index=rows.index, dtype=float)


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """How far probabilities and generated answers agree, for every arm and task, over all lengths with both.

    Args:
        rows: from `score`, with a column `arm`.

    Returns:
        Columns arm, task, items, all_likeliest and exact (shares), same_verdict (share of items where all tokens are
        likeliest if and only if greedy decoding writes them), rank_correlation (Spearman, of probability and ROUGE-L;
        missing where one of them does not vary).
    """
    table = []
    for (arm, task), group in rows.dropna(subset="rouge_l").groupby(["arm", "task"], sort=False):
        row = {"arm": arm, "task": task, "items": len(group), **group[["all_likeliest", "exact"]].mean().to_dict()}
        row["same_verdict"] = float((group.all_likeliest == group.same_tokens).mean())
        varied = min(np.ptp(group.probability), np.ptp(group.rouge_l)) > 0
        row["rank_correlation"] = group.probability.corr(group.rouge_l, "spearman") if varied else np.nan
        table.append(row)
    return pd.DataFrame(table)


def paired_difference(
    rows: pd.DataFrame, first: str, second: str, measure: str, *, bootstrap_samples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of a measure for arm `first` minus that for arm `second` on the same questions, with its 95% interval.

    The interval resamples questions; one asked at several lengths is one question.
    """
    by_arm = rows.pivot_table(index=["task", "number", "length"], columns="arm", values=measure)
    difference = (by_arm[first] - by_arm[second]).groupby(["task", "number"]).mean().to_numpy()[:, None]
    low, high = Bootstrap(len(difference), bootstrap_samples, seed).interval(difference, np.ones_like(difference))
    return float(difference.mean()), float(low[0]), float(high[0])


def effective_length(scores: np.ndarray, lengths: Sequence[int], threshold: float) -> np.ndarray:
    """The longest length at which the score is at least the threshold there and at all shorter lengths asked at.

    Args:
        scores: shape (..., lengths).
        lengths: rising, in tokens.

    Returns:
        Tokens, int of shape (...); 0 where the score is below the threshold at the shortest length already.
    """
    held = np.cumprod(np.asarray(scores) > threshold - 1e-9, axis=-1).sum(axis=-1)
    return np.array([0, *lengths])[held]


def effective_lengths(rows: pd.DataFrame, *, threshold: float, bootstrap_samples: int, seed: int) -> pd.DataFrame:
    """Effective length of every arm and task by both scores, with its 95% interval over items.

    A resampled item takes its scores at all lengths along. Lengths without generation count for probability only.

    Args:
        rows: from `score`, with a column `arm`.
        threshold: for the mean of probability, and of ROUGE-L / 100.

    Returns:
        Columns arm, task, measure (probability, rouge_l), threshold, tokens, low, high, items.
    """
    table = []
    for (arm, task), group in rows.groupby(["arm", "task"], sort=False):
        for measure, unit in (("probability", 1.0), ("rouge_l", 100.0)):
            scores = group.pivot_table(index="number", columns="length", values=measure).dropna() / unit
            if scores.empty:  # nothing was generated
                continue
            weights = Bootstrap(len(scores), bootstrap_samples, seed).weights() / len(scores)
            lengths = list(scores.columns)
            reached = effective_length(weights @ scores.to_numpy(), lengths, threshold)
            low, high = np.percentile(reached, [2.5, 97.5], method="nearest")
            found = {"tokens": int(effective_length(scores.mean().to_numpy(), lengths, threshold))}
            found |= {"low": int(low), "high": int(high), "items": len(scores)}
            table.append({"arm": arm, "task": task, "measure": measure, "threshold": threshold, **found})
    return pd.DataFrame(table)


@torch.no_grad()
def answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RetrievalItem],
    settings: Retrieval,
) -> list[str]:
    """What the model writes after each prompt, by greedy decoding: `answer_tokens` tokens or up to EOS."""
    model.eval()
    written: list[str] = []
    for start in range(0, len(items), settings.prompts_at_once):
        prompts = np.stack([item.prompt for item in items[start : start + settings.prompts_at_once]])
        ids = torch.from_numpy(prompts).to(model.device)
        with in_compute_dtype(model):
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.answer_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        written += tokenizer.decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return written


def rouge_l(answer: str, written: str) -> float:
    """ROUGE-L (Lin, 2004) of what was written, cut to as many words as the answer has: F1 of the longest common
    subsequence of lower-case words, from 0 to 100. The model is not told where to stop, hence the cut."""
    wanted, found = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, written))
    found = found[: len(wanted)]
    longest = np.zeros((len(wanted) + 1, len(found) + 1))
    for row, word in enumerate(wanted):
        for column, other in enumerate(found):
            longest[row + 1, column + 1] = (
                longest[row, column] + 1 if word == other else max(longest[row, column + 1], longest[row + 1, column])
            )
    return 200 * float(longest[-1, -1]) / max(len(wanted) + len(found), 1)
