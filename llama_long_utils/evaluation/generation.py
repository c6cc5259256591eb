"""What a model writes after a prompt, by greedy decoding."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_long_utils.model.loss import in_compute_dtype

Model = PreTrainedModel | PeftModel
TOKENS_AT_ONCE = 4096  # of padded prompts that are continued together


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

    Prompts of about the same length run together, padded on the left, so that a 4-bit weight is unpacked once for all.

    Args:
        prompts: texts, which BOS is put before, or token ids with it: int64 of shape (tokens,).
        tokens: at most, of each answer.
        tokens_at_once: of padded prompts in one batch; a longer prompt runs alone.
        options: as in `greedy`.
    """
    rows = [_with_bos(tokenizer, prompt) for prompt in prompts]
    options |= {"stop_strings": list(stops), "tokenizer": tokenizer} if stops else {}
    written = {}
    for numbers in batches(rows, tokens_at_once):
        batch = [rows[number] for number in numbers]
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        ids, mask = padded(batch, padding_value=tokenizer.eos_token_id), padded([torch.ones_like(row) for row in batch])
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

    Args:
        mask: 0 where a token of `ids` must not be seen, else 1, of the same shape.
        options: of transformers' `generate`; with `past_key_values`, only what these do not hold is read.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    options |= {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with in_compute_dtype(model):
        output = model.generate(max_new_tokens=tokens, do_sample=False, **options)
    return output[:, ids.shape[1] :]


def _with_bos(tokenizer: PreTrainedTokenizerBase, prompt: str | np.ndarray) -> torch.Tensor:
    if isinstance(prompt, str):
        return torch.tensor([tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    return torch.from_numpy(prompt)


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
