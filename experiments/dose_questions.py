"""Many questions behind one reading of a text: its keys and values are computed once, all questions see them.

Each question is a row of its own in a mask: it sees the text and itself. So 20 planted statements and 20 copies of the
text's own words cost one reading and a forward pass of 1,600 tokens, where 40 prompts would cost 40 readings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation import retrieval_items as items
from llama_long_utils.model.loss import causal_lm, hidden_states, in_compute_dtype

ROOM = 40  # tokens of question and answer
COLUMNS = ["length", "text", "kind", "number", "depth", "exact", "log_probability", "exact_alone", "alone"]


@dataclass(frozen=True)
class Question:
    """`kind` is "key" (a planted statement) or "copy" (words of the text); `depth` its place, 0 to 1."""

    kind: str
    number: int
    depth: float
    cue: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Haystack:
    """A text with statements planted evenly over it, and questions: `length` tokens with room for one question."""

    length: int
    text: int
    prefix: np.ndarray
    questions: list[Question]


def haystacks(
    documents: Sequence[TokenizedDocument], tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], *, keys: int
) -> list[Haystack]:
    """Every document at every length, with the same `keys` statements, each at the same depth."""
    made = []
    ends = {number for number in range(len(tokenizer)) if "\n" in tokenizer.decode([number])}
    for number, document in enumerate(documents):
        generator = np.random.default_rng([23, number])
        text, names, values = tokenizer.decode(document.token_ids), [], []
        while len(names) < keys:
            name, value = items._name(generator), items._number(generator)
            if name not in text and value not in text and name not in names and value not in values:
                names.append(name)
                values.append(value)
        cues = [f"\n\nThe key to the gate of {name} is" for name in names]
        planted = [items._ids(tokenizer, f"{cue} {value}.\n\n") for cue, value in zip(cues, values, strict=True)]
        pairs = zip(cues, values, strict=True)
        asked = [items._question_and_answer(tokenizer, cue, f" {value}") for cue, value in pairs]
        order = generator.permutation(keys)  # which statement stands at which depth
        for length in lengths:
            room = length - ROOM - 1 - sum(map(len, planted))
            body, parts, last = document.token_ids[1:][:room], [[tokenizer.bos_token_id]], 0
            for step, key in enumerate(order):
                place = max(round(step / (keys - 1) * room), last)
                while 0 < place < room and int(body[place - 1]) not in ends:
                    place += 1
                parts += [body[last:place], planted[key]]
                last = place
            prefix = np.concatenate([*parts, body[last:]]).astype(np.int64)
            questions = []
            for step, key in enumerate(order):
                cue, answer = (ids.tolist() for ids in asked[key])
                questions.append(Question("key", int(key), step / (keys - 1), cue, answer))
            for copy, place in enumerate(np.linspace(1, len(prefix) - 21, keys).astype(int)):
                cue, answer = prefix[place : place + 12].tolist(), prefix[place + 12 : place + 20].tolist()
                questions.append(Question("copy", copy, copy / (keys - 1), cue, answer))
            made.append(Haystack(length, number, prefix, questions))
    return made


@torch.no_grad()
def ask(model: PreTrainedModel | PeftModel, haystack: Haystack) -> list[list]:
    """Rows of COLUMNS: every question behind the text, and alone."""
    device, inner = model.device, causal_lm(model)
    text = torch.from_numpy(haystack.prefix)[None].to(device)
    count = len(haystack.questions)
    rows = torch.zeros(count, ROOM, dtype=torch.long, device=device)
    for row, question in zip(rows, haystack.questions, strict=True):
        ids = [*question.cue, *question.answer]
        row[: len(ids)] = torch.tensor(ids, device=device)
    own = torch.ones(ROOM, ROOM, dtype=torch.bool, device=device).tril()
    sees = torch.cat(
        [rows.new_ones(count * ROOM, text.shape[1], dtype=torch.bool), torch.block_diag(*[own] * count)], 1
    )
    places = (text.shape[1] + torch.arange(ROOM, device=device)).repeat(count)[None]
    with in_compute_dtype(model):
        cache = DynamicCache(config=inner.config)
        inner.model(input_ids=text, past_key_values=cache, use_cache=True)
        behind = inner.model(
            input_ids=rows.view(1, -1), position_ids=places, attention_mask=sees[None, None], past_key_values=cache
        ).last_hidden_state
    alone = hidden_states(model, rows)
    found = []
    for hidden in (behind.view(count, ROOM, -1), alone):
        head = inner.get_output_embeddings()
        logits = head(hidden[:, :-1].to(head.weight.dtype)).float()
        costs = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(count, -1)
        found.append((costs.cpu().numpy(), (logits.argmax(-1) == rows[:, 1:]).cpu().numpy()))
    table = []
    for row, question in enumerate(haystack.questions):
        part = slice(len(question.cue) - 1, len(question.cue) + len(question.answer) - 1)
        scores = [(int(right[row, part].all()), round(float(-costs[row, part].mean()), 4)) for costs, right in found]
        about = [haystack.length, haystack.text, question.kind, question.number, round(question.depth, 4)]
        table.append([*about, *scores[0], *scores[1]])
    return table
