"""What a model writes after a prompt, and what a continuation costs it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from llama_long_utils.evaluation.tasks import Item, token_ids
from llama_long_utils.model.loss import causal_lm, hidden_states, in_compute_dtype, next_token_nll

Model = PreTrainedModel | PeftModel
READ_AT_ONCE = 1024  # tokens of padded texts in one forward pass: fewer pad less and stay in a CPU's caches
WRITE_AFTER = 4096  # tokens of padded prompts that are continued together


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> tuple[np.ndarray, int]:
    """Token ids of BOS, prompt and continuation, and where the continuation starts: (int64 of shape (tokens,), start).

    They are tokenized together, because a continuation alone may start with other tokens than after its prompt.
    """
    whole, alone = ([tokenizer.bos_token_id, *token_ids(tokenizer, text)] for text in (prompt + continuation, prompt))
    pairs = enumerate(zip(whole, alone, strict=False))
    start = next((place for place, (one, other) in pairs if one != other), min(len(whole), len(alone)))
    if start == len(whole):
        raise ValueError(f"continuation {continuation!r} adds no token to its prompt: leave it out")
    return np.array(whole, dtype=np.int64), start


@torch.no_grad()
def continuation_nll(
    model: Model, texts: Sequence[tuple[np.ndarray, int]], *, tokens_at_once: int = READ_AT_ONCE
) -> list[np.ndarray]:
    """NLL of every token of each continuation, in nats: float32 arrays of shape (tokens of the continuation,).

    One uncached pass per text; logits exist at the continuation's positions only. Continuations of one token after the
    same prompt (letters) share a pass. Texts of about the same length run together, padded on the right, which causal
    attention never sees (dynamic NTK alone would: it looks at the length).

    Args:
        texts: from `encode`.
        tokens_at_once: of padded texts in one pass; a longer text runs alone.
    """
    readings: dict[bytes, list[int]] = {}
    for number, (ids, _) in enumerate(texts):
        readings.setdefault(ids[:-1].tobytes(), []).append(number)
    groups = sorted(readings.values(), key=lambda group: len(texts[group[0]][0]))
    head = causal_lm(model).get_output_embeddings()
    found: dict[int, np.ndarray] = {}
    for batch in _batches(groups, [len(texts[group[0]][0]) - 1 for group in groups], tokens_at_once):
        rows = [torch.from_numpy(texts[group[0]][0][:-1]) for group in batch]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        hidden = hidden_states(model, padded)
        numbers = [number for group in batch for number in group]
        spans = [(row, *texts[number]) for row, group in enumerate(batch) for number in group]
        # The state at position i predicts the token at i + 1.
        states = torch.cat([hidden[row, start - 1 : len(ids) - 1] for row, ids, start in spans])
        labels = torch.cat([torch.from_numpy(ids[start:]) for _, ids, start in spans]).to(model.device)
        # next_token_nll shifts by one itself: a last state and a first label that do not count.
        states, labels = torch.cat([states, states[-1:]])[None], torch.cat([labels[:1], labels])[None]
        nll = next_token_nll(states, head, labels, reduction="none")[0].float().cpu().numpy()
        ends = np.cumsum([len(ids) - start for _, ids, start in spans])
        found |= dict(zip(numbers, np.split(nll, ends[:-1]), strict=True))
    return [found[number] for number in range(len(texts))]


def _batches(entries: Sequence[Any], lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[Any]]:
    """Neighbours in a list sorted by length, as many as fit when padded to the longest."""
    batch: list[Any] = []
    for entry, length in zip(entries, lengths, strict=True):
        if batch and (len(batch) + 1) * length > tokens_at_once:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


@torch.no_grad()
def write(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int,
    stops: Sequence[str] = (),
    tokens_at_once: int = WRITE_AFTER,
) -> list[str]:
    """What the model writes after each prompt, by greedy decoding with a cache, up to EOS or the first stop text.

    Prompts of about the same length run together, padded on the left, so that a 4-bit weight is unpacked once for all.

    Args:
        tokens: at most, of each answer.
        tokens_at_once: of padded prompts in one batch; a longer prompt runs alone.
    """
    encoded = [[tokenizer.bos_token_id, *token_ids(tokenizer, prompt)] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    written: dict[int, str] = {}
    for numbers in _batches(order, [len(encoded[number]) for number in order], tokens_at_once):
        rows = [torch.tensor(encoded[number]) for number in numbers]
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        ids, mask = padded(rows, padding_value=tokenizer.eos_token_id), padded([torch.ones_like(row) for row in rows])
        written |= dict(zip(numbers, _go_on(model, tokenizer, ids, mask, tokens, stops), strict=True))
    return [written[number] for number in range(len(prompts))]


@torch.no_grad()
def read_and_write(
    model: Model, tokenizer: PreTrainedTokenizerBase, item: Item, *, tokens: int, stops: Sequence[str] = ()
) -> tuple[np.ndarray, str]:
    """`continuation_nll` of the item's one continuation and what `write` gives, but the prompt is read only once.

    Both go on from the same keys and values: half the time for a long prompt and a short answer.
    """
    (continuation,), inner = item.choices, causal_lm(model)
    whole, start = encode(tokenizer, item.prompt, continuation)
    ids = torch.from_numpy(whole)[None].to(model.device)
    cache, shared = DynamicCache(config=inner.config), start - 1
    with in_compute_dtype(model):
        inner.model(input_ids=ids[:, :shared], past_key_values=cache, use_cache=True)
        hidden = inner.model(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
    head = inner.get_output_embeddings()
    nll = next_token_nll(hidden, head, ids[:, shared:], reduction="none")[0]
    cache.crop(shared - len(whole))
    prompt = torch.tensor([[tokenizer.bos_token_id, *token_ids(tokenizer, item.prompt)]])
    (written,) = _go_on(model, tokenizer, prompt, torch.ones_like(prompt), tokens, stops, past_key_values=cache)
    return nll.float().cpu().numpy(), written


def _go_on(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    tokens: int,
    stops: Sequence[str],
    **cached: DynamicCache,
) -> list[str]:
    """Greedy decoding, at most `tokens` after each row of `ids`, cut at the first stop text."""
    if stops:
        cached |= {"stop_strings": list(stops), "tokenizer": tokenizer}
    with in_compute_dtype(model):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            **cached,
        )
    texts = []
    for row in output[:, ids.shape[1] :]:
        text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for stop in stops:
            text = text.partition(stop)[0]
        texts.append(text)
    return texts
