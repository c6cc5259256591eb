"""Instructions: documents with questions about them, as sequences to train on.

Questions that need no model are quotations: some words of the document, after which the words that follow there are the
answer, up to the next punctuation mark: right or wrong to the letter, at any depth. A chat model's are in a record.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase as Tokenizer

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.records import Record
from llama_long_utils.settings import IGNORED_LABEL
from llama_long_utils.stages import Instruction

MARK = re.compile(r"[.,;:!?]")
TOKENS = 2.7  # of a word and the marks around it, more than most have


@dataclass(frozen=True)
class Question:
    """`text` stands behind a document and `answer` behind it, then EOS; `place`: share of the document before both."""

    text: str
    answer: str
    place: float
    kind: str = "quotation"


@dataclass(frozen=True)
class Dialogue:
    """A document's tokens, BOS first (int64), and questions about it."""

    document: str
    token_ids: np.ndarray
    questions: Sequence[Question]

    def turns(self, tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids of each question, and of its answer with EOS."""

        def ids(text: str, *behind: int) -> np.ndarray:
            return np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], *behind], np.int64)

        return [(ids(one.text), ids(one.answer, tokenizer.eos_token_id)) for one in self.questions]


@dataclass(frozen=True)
class InstructionSequence:
    """Token ids, at most a window of them, and which are trained on: 0 or 1 (TRL's `completion_mask`). Both int64."""

    input_ids: np.ndarray
    completion_mask: np.ndarray

    @property
    def label_tokens(self) -> int:
        """Tokens that are predicted and trained on."""
        return int(self.completion_mask[1:].sum())


Documents = Sequence[TokenizedDocument]
Maker = Callable[[Documents, Tokenizer, int, Instruction, Generator], Dialogue]


def quotations(
    document: TokenizedDocument, tokenizer: Tokenizer, count: int, settings: Instruction, generator: Generator
) -> Dialogue:
    """A document with up to `count` quotations, from random places; what is quoted stands there once."""
    text = tokenizer.decode(document.token_ids[1:], clean_up_tokenization_spaces=False)
    words, quoted, (fewest, most) = list(re.finditer(r"\S+", text)), settings.quoted_words, settings.answer_words
    found: list[Question] = []
    for first in generator.permutation(max(len(words) - quoted - most - 1, 0)) + 1:
        if len(found) == count:
            break
        start, end = words[first].start(), words[first + quoted - 1].end()
        cue, rest = text[start:end], text[end : words[first + quoted + most].end()]
        mark = MARK.search(rest)
        answer = rest[: mark.end()] if mark else ""
        fits = fewest <= len(answer.split()) <= most and "\n" not in cue + answer and not MARK.match(cue[-1])
        if fits and text.count(cue) == 1:
            found.append(Question(f"\n\nQ: {cue}", answer, start / len(text)))
    return Dialogue(f"{document.source}/{document.name}", document.token_ids.astype(np.int64), found)


def quotation_dialogue(
    documents: Documents, tokenizer: Tokenizer, tokens: int, settings: Instruction, generator: Generator
) -> Dialogue:
    """A stretch of a random document with quotations, `tokens` together at most; ValueError if there is none."""
    count = max(tokens // settings.tokens_per_question, 1)
    room = tokens - int(count * (2 + TOKENS * (settings.quoted_words + settings.answer_words[1])))
    long = [document for document in documents if document.tokens > room]
    if room < 1 or not long:
        longest = max((document.tokens for document in documents), default=0)
        raise ValueError(
            f"no document has {max(room, 1):,} tokens for {count} questions in a window of {tokens:,}: the longest of "
            f"{len(documents)} has {longest:,}; add longer documents, or raise instruction.tokens_per_question"
        )
    for _ in range(20):  # a table or a list may hold nothing to ask for
        document = long[generator.integers(len(long))]
        start = int(generator.integers(0, document.tokens - room))
        dialogue = quotations(document.part(start, start + room), tokenizer, count, settings, generator)
        while sum(map(len, [dialogue.token_ids, *chain(*dialogue.turns(tokenizer))])) > tokens:
            dialogue = replace(dialogue, questions=dialogue.questions[:-1])
        if dialogue.questions:
            return dialogue
    raise ValueError(f"20 stretches of {room:,} tokens have no words to quote: texts need sentences with punctuation")


def generated_dialogues(questions: str) -> Maker:
    """Makes dialogues of the pairs that a record keeps; its path may be relative to the repository.

    A document is cut at `tokens`, with all of its pairs that lie before, up to one for `tokens_per_question`. If a pair
    lies behind, as it may in a short window, the cut is a stretch around its chunk. ValueError if there is no record.
    """
    path = REPOSITORY / questions
    if not path.is_file():
        fix = 'write one with `python -m experiments self-instruct`, or use "quotations"'
        raise ValueError(f"instruction.questions: there is no record {questions}; {fix}")
    table = Record(path).table("pairs")
    kept = [row._asdict() for row in table[table.dropped == ""].itertuples(index=False)]
    places: dict[tuple[str, str], range] = {}

    def tokens_of(pair: dict[str, Any], document: TokenizedDocument, tokenizer: Tokenizer) -> range:
        """Where a pair's chunk lies among the document's tokens."""
        key = pair["document"], pair["chunk"]
        if key not in places:
            text = tokenizer.decode(document.token_ids[1:], clean_up_tokenization_spaces=False)
            before = text[: text.index(pair["chunk"])]
            first, many = (len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, key[1]))
            places[key] = range(1 + first, 2 + first + many)
        return places[key]

    def make(
        documents: Documents, tokenizer: Tokenizer, tokens: int, settings: Instruction, generator: Generator
    ) -> Dialogue:
        named = {f"{document.source}/{document.name}": document for document in documents}
        pairs = [pair for pair in kept if pair["document"] in named]
        if not pairs:
            raise ValueError(f"{questions}: none of its {len(kept)} pairs is about a document of this preset")
        order = [pairs[number] for number in generator.permutation(len(pairs))]
        document = named[order[0]["document"]]
        own = [pair for pair in order if named[pair["document"]] is document]
        asked = [Question(f" Q: {one['question']}, A:", f" {one['answer']}", one["place"], one["kind"]) for one in own]
        turns = [sum(map(len, turn)) for turn in Dialogue("", document.token_ids, asked).turns(tokenizer)]
        chunks = [tokens_of(pair, document, tokenizer) for pair in own]
        count = min(max(tokens // settings.tokens_per_question, 1), len(own))
        room = tokens - count * max(turns)
        if len(chunks[0]) >= room:
            raise ValueError(f"a chunk of {len(chunks[0])} tokens and its question are more than {tokens:,} tokens")
        low, high = chunks[0].stop - room, min(chunks[0].start, document.tokens - room + 1)
        start = int(generator.integers(low, max(high, low + 1))) if low > 0 else 0
        inside = [number for number, one in enumerate(chunks) if start < one.start and one.stop <= start + room][:count]
        room = tokens - sum(turns[number] for number in inside)
        ids = document.part(start, start + room).token_ids.astype(np.int64)
        return Dialogue(own[0]["document"], ids, [asked[number] for number in inside])

    return make


def dialogue_maker(settings: Instruction) -> Maker:
    """What makes dialogues with the kind of questions that the settings name; ValueError if there are none."""
    return quotation_dialogue if settings.questions == "quotations" else generated_dialogues(settings.questions)


def join_dialogues(dialogues: Sequence[Dialogue], tokenizer: Tokenizer, *, loss_on_prompt: bool) -> InstructionSequence:
    """Dialogues side by side. Answers are trained on; with `loss_on_prompt` all but the first token of each."""
    ids, mask = [], []
    for dialogue in dialogues:
        parts = [(dialogue.token_ids, loss_on_prompt)]
        for question, answer in dialogue.turns(tokenizer):
            parts += [(question, loss_on_prompt), (answer, True)]
        ids += [part for part, _ in parts]
        own = np.concatenate([np.full(len(part), trained) for part, trained in parts])
        own[0] = False
        mask.append(own)
    return InstructionSequence(np.concatenate(ids), np.concatenate(mask).astype(np.int64))


def instruction_sequences(
    documents: Documents,
    tokenizer: Tokenizer,
    settings: Instruction,
    window: int,
    *,
    texts: Sequence[TrainingSequence] = (),
    long_dialogue: Maker | None = None,
) -> list[InstructionSequence]:
    """The sequences of a run in order, long, short and plain ones shuffled, each `window` tokens at most.

    `long_dialogue` makes a dialogue that fills the window, in place of what the settings name. ValueError if no
    document is long enough for one, or nothing in it can be asked for.
    """
    short_dialogue = dialogue_maker(settings)
    count = settings.steps * settings.sequences_per_step
    long = round(count * settings.long_share)
    plain = round(count * (settings.long_share + settings.text_share)) - long
    kinds = ["long"] * long + ["text"] * plain + ["short"] * (count - long - plain)
    generator, texts = np.random.default_rng(settings.seed), iter(texts)
    short, sequences = min(settings.short_window, window), []
    for kind in generator.permutation(kinds):
        if kind == "text":
            text = next(texts)
            sequences.append(InstructionSequence(text.input_ids, (text.labels != IGNORED_LABEL).astype(np.int64)))
            continue
        given = documents, tokenizer, window if kind == "long" else short, settings, generator
        maker, many = (long_dialogue or short_dialogue, 1) if kind == "long" else (short_dialogue, window // short)
        loss_on_prompt = settings.loss_on_prompt and kind == "long"
        dialogues = [maker(*given) for _ in range(many)]
        sequences.append(join_dialogues(dialogues, tokenizer, loss_on_prompt=loss_on_prompt))
        if len(sequences[-1].input_ids) > window:
            raise ValueError(f"a {kind} dialogue has {len(sequences[-1].input_ids):,} tokens, more than {window:,}")
    return sequences
