"""The questions of short and long tasks, as prompts and what may follow them.

The questions lie inside packages on PyPI and are read from the archive, like the corpora of `documents`. Long prompts
are made here: paragraphs around those that hold the answer, to any length.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.retrieval_items import SENTENCE

# Prompts are part of a result: another wording moves a score by more than most extensions do.
MMLU_PROMPT = "The following are multiple choice questions (with answers) about {topic}.\n\n"
MMLU_QUESTION = "{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
HELLASWAG_PROMPT = "{activity}: {context}"
TRUTHFULQA_PROMPT = "Q: {question}\nA:"
GSM8K_PROMPT = "Question: {question}\nAnswer:"
LONG_PROMPT = "{context} Q: {question}, A:"  # arXiv:2309.16039, section 3.1


@dataclass(frozen=True)
class Item:
    """A question.

    `choices` are continuations of the prompt, the right one at `answer`; where the model writes, `choices` holds the
    one text whose likelihood is read, and `accepted` what counts as right (of HumanEval: the tests to run).
    """

    name: str
    prompt: str
    choices: tuple[str, ...]
    answer: int = 0
    accepted: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A hash of everything asked: results are kept under it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Without BOS."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def read_mmlu(content: bytes, shots: int = 0) -> list[Item]:
    """MMLU's test questions. The package has no development questions: shots are the next ones of the same topic."""
    rows = [row for row in _json_lines(content) if row["correct_answer"] != "answer"]  # two header rows
    _check_count("mmlu", len(rows), 14_042)
    by_topic: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_topic.setdefault(row["topic"], []).append(row)

    def question(row: dict[str, str]) -> str:
        return MMLU_QUESTION.format(question=row["question"], **{letter: row[f"answer_{letter}"] for letter in "abcd"})

    items = []
    for topic, questions in by_topic.items():
        for number, row in enumerate(questions):
            others = [questions[(number + step) % len(questions)] for step in range(1, shots + 1)]
            solved = [f"{question(other)} {other['correct_answer']}\n\n" for other in others]
            prompt = MMLU_PROMPT.format(topic=topic) + "".join(solved) + question(row)
            choices = tuple(f" {letter}" for letter in "ABCD")
            items.append(Item(f"{topic}/{number}", prompt, choices, "ABCD".index(row["correct_answer"])))
    return items


def read_hellaswag(content: bytes) -> list[Item]:
    """100 HellaSwag questions; the tags of its wikiHow texts are taken out, as is customary."""

    def clean(text: str) -> str:
        text = re.sub(r"\[[^\]]*\]", "", text.replace(" [title]", ". "))
        return re.sub(r" +", " ", text).strip()

    rows = _json_lines(content)
    _check_count("hellaswag", len(rows), 100)
    return [
        Item(
            row["id"],
            HELLASWAG_PROMPT.format(activity=row["activity_label"], context=clean(row["ctx"])),
            tuple(f" {clean(ending)}" for ending in row["endings"]),
            row["expected_index"],
        )
        for row in rows
    ]


def read_truthfulqa(content: bytes) -> list[Item]:
    """100 questions of TruthfulQA with one right choice (MC1). It always stands first, so a tie counts as wrong."""
    rows = _json_lines(content)
    _check_count("truthfulqa_mc1", len(rows), 100)
    return [
        Item(
            row["id"],
            TRUTHFULQA_PROMPT.format(question=row["question"]),
            tuple(f" {choice}" for choice in row["choices"]),
            row["expected_index"],
        )
        for row in rows
    ]


def read_gsm8k(content: bytes, shots: int = 4) -> list[Item]:
    """100 GSM8K questions, each after the next four of them, solved; the calculator's marks are taken out."""
    rows = _json_lines(content)
    _check_count("gsm8k", len(rows), 100)
    asked = [GSM8K_PROMPT.format(question=row["prompt"]) for row in rows]
    solutions = [" " + re.sub(r"<<[^>]*>>", "", row["upstream_answer"]) for row in rows]
    items = []
    for number, row in enumerate(rows):
        others = [(number + step) % len(rows) for step in range(1, shots + 1)]
        solved = "".join(f"{asked[other]}{solutions[other]}\n\n" for other in others)
        items.append(Item(row["id"], solved + asked[number], (solutions[number],), accepted=(row["expected"],)))
    return items


def read_humaneval(content: bytes) -> list[Item]:
    """HumanEval's 164 functions to complete, with the tests that a completion must pass."""
    rows = _json_lines(gzip.decompress(content))
    _check_count("humaneval", len(rows), 164)
    return [
        Item(
            row["task_id"],
            row["prompt"],
            (row["canonical_solution"],),
            accepted=(f"{row['test']}\ncheck({row['entry_point']})\n",),
        )
        for row in rows
    ]


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


def read_squad(content: bytes) -> Haystack:
    """SQuAD 2.0's development set: 35 articles in order, and the 5,928 of its 11,873 questions that have an answer."""
    articles = json.loads(content)["data"]
    _check_count("squad, articles", len(articles), 35)
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
    """HotpotQA's development set: 7,405 questions that each need two paragraphs, among all that it has."""
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


def _json_lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]


def _check_count(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{what} should hold {wanted:,} items, found {found:,}: delete its package from data/cache")


def long_items(
    haystack: Haystack, tokenizer: PreTrainedTokenizerBase, length: int, *, count: int, writes: int, seed: int
) -> list[Item]:
    """Questions after so many paragraphs that prompt and answer have `length` tokens, or a paragraph fewer.

    The same questions are asked at every length. The needed paragraphs stand at a random depth.

    Args:
        count: questions, drawn at random.
        writes: tokens kept free for the answer.

    Raises:
        ValueError: a question's own paragraphs do not fit.
    """
    chosen = np.random.default_rng(seed).permutation(len(haystack.questions))[:count]
    items = []
    for number in chosen:
        question = haystack.questions[number]
        generator = np.random.default_rng([seed, int(number)])
        bare = LONG_PROMPT.format(context="", question=question.text)
        room = length - writes - len(token_ids(tokenizer, bare)) - 1
        room -= sum(_cost(tokenizer, haystack.paragraphs[place]) for place in question.needed)
        if room < 0:
            raise ValueError(f"length {length:,} has no room for question {question.name!r}: ask at longer lengths")
        places = _surroundings(haystack, question, tokenizer, room, generator)
        context = "\n\n".join(haystack.paragraphs[place] for place in places)
        prompt = LONG_PROMPT.format(context=context, question=question.text)
        items.append(Item(f"{question.name}/{length}", prompt, (f" {question.accepted[0]}",), 0, question.accepted))
    return items


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
    return len(token_ids(tokenizer, "\n\n" + paragraph))  # behind it, line breaks would make other tokens


def next_sentence_items(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    count: int,
    seed: int,
) -> dict[int, list[Item]]:
    """A task from any documents: which of four sentences comes next? The wrong ones are from the same document.

    They lie outside of what is shown and not right behind it. At every length the same sentence is asked for.

    Args:
        lengths: tokens of the prompt and the longest choice, about.
        count: questions, from the documents in turn; fewer come back where a document has no fitting sentences.

    Raises:
        ValueError: no document is long enough.
    """
    sentences = re.compile(SENTENCE.pattern)
    words = range(8, 21)
    asked: dict[int, list[Item]] = {length: [] for length in lengths}
    fitting = [document for document in documents if document.tokens > 2 * max(lengths)]
    if not fitting:
        longest = max((document.tokens for document in documents), default=0)
        raise ValueError(
            f"no document has more than {2 * max(lengths):,} tokens (the longest of {len(documents)} has {longest:,}): "
            "ask at shorter lengths or hold out longer documents"
        )
    for number in range(count):
        document = fitting[number % len(fitting)]
        generator = np.random.default_rng([seed, number])
        text = tokenizer.decode(document.token_ids[1:-1], clean_up_tokenization_spaces=False)
        shown = int(len(text) * max(lengths) / document.tokens * 1.5)  # characters: denser text has fewer to a token
        found = [match for match in sentences.finditer(text) if len(match[0].split()) in words]
        late = [match for match in found if match.start() > shown]
        if len(late) < 2:
            continue
        right = late[int(generator.integers(len(late)))]
        outside = [m for m in found if not right.start() - shown <= m.start() <= right.end() + shown // 4]
        if len(outside) < 3:
            continue
        wrong = [outside[int(place)] for place in generator.choice(len(outside), 3, replace=False)]
        answer = int(generator.integers(4))
        ordered = [*wrong[:answer], right, *wrong[answer:]]
        choices = tuple(" " + " ".join(match[0].split()) for match in ordered)
        before = text[right.start() - shown : right.start()].rstrip()
        spans = tokenizer(before, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        room = max(len(token_ids(tokenizer, choice)) for choice in choices) + 1
        if len(spans["offset_mapping"]) < max(lengths):
            continue
        for length in lengths:
            first = spans["offset_mapping"][-(length - room)][0]
            name = f"{document.source}/{document.name}/{right.start()}"
            asked[length].append(Item(name, before[first:], choices, answer))
    return asked
