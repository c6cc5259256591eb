"""Answers to questions about a document, right or wrong to the letter: one reading serves all of its questions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.instructions import Dialogue, quotations
from llama_long_utils.evaluation.generation import greedy
from llama_long_utils.model.loss import Model, causal_lm, in_compute_dtype, next_token_nll
from llama_long_utils.stages import Instruction

ROOM = 64  # tokens for a question and its answer


def held_out_dialogues(
    stretches: Sequence[Sequence[TokenizedDocument]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Instruction,
    lengths: Sequence[int],
    *,
    questions: int,
    seed: int,
) -> list[Dialogue]:
    """Dialogues about the beginnings of each document's first stretch, which with one question fill these lengths.

    Those of one document follow each other, the longest first, as `answers` reads them fastest.
    """
    return [
        quotations(cut.part(0, length - ROOM), tokenizer, questions, settings, np.random.default_rng([seed, number]))
        for number, (cut, *_) in enumerate(stretches)
        for length in sorted(lengths, reverse=True)
    ]


@torch.no_grad()
def answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Dialogue],
    *,
    window: int = 0,
    nll: dict[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """A row for each question: document, length, place, exact, words, log_probability.

    length: tokens of the document, question and answer, at most; exact: greedy decoding writes the answer and stops;
    words: it writes the answer, whatever follows; log_probability: of the answer's tokens and EOS, in nats, their mean.

    Args:
        window: of a model that has no longer one, which reads the last tokens of a document.
        nll: takes the NLL of what was read, by document, as `token_nll` has it.
    """
    rows, inner = [], causal_lm(model.eval())
    head, read, seen = inner.get_output_embeddings(), DynamicCache(config=inner.config), torch.empty(0)

    def last_hidden_states(ids: torch.Tensor) -> torch.Tensor:
        with in_compute_dtype(model):
            return inner.model(input_ids=ids[None].to(model.device), past_key_values=read, use_cache=True)[0]

    for dialogue in dialogues:
        ids, length = torch.from_numpy(dialogue.token_ids), len(dialogue.token_ids) + ROOM
        if window and length > window:
            ids = torch.cat([ids[:1], ids[1 - window + ROOM :]])
        if not torch.equal(seen[: len(ids)], ids):  # else it is the beginning of what was read last
            read, seen = DynamicCache(config=inner.config), ids
            hidden = last_hidden_states(ids)
            if nll is not None:
                found = next_token_nll(hidden, head, ids[None].to(model.device), reduction="none")
                nll[dialogue.document] = found[0].cpu().numpy()
        for (question, answer), asked in zip(dialogue.turns(tokenizer), dialogue.questions, strict=True):
            if read.get_seq_length() > len(ids):
                read.crop(len(ids) - read.get_seq_length())
            states = last_hidden_states(torch.from_numpy(np.concatenate([question, answer])))[0, len(question) - 1 : -1]
            scores = head(states.to(head.weight.dtype)).float().log_softmax(-1).cpu()
            target = torch.from_numpy(answer)
            right = scores.argmax(-1) == target
            own = scores.gather(-1, target[:, None]).mean()
            found = (dialogue.document, length, asked.place, bool(right.all()), bool(right[:-1].all()), float(own))
            rows.append(found)
    return pd.DataFrame(rows, columns=["document", "length", "place", "exact", "words", "log_probability"])


@torch.no_grad()
def written(
    model: Model, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, *, questions: int, tokens: int
) -> list[str]:
    """A line of so many tokens, at most, that a model writes after each of the first questions, as `write` would."""
    read, lines = DynamicCache(config=causal_lm(model.eval()).config), []
    for question, _ in dialogue.turns(tokenizer)[:questions]:
        ids = torch.from_numpy(np.concatenate([dialogue.token_ids, question]))[None]
        (line,) = greedy(model, ids, tokens, past_key_values=read, pad_token_id=tokenizer.eos_token_id)
        read.crop(len(dialogue.token_ids) - read.get_seq_length())
        text = tokenizer.decode(line, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        lines.append(text.partition("\n")[0])
    return lines
