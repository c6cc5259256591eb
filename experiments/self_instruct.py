"""Self-instruct as Llama 2 Long used it (arXiv:2309.16039, section 2.2): a chat model asks about long documents.

A document is cut into chunks. For a chunk the model writes two questions with answers, a short and a normal one,
between tags, each about a sentence: without one it asks for the passage's main point. Then it answers the questions
again without its answers, and pairs on which it does not agree with itself are dropped (round-trip consistency,
arXiv:1906.05416). The paper asks whether the answer is right; this model of 1.5B said yes to 15 of 15, right or wrong.
Prompts are worded by us, as the paper prints none.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd

from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import Document, split_documents
from llama_long_utils.data.sources import check_sources, load_documents
from llama_long_utils.evaluation.generation import write
from llama_long_utils.model.arms import arm_inputs, load_arm
from llama_long_utils.model.weights import load_tokenizer, locate_base
from llama_long_utils.records import device_name, write_record
from llama_long_utils.settings import Preset

SLUG = "09_self_instruct"
QUESTION = "What does a small chat model ask about long documents, and how much of it can be kept?"
VERSION = 5  # of what is written: raise it when prompts or chunks change
WINDOW = 32_768  # characters of a document's beginning, with the chunks: 8,000 tokens, about
CHUNK = 700  # characters, about, of whole paragraphs
KINDS = ("short", "normal")  # answers that are asked for, in this order
LONGEST = {"short": 8, "normal": 60}  # words of an answer: a longer one is normal, or dropped
EXAMPLE = (
    "On 12 May 1843 the ferry Aurora left Kirkby with sixty passengers. Captain Ellen Marsh had asked for a second "
    "pilot, but the harbour office refused: it had lent its only other pilot to the mail boat. Near Gull Rock the fog "
    "came down, and the Aurora lay at anchor until the morning."
)
ASK = (
    "Passage:\n{chunk}\n\nWrite a question and its answer for each of two parts of the passage. Put names in place of "
    'words such as he or it. Use the tags <question> and <answer>.\n1. An answer of one to five words, for: "{short}"\n'
    '2. An answer of one sentence, for: "{normal}"'
)
ASKED = (
    "<question>How many passengers did the ferry Aurora carry when it left Kirkby?</question>\n<answer>sixty</answer>\n"
    "<question>Why did Captain Ellen Marsh get no second pilot for the Aurora?</question>\n"
    "<answer>The harbour office refused, because it had lent its only other pilot to the mail boat.</answer>"
)
JUDGE = (
    "Passage:\n{chunk}\n\n{questions}\n\nAnswer each question from the passage in a few words, in the tag <answer>. "
    "If the passage does not state it, or it is not clear who or what is meant, write <answer>not stated</answer>."
)
AGREED = 0.4  # F1 of the words of both answers that a pair needs to be kept
GENERAL = re.compile(r"\bmain (argument|claim|goal|idea|point|purpose|theme|topic)\b|\bauthor\b", re.I)
Message = dict[str, str]
Chat = Callable[[Sequence[list[Message]], int], list[str]]  # a model's replies, in so many tokens at most


@dataclass(frozen=True)
class Pair:
    """A question and an answer about a chunk of a document, and why they are `dropped`; empty if they are kept."""

    document: str
    place: float  # share of the document before the chunk
    chunk: str
    kind: str  # of answer: what is asked for, then what was written
    sentence: str  # of the chunk, which the model is pointed at
    question: str = ""
    answer: str = ""
    again: str = ""  # what the model answers when it is asked again
    dropped: str = ""

    @property
    def found(self) -> float:
        """Share of the answer's words that stand in the chunk."""
        words, there = _words(self.answer), set(_words(self.chunk))
        return float(np.mean([word in there for word in words])) if words else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def chunks(documents: Sequence[Document], count: int, *, seed: int, window: int, each: int) -> list[Pair]:
    """Two pairs to be, short and normal, about each of `count` chunks.

    `each` chunks are of one document, spread over its first `window` characters; shorter documents are left out.
    """
    generator, found = np.random.default_rng(seed), []
    long = [document for document in documents if len(document.text) >= window]
    for number in generator.permutation(len(long)):
        document = long[number]
        paragraphs = list(re.finditer(r"\S.*?(?=\n\s*\n|\Z)", document.text[:window], re.S))[:-1]  # the last is cut
        for share in (np.arange(each) + generator.random(each)) / each:
            start, stop = next(((p.start(), p.end()) for p in paragraphs if p.start() >= share * window), (0, 0))
            for paragraph in paragraphs:
                if start < paragraph.start() and paragraph.end() - start <= 1.5 * CHUNK:
                    stop = paragraph.end()
            chunk = document.text[start : min(stop, start + 2 * CHUNK)]
            sentences = [" ".join(text.split()) for text in re.split(r"(?<=[.?!;:])\s+", chunk)]
            sentences = [text for text in sentences if 6 <= len(text.split()) <= 50]
            if len(sentences) >= len(KINDS):
                pair = Pair(f"{document.source}/{document.name}", start / len(document.text), chunk, "", "")
                two = sorted(generator.choice(len(sentences), len(KINDS), replace=False))
                found.append(
                    [replace(pair, kind=kind, sentence=sentences[n]) for kind, n in zip(KINDS, two, strict=True)]
                )
            if len(found) == count:
                return [pair for pairs in found for pair in pairs]
    raise ValueError(
        f"the {len(long)} documents of {window:,} characters have only {len(found)} chunks: ask for fewer than {count}"
    )


def parsed(pair: Pair, written: str) -> Pair:
    """The pair with what the model wrote between its tags, or with the reason to drop it."""
    tags = re.findall(r"<question>(.*?)</question>\s*<answer>(.*?)</answer>", written, re.S)
    if len(tags) <= KINDS.index(pair.kind):
        return replace(pair, dropped="no tags")
    question, answer = (" ".join(text.split()) for text in tags[KINDS.index(pair.kind)])
    kind = "short" if len(answer.split()) <= LONGEST["short"] else "normal"
    pair = replace(pair, kind=kind, question=question, answer=answer)
    if not question or not answer:
        return replace(pair, dropped="empty")
    if len(answer.split()) > LONGEST["normal"]:
        return replace(pair, dropped="answer too long")
    if re.search(r"\b(this|the) (passage|text|document)\b", question, re.I):
        return replace(pair, dropped="speaks of the passage")
    if GENERAL.search(question):
        return replace(pair, dropped="too general")
    if pair.found < 0.5:
        return replace(pair, dropped="answer not in the text")
    return pair


def judged(pairs: Sequence[Pair], written: str) -> list[Pair]:
    """A chunk's pairs with the answers that the model gave again, and the reason to drop those it does not agree on."""
    answers = [" ".join(text.split()) for text in re.findall(r"<answer>(.*?)</answer>", written, re.S)]
    found = []
    for pair, again in zip(pairs, [*answers, *[""] * len(pairs)], strict=False):
        one, other = Counter(_words(pair.answer)), Counter(_words(again))
        agreed = 2 * (one & other).total() / (one.total() + other.total())
        no = "not stated" if "not stated" in again.lower() else "" if agreed >= AGREED else "answered otherwise"
        found.append(replace(pair, again=again, dropped=no and f"critic: {no}"))
    return found


def _conversation(*turns: str) -> list[Message]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def self_instruct(asked: Sequence[Pair], chat: Chat) -> list[Pair]:
    """Each chunk's pairs, kept or dropped; `chat` is asked about all chunks at once, twice."""
    texts = list(dict.fromkeys(pair.chunk for pair in asked))
    first, second, _ = re.split(r"(?<=\.) ", EXAMPLE)
    example = ASK.format(chunk=EXAMPLE, short=first, normal=second), ASKED
    parts = {text: {pair.kind: pair.sentence for pair in asked if pair.chunk == text} for text in texts}
    replies = chat([_conversation(*example, ASK.format(chunk=text, **parts[text])) for text in texts], 160)
    written = dict(zip(texts, replies, strict=True))
    pairs = [parsed(pair, written[pair.chunk]) for pair in asked]
    seen: set[str] = set()
    for number, pair in enumerate(pairs):
        words = " ".join(_words(pair.question))
        if not pair.dropped and words in seen:
            pairs[number] = replace(pair, dropped="duplicate")
        seen.add(words)
    waiting = {text: [n for n, pair in enumerate(pairs) if pair.chunk == text and not pair.dropped] for text in texts}
    waiting = {text: numbers for text, numbers in waiting.items() if numbers}
    prompts = []
    for text, numbers in waiting.items():
        questions = "\n".join(f"{place}. {pairs[number].question}" for place, number in enumerate(numbers, 1))
        prompts.append(_conversation(JUDGE.format(chunk=text, questions=questions)))
    for numbers, verdicts in zip(waiting.values(), chat(prompts, 120) if prompts else [], strict=True):
        for number, pair in zip(numbers, judged([pairs[number] for number in numbers], verdicts), strict=True):
            pairs[number] = pair
    return pairs


def quality(pairs: Sequence[Pair]) -> pd.DataFrame:
    """Pairs by what became of them, kept ones first: outcome, pairs, and the mean share of answers' words found."""
    rows = pd.DataFrame([{"outcome": pair.dropped or "kept", "found": pair.found} for pair in pairs])
    table = rows.groupby("outcome").found.agg(["size", "mean"]).reset_index()
    table.columns = ["outcome", "pairs", "words_found"]
    return table.sort_values("pairs", ascending=False).sort_values(
        "outcome", key=lambda name: name != "kept", kind="stable"
    )


def training_texts(preset: Preset) -> list[Document]:
    """The documents of a preset that are trained on."""
    texts = [document for source in preset.data.mixture for document in load_documents(source)]
    counts = check_sources(preset.data.sources, preset.data.held_out)
    options = {"minimum_characters": preset.data.minimum_characters, "seed": preset.data.split_seed}
    return split_documents(texts, counts, **options)[0]


def generate(preset: Preset, writer: Preset, count: int, folder: Path, *, at_once: int = 16, each: int = 6) -> Path:
    """Write the record SLUG: about `count` chunks of a preset's training documents, by `writer`'s base, a chat model.

    `each` chunks are of one document. What was written is kept in runs/, `at_once` replies at a time, so that the same
    call goes on if it is stopped. The record's seconds are those of the CPU in this call.
    """
    began = process_time()
    tokenizer = load_tokenizer(locate_base(writer))
    if not tokenizer.chat_template:
        raise ValueError(f"the base of preset {writer.name!r} has no chat template: name a preset with a chat model")
    asked = chunks(training_texts(preset), count, seed=preset.data.split_seed, window=WINDOW, each=each)
    cache = Cache(writer.run_folder / "self-instruct", VERSION, arm_inputs(writer, "base", quantized=False))
    model = load_arm(writer, "base", quantized=False)

    def chat(conversations: Sequence[list[Message]], tokens: int) -> list[str]:
        def reply(part: Sequence[list[Message]]) -> list[str]:
            options = {"add_generation_prompt": True, "return_dict": False}
            ids = [np.array(tokenizer.apply_chat_template(messages, **options), np.int64) for messages in part]
            return write(model, tokenizer, ids, tokens=tokens, tokens_at_once=2**20)

        return cache.items("replies", list(conversations), reply, item_key=str, at_once=at_once, tokens=tokens)

    pairs = self_instruct(asked, chat)
    table = pd.DataFrame([{**asdict(pair), "found": pair.found} for pair in pairs])
    command = f"python -m experiments self-instruct --preset {preset.name} --writer {writer.name} --chunks {count}"
    return write_record(
        folder,
        SLUG,
        preset=writer.name,
        question=QUESTION,
        tables={"quality": quality(pairs), "pairs": table},
        seeds={"chunks": preset.data.split_seed},
        seconds=process_time() - began,
        provenance={"command": command, "device": f"{device_name()}, {writer.base.dtype}"},
    )
