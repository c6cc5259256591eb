"""What answers are made of: right words, their end, repetition, and the same answers cut by a rule."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from llama_long_utils.training.comparisons import Asked

STOPS = (".", ",", ";", ":", "?", "!")  # where a right answer ends


def repeated(answer: list[int]) -> float:
    """The share of pairs of neighbouring tokens that stood in the answer before."""
    pairs = list(itertools.pairwise(answer))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def with_words(table: pd.DataFrame, test: Sequence[Asked], tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """The answers with more columns, and an arm that needs no training: "sft, stopped", cut at the first of STOPS.

    `words` is the share of the right answer's tokens, without EOS, that an answer begins with; `words_right` is 1 if it
    begins with all. `proxy_scaled` is in standard deviations above the SFT model's mean: each reward model has its own
    scale. Answers were kept as texts, and most, not all, are tokenized again as they were written.
    """
    end = tokenizer.eos_token_id
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in table.answer]
    table = table.assign(
        tokens=[ids + [end] * bool(ended) for ids, ended in zip(texts, table.ended, strict=True)],
        kl=table.kl.where(table.decoding == "sampled"),  # of greedy answers it is no KL
    )
    untrained = table[table.arm == "sft"].groupby(["seed", "decoding"]).proxy
    scale = table[["seed", "decoding"]].join(untrained.agg(["mean", "std"]), on=["seed", "decoding"])
    table["proxy_scaled"] = (table.proxy - scale["mean"]) / scale["std"]
    stopped = table[table.arm == "sft"].assign(arm="sft, stopped", ended=1.0, kl=np.nan, proxy=np.nan)
    stopped["tokens"] = [stop(ids, tokenizer) for ids in stopped.tokens]
    stopped["gold"] = [test[row.question].gold(row.tokens) for row in stopped.itertuples()]
    table = pd.concat([table, stopped.assign(length=stopped.tokens.map(len), proxy_scaled=np.nan)], ignore_index=True)
    table["words"] = [begun(test[row.question].answer[:-1], row.tokens) for row in table.itertuples()]
    return table.assign(words_right=(table.words == 1).astype(float), exact=(table.gold == 1).astype(float))


def begun(right: list[int], written: list[int]) -> float:
    """The share of the right tokens that were written before the first wrong one."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(right, written, strict=False))
    return len(list(same)) / len(right)


def stop(written: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """An answer up to its first punctuation mark, and EOS."""
    end = tokenizer.eos_token_id
    words = [token for token in written if token != end]
    marks = (n for n in range(2, len(words)) if tokenizer.decode(words[:n]).rstrip().endswith(STOPS))
    return [*words[: next(marks, len(words))], end]


def shortened(written: list[int], like: list[int], end: int) -> list[int]:
    """An answer cut, and ended, where another one is; as it was if it is shorter than that."""
    words, length = [token for token in written if token != end], len(like) - (like[-1] == end)
    return written if len(words) < length else [*words[:length], *like[length:]]
