"""What a model writes after a prompt, by greedy decoding, and how likely it finds a given continuation."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from llama_long_utils.model.loss import Model, causal_lm, hidden_states, in_compute_dtype

TOKENS_AT_ONCE = 4096  # of padded prompts that are continued together
READ_AT_ONCE = 1024  # of padded texts that are read together: fewer pad less and stay in a CPU's caches
Continuation = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of what follows


@torch.no_grad()
def write(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | np.ndarray],
    *,
    tokens: int,
    stops: Sequence[str] = (),
    tokens_at_once: int = TOKENS_AT_ONCE,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt, up to EOS or the first stop text.

    Prompts are texts, which BOS is put before, or token ids with it: int64 of shape (tokens,). Those of about the same
    length run together, padded on the left, so that a 4-bit weight is unpacked once for all: `tokens_at_once` in a
    batch, or one longer prompt. An answer has `tokens` at most.
    """
    bos = [tokenizer.bos_token_id]
    rows = [
        torch.tensor(bos + tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if isinstance(prompt, str)
        else torch.from_numpy(prompt)
        for prompt in prompts
    ]
    stopped, written = StopStringCriteria(tokenizer, list(stops)) if stops else None, {}
    for numbers in batches(rows, tokens_at_once):
        batch = [rows[number] for number in numbers]
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        ids, mask = padded(batch, padding_value=tokenizer.eos_token_id), padded([torch.ones_like(row) for row in batch])
        if stopped:  # transformers would let a stop text begin in the prompt
            options["stopping_criteria"] = [lambda seen, scores, n=ids.shape[1], **_: stopped(seen[:, n:], scores)]
        found = greedy(model, ids, tokens, mask=mask, pad_token_id=tokenizer.eos_token_id, **options)
        for number, row in zip(numbers, found, strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for stop in stops:
                text = text.partition(stop)[0]
            written[number] = text
    return [written[number] for number in range(len(prompts))]


@torch.no_grad()
def greedy(
    model: Model, ids: torch.Tensor, tokens: int, *, mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The likeliest tokens after each row of `ids`, one after the other: int64 of shape (rows, `tokens` at most).

    `mask` is 0 where a token of `ids` must not be seen. With `past_key_values`, only what these do not hold is read.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    options |= {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with in_compute_dtype(model):
        output = model.generate(max_new_tokens=tokens, do_sample=False, **options)
    return output[:, ids.shape[1] :]


@torch.no_grad()
def likelihoods(
    model: Model, asked: Sequence[Continuation], *, tokens_at_once: int = READ_AT_ONCE
) -> list[tuple[float, bool, int]]:
    """For each (context, continuation): its log-probability in nats, whether it is the likeliest, and its tokens.

    Continuations of one token after the same context (letters) share a pass. Padding is on the right, where causal
    attention never sees it. Logits exist where a continuation is predicted, in fp32: in bf16, letters' are often equal.
    """
    readings: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(asked):
        readings.setdefault((*context, *continuation[:-1]), []).append(number)
    texts, groups = [torch.tensor(text) for text in readings], list(readings.values())
    head = causal_lm(model).get_output_embeddings().weight.float()
    answers: dict[int, tuple[float, bool, int]] = {}
    for batch in batches(texts, tokens_at_once):
        ids = torch.nn.utils.rnn.pad_sequence([texts[text] for text in batch], batch_first=True).to(model.device)
        firsts = [min(len(asked[number][0]) for number in groups[text]) - 1 for text in batch]  # that predict
        hidden = hidden_states(model, ids)
        needed = [row[first : len(texts[text])] for row, first, text in zip(hidden, firsts, batch, strict=True)]
        scores = (torch.cat(needed).float() @ head.T).log_softmax(-1)
        lengths = [len(rows) for rows in needed]
        parts = zip(scores.split(lengths), scores.argmax(-1).cpu().split(lengths), strict=True)
        for text, first, (part, likeliest) in zip(batch, firsts, parts, strict=True):
            for number in groups[text]:
                context, continuation = asked[number]
                start, right = len(context) - 1 - first, torch.tensor(continuation)
                total = part[start:].gather(-1, right[:, None].to(part.device)).sum()
                answers[number] = (float(total), bool((likeliest[start:] == right).all()), len(right))
    return [answers[number] for number in range(len(asked))]


def batches(rows: Sequence[torch.Tensor], tokens_at_once: int) -> Iterator[list[int]]:
    """Numbers of rows of about the same length, as many as fit when padded to the longest."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
        if batch and (len(batch) + 1) * len(rows[number]) > tokens_at_once:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
