"""Scoring retrieval: by probability and by what is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from llama_long_utils.cache import Cache
from llama_long_utils.evaluation.generation import greedy
from llama_long_utils.evaluation.retrieval_items import RetrievalItem
from llama_long_utils.model.loss import causal_lm, in_compute_dtype
from llama_long_utils.settings import Retrieval

ROUGE = RougeScorer(["rougeL"])
VERSION = 2  # of what `score` keeps: raise it when a row changes


@dataclass(frozen=True)
class Reply:
    """What a model makes of a question: arrays with an entry for each token of the answer."""

    log_probabilities: np.ndarray  # given the prompt and the answer up to there, in nats: float32
    likeliest: np.ndarray  # whether it is the likeliest token there: bool
    written: np.ndarray | None  # tokens of greedy decoding; None if nothing was generated


@torch.no_grad()
def replies(model: PreTrainedModel | PeftModel, items: Sequence[RetrievalItem], *, generate: bool) -> list[Reply]:
    """Score items of one length, prompt and answer together, in ONE forward pass over both.

    Logits exist at the answers' tokens only. Generation continues from the keys and values of the same
    pass, with those of the answers hidden. Scoring alone keeps none (16 GiB: Llama 2 7B, 32,768 tokens).

    Raises:
        ValueError: the items differ in length.
    """
    if len({item.length for item in items}) != 1:
        raise ValueError("items scored together need one length, prompt and answer together: group them")
    model.eval()
    inner, length = causal_lm(model), items[0].length
    head = inner.get_output_embeddings()
    counts = torch.tensor([len(item.answer_ids) for item in items])[:, None]
    most = int(counts.max())
    ids = torch.from_numpy(np.stack([item.token_ids for item in items]))
    cache = DynamicCache(config=inner.config) if generate else None
    with in_compute_dtype(model):
        hidden = inner.model(
            input_ids=ids.to(model.device), past_key_values=cache, use_cache=generate
        ).last_hidden_state
    logits = head(hidden[:, -most - 1 : -1].to(head.weight.dtype)).float().cpu()  # the last token has none after it
    answers, likeliest = ids[:, -most:], logits.argmax(-1)
    log_probabilities = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    written = [None] * len(items)
    if generate:
        first = likeliest.gather(1, most - counts)
        seen = torch.arange(length + 1) < length - counts  # not the answer
        seen[:, -1] = True  # but what was written first
        options = {"mask": seen.long(), "past_key_values": cache, "eos_token_id": None}
        after = greedy(model, torch.cat([ids, first], dim=1), max(most - 1, 1), **options)
        written = torch.cat([first, after.cpu()], dim=1).numpy()
    return [
        Reply(log[-count:].numpy(), right[-count:].numpy(), None if text is None else text[:count])
        for log, right, text, count in zip(log_probabilities, likeliest == answers, written, counts[:, 0], strict=True)
    ]


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RetrievalItem],
    settings: Retrieval,
    cache: Cache,
) -> pd.DataFrame:
    """Both scores of every item, one row each, in their order.

    Columns: task, length, number, depth, place, document, log_probability (nats, mean over the answer's tokens),
    probability (its exponential: the geometric mean over tokens), all_likeliest, same_tokens (whether greedy decoding
    writes the answer's tokens), rouge_l (0 to 100), exact (the answer's words), wrote ("answer", "other": what
    answers another question of `RetrievalItem.others`, or "else"), answer, written. What concerns generation is missing
    at lengths beyond `tasks.generate_up_to`. The inputs of `cache`, which keeps the rows, must name the model.
    """

    def measure(part: Sequence[RetrievalItem]) -> list[dict]:
        rows = []
        for length in dict.fromkeys(item.length for item in part):
            alike = [item for item in part if item.length == length]
            found = replies(model, alike, generate=length <= settings.tasks.generate_up_to)
            rows += [_row(tokenizer, item, reply) for item, reply in zip(alike, found, strict=True)]
        return rows

    order = sorted(range(len(items)), key=lambda index: (items[index].length, len(items[index].answer_ids)))
    inputs = {"item_key": vars, "at_once": settings.prompts_at_once, "generate_up_to": settings.tasks.generate_up_to}
    rows = cache.items("retrieval", [items[index] for index in order], measure, **inputs)
    return pd.DataFrame(rows, index=order).sort_index()


def _row(tokenizer: PreTrainedTokenizerBase, item: RetrievalItem, reply: Reply) -> dict:
    log_probability = float(reply.log_probabilities.mean(dtype=np.float64))
    row = {name: getattr(item, name) for name in ("task", "length", "number", "depth", "place", "document")}
    row |= {"log_probability": log_probability, "probability": float(np.exp(log_probability))}
    row |= {"all_likeliest": float(reply.likeliest.all()), "same_tokens": np.nan, "rouge_l": np.nan, "exact": np.nan}
    row |= {"wrote": None, "answer": item.answer, "written": None}
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


def rouge_l(answer: str, written: str) -> float:
    """ROUGE-L (Lin, 2004) of what was written, cut to as many words as the answer has: F1 of the longest common
    subsequence of lower-case words, from 0 to 100. A base model does not know where to stop, hence the cut."""
    wanted, found = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, written))
    found = found[: len(wanted)]
    share = ROUGE.score(" ".join(wanted), " ".join(found))["rougeL"].precision  # of the words written
    return 200 * round(share * len(found)) / max(len(wanted) + len(found), 1)
