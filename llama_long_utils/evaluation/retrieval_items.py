"""Retrieval from long texts: questions that a base model answers by going on, and how they are scored.

A statement stands somewhere in a long text; at its end the statement's first words stand once more, and the model
continues them. That needs no instruction tuning, only copying over a distance. Five tasks: `first_sentence`, that of
Llama 2 Long's Figure 5b (arXiv:2309.16039, section 4.1; its prompt is not printed), where the statement is how the text
began, and four whose statements are made up and planted: `passkey` (after arXiv:2305.16300), `needle` (one at each
asked depth), and `multi_key` and `variables` in the manner of RULER (arXiv:2404.06654), with wordings of our own.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.settings import Retrieval

SENTENCE = re.compile(r"(?<=[.!?]\s)[A-ZÀ-ÖØ-ÞŁŒŻΆ-ΏΑ-ΫЁЇА-Я][^.!?]*[.!?](?=\s)")  # Latin, Greek, Cyrillic
TRADES = ("ferryman", "miller", "baker", "weaver", "shepherd", "smith", "gardener", "tailor")
ADJECTIVES = ("silver", "wooden", "broken", "yellow", "heavy", "narrow", "painted", "hollow", "rusty", "little")
NOUNS = ("lantern", "drum", "ladder", "kettle", "mirror", "basket", "whistle", "saddle", "candle", "bell")
DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRIED = 8  # sentences of a document, until one has enough tokens after it: the end of a text may hold fewer than most
GOLDEN = (5**0.5 - 1) / 2
PLACES = ("stairs", "bridge", "floor", "oak", "table", "roof", "chapel", "well")


@dataclass(frozen=True)
class RetrievalItem:
    """A question: `prompt` ends in the cue; `answer`, whose tokens are `answer_ids`, should follow. Ids are int64."""

    document: str
    prompt: np.ndarray
    answer: str
    answer_ids: np.ndarray
    task: str = "first_sentence"
    number: int = 0  # within its task: the same one at every length and depth asks for the same answer
    depth: float = 0.0  # of the statement, as a share of the text before it, as asked
    place: float = 0.0  # the same, got at the end of a sentence
    others: tuple[str, ...] = ()  # answers to other keys, or the example's number and the chain's other variables

    @property
    def token_ids(self) -> np.ndarray:
        """Prompt and answer."""
        return np.concatenate([self.prompt, self.answer_ids])

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer_ids)


@dataclass(frozen=True)
class Question:
    """Statements to plant, each at a depth, and the question about the first of them.

    A worked `example` may stand before the cue. The text must not hold the words in `new`.
    """

    statements: tuple[tuple[str, float], ...]
    example: str
    cue: str
    answer: str
    new: tuple[str, ...]
    others: tuple[str, ...] = ()


def make_items(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    settings: Retrieval,
    *,
    questions: int,
    seed: int,
) -> dict[tuple[str, int], list[RetrievalItem]]:
    """Questions of every task at every length of the settings, by (task, length); of the first sentence, exact ones."""
    few = replace(settings, documents=min(questions, settings.documents))
    items = {}
    for length in settings.lengths:
        items["first_sentence", length] = first_sentence_items(documents, tokenizer, length, few, seed=seed, exact=True)
        for task in PLANTED:
            asked = {"questions": questions, "seed": seed}
            items[task, length] = planted_items(task, documents, tokenizer, length, settings, **asked)
    return items


def first_sentence_items(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    settings: Retrieval,
    *,
    seed: int,
    exact: bool = False,
) -> list[RetrievalItem]:
    """Questions about as many documents as the settings say, `length` tokens with the room for an answer.

    The passage begins at a random sentence, the same at every length, since openings may be known by heart. ValueError
    if no document has a fitting sentence with enough text after it. `exact` leaves room for exactly the answer's tokens
    and keeps the line breaks, so that they are the passage's; else `answer_tokens` have room, and spaces part words.
    """
    items = []
    fewest, most = (settings.cue_words + words for words in settings.answer_words)
    for number in np.random.default_rng(seed).permutation(len(documents)):
        if len(items) == settings.documents:
            break
        document = documents[number]
        text = tokenizer.decode(document.token_ids[1:-1], clean_up_tokenization_spaces=False)
        reach = max([length, *(other for other in settings.lengths if other < document.tokens)])
        last_start = len(text) * (1 - reach / document.tokens)
        generator = np.random.default_rng([seed, number])
        sentences = [m for m in SENTENCE.finditer(text) if fewest <= len(m[0].split()) <= most]
        sentences = [sentences[index] for index in generator.permutation(len(sentences))]
        early = [m for m in sentences if m.start() < last_start][:TRIED]
        for sentence in (m for m in early if len(_ids(tokenizer, text[m.start() :][: 12 * reach])) >= reach):
            words = sentence[0].split()
            whole = sentence[0] if exact else " ".join(words)
            cue = re.match(rf"(?:\S+\s+){{{settings.cue_words - 1}}}\S+", whole)[0]
            with suppress(ValueError):  # some tokenizers have a token of which the cue is a part
                ending, answer_ids = _question_and_answer(tokenizer, f"\n\n{cue}", whole[len(cue) :])
                break
        else:
            continue
        after = len(answer_ids) if exact else settings.answer_tokens
        room = length - after - len(ending) - 1
        passage = _ids(tokenizer, text[sentence.start() : sentence.start() + 12 * length])[: max(room, 0)]
        prompt = np.concatenate([[tokenizer.bos_token_id], passage, ending]).astype(np.int64)
        if len(prompt) == length - after:
            name, answer = f"{document.source}/{document.name}", " ".join(words[settings.cue_words :])
            items.append(RetrievalItem(name, prompt, answer, answer_ids, number=int(number)))
    if not items:
        missing = f"no document holds a sentence of {fewest} to {most} words with {length:,} tokens from there on"
        raise ValueError(f"{missing}: ask at shorter lengths or hold out longer documents")
    return items


def planted_items(
    task: str,
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    settings: Retrieval,
    *,
    questions: int,
    seed: int,
) -> list[RetrievalItem]:
    """Questions about statements planted in stretches of the documents, prompt and answer `length` tokens together.

    Made-up names and numbers that the stretch happens to hold are drawn again. A statement is a paragraph of its own
    at the end of the sentence nearest to its depth. Question `number` has the same stretch (its beginning where less
    is asked for), statements and depths at every length of the settings and however many questions there are. Each
    needle is asked for at every one of `tasks.depths`, in the same text; the other tasks spread their depths.
    ValueError if the task is unknown, no document is long enough, or the statements do not fit into the length.
    """
    if task not in PLANTED:
        raise ValueError(f"unknown task {task!r}: use one of {list(PLANTED)}")
    longest = max((document.tokens - 2 for document in documents), default=0)
    if longest < length:
        missing = f"no document has {length:,} tokens for task {task!r}, the longest has {longest:,}"
        raise ValueError(f"{missing}: ask at shorter lengths (retrieval.lengths) or hold out longer documents")
    reach = max([length, *(other for other in settings.lengths if other <= longest)])
    readable = [document for document in documents if document.tokens - 2 >= reach]
    order = np.random.default_rng(seed).permutation(len(readable))
    if task == "needle":
        asked = list(itertools.product(range(questions), settings.tasks.depths))
    else:
        asked = [(number, (0.5 + number * GOLDEN) % 1) for number in range(questions)]  # spread evenly, however many
    items = []
    for number, depth in asked:
        document = readable[order[number % len(order)]]
        generator = np.random.default_rng([seed, list(PLANTED).index(task), number])
        start = 1 + int(generator.integers(0, document.tokens - 1 - reach))
        stretch = document.token_ids[start : start + reach].astype(np.int64)
        text = tokenizer.decode(stretch)
        question = PLANTED[task](generator, depth, settings)
        while any(word in text for word in question.new):
            question = PLANTED[task](generator, depth, settings)
        prompt, answer_ids, place = _plant(tokenizer, stretch, question, length, task)
        name = f"{document.source}/{document.name}"
        items.append(
            RetrievalItem(name, prompt, question.answer, answer_ids, task, number, depth, place, question.others)
        )
    return items


def _passkey(generator: np.random.Generator, depth: float, settings: Retrieval) -> Question:
    cue, number = "The pass key that opens the north gate is", _number(generator)
    return Question(((f"{cue} {number}.", depth),), "", cue, f"{number}.", (number,))


def _needle(generator: np.random.Generator, depth: float, settings: Retrieval) -> Question:
    name = _name(generator)
    cue = f"The {generator.choice(TRADES)} of {name} keeps a"
    (one, other), (thing, second) = generator.choice(ADJECTIVES, 2, False), generator.choice(NOUNS, 2, False)
    answer = f"{one} {thing} and a {other} {second} under the {generator.choice(PLACES)}."
    return Question(((f"{cue} {answer}", depth),), "", cue, answer, (name, answer))


def _multi_key(generator: np.random.Generator, depth: float, settings: Retrieval) -> Question:
    keys = settings.tasks.keys
    names, numbers = _different(_name, generator, keys), _different(_number, generator, keys)
    cues = [f"The key to the gate of {name} is" for name in names]
    depths = [depth, *generator.random(keys - 1)]
    statements = tuple((f"{cue} {number}.", where) for cue, number, where in zip(cues, numbers, depths, strict=True))
    others = tuple(f"{number}." for number in numbers[1:])
    return Question(statements, "", cues[0], f"{numbers[0]}.", (*names, *numbers), others)


def _variables(generator: np.random.Generator, depth: float, settings: Retrieval) -> Question:
    hops = settings.tasks.hops
    names = _different(_name, generator, 2 * (hops + 1))
    number, of_example = _different(_number, generator, 2)
    asked, shown = names[: hops + 1], names[hops + 1 :]
    example = " ".join([*_chain(shown, of_example), f"So {shown[-1]} is {of_example}."])
    depths = [depth, *np.sort(depth + (1 - depth) * generator.random(hops))]
    statements = tuple(zip(_chain(asked, number), depths, strict=True))
    cue, others = f"So {asked[-1]} is", (f"{of_example}.", *(f"{name}." for name in asked[:-1]))
    return Question(statements, example, cue, f"{number}.", (*names, number, of_example), others)


def _chain(names: Sequence[str], number: str) -> list[str]:
    first = f"Here {names[0]} is {number}."
    return [first, *(f"Here {name} is {before}." for before, name in itertools.pairwise(names))]


PLANTED: dict[str, Callable[[np.random.Generator, float, Retrieval], Question]] = {
    "passkey": _passkey,
    "needle": _needle,
    "multi_key": _multi_key,
    "variables": _variables,
}
TASKS = ("first_sentence", *PLANTED)


def _different(draw: Callable[[np.random.Generator], str], generator: np.random.Generator, count: int) -> list[str]:
    found: dict[str, None] = {}  # keeps the order of drawing, which a set would not
    while len(found) < count:
        found[draw(generator)] = None
    return list(found)


def _number(generator: np.random.Generator) -> str:
    """Five different digits: where one stood twice, a copying model would not know after which of them it is.

    In words, as the tiny model copies "four one" and not "41"; its tokenizer needs four tokens for "zero" alone.
    """
    return " ".join(generator.choice(DIGITS, 5, replace=False))


def _name(generator: np.random.Generator) -> str:
    syllables = zip(generator.choice([*"bdfgklmnprtvz"], 3), generator.choice([*"aeiou"], 3), strict=True)
    return "".join(f"{consonant}{vowel}" for consonant, vowel in syllables).capitalize()


def _plant(
    tokenizer: PreTrainedTokenizerBase, stretch: np.ndarray, question: Question, length: int, task: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """(prompt, answer ids, share of the text before the first statement): statements in as much text as fits."""
    example = f"\n\n{question.example}" if question.example else ""
    ending, answer_ids = _question_and_answer(tokenizer, f"{example}\n\n{question.cue}", f" {question.answer}")
    statements = [_ids(tokenizer, f"\n\n{statement}\n\n") for statement, _depth in question.statements]
    fixed = 1 + sum(map(len, statements)) + len(ending) + len(answer_ids)
    if fixed >= length:
        raise ValueError(
            f"length = {length} is too short for task {task!r}, whose statements, question and answer take {fixed} "
            f"tokens without any text between them: ask at {2 * fixed} tokens or more (retrieval.lengths)"
        )
    text = stretch[: length - fixed]
    places = sentence_ends(tokenizer, text)
    nearest = [places[np.abs(places - depth * len(text)).argmin()] for _statement, depth in question.statements]
    parts, done = [[tokenizer.bos_token_id]], 0
    for number in np.argsort(nearest, kind="stable"):
        parts += [text[done : nearest[number]], statements[number]]
        done = nearest[number]
    prompt = np.concatenate([*parts, text[done:], ending]).astype(np.int64)
    return prompt, answer_ids, float(nearest[0] / len(text))


def sentence_ends(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> np.ndarray:
    """Places between tokens where a sentence ends, and both ends of the text: rising, from 0 to len(token_ids)."""
    kinds, where = np.unique(token_ids, return_inverse=True)
    ends = np.array([token.endswith((".", "!", "?")) for token in tokenizer.convert_ids_to_tokens(kinds.tolist())])
    return np.unique([0, *(np.flatnonzero(ends[where]) + 1), len(token_ids)])


def _question_and_answer(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a question, and those of the answer as they follow it; ValueError if one token spans both."""
    ending, both = _ids(tokenizer, question), _ids(tokenizer, question + answer)
    if not np.array_equal(both[: len(ending)], ending):
        between = f"the end of {question[-20:]!r} and the beginning of {answer[:20]!r}"
        raise ValueError(f"the tokenizer has one token for {between}: end cues where a word ends")
    return ending, both[len(ending) :]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
