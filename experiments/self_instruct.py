"""Self-instruct as Llama 2 Long used it (arXiv:2309.16039, section 2.2): a chat model asks about long documents.

A document is cut into chunks. For a chunk the model writes a question and its answer, short or normal at equal odds,
between tags; then it is asked whether that is a fair question with the right answer. Prompts are worded by us, as the
paper prints none.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
VERSION = 1  # raise it when prompts, chunks or parsing change
CHUNK = 900  # characters, about, of whole paragraphs
LENGTHS = {"short": "in at most five words", "normal": "in one or two sentences"}
LONGEST = {"short": 8, "normal": 60}  # words of an answer
ASK = (
    "Passage:\n{chunk}\n\nWrite one question about a fact that this passage states, and its answer {length}. The "
    "question must make sense to a reader of the whole document, so name who and what is meant, and do not mention "
    "the passage. Write nothing but:\n<question>the question</question>\n<answer>the answer</answer>"
)
JUDGE = (
    "Passage:\n{chunk}\n\nQuestion: {question}\nAnswer: {answer}\n\nDoes the passage state that this answer is right, "
    "and is the question clear? Write nothing but <verdict>yes</verdict> or <verdict>no</verdict>."
)
Chat = Callable[[Sequence[str], int], list[str]]  # what a model replies to each message, in so many tokens at most


@dataclass(frozen=True)
class Pair:
    """A question and an answer about a chunk of a document, and why they are `dropped`; empty if they are kept."""

    document: str
    place: float  # share of the document before the chunk
    chunk: str
    kind: str
    question: str = ""
    answer: str = ""
    dropped: str = ""

    @property
    def found(self) -> float:
        """Share of the answer's words that stand in the chunk."""
        words, there = _words(self.answer), set(_words(self.chunk))
        return float(np.mean([word in there for word in words])) if words else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def chunks(documents: Sequence[Document], count: int, *, seed: int, window: int) -> list[Pair]:
    """`count` chunks to ask about, each of another document's first `window` characters, short and normal in turn."""
    generator, found = np.random.default_rng(seed), []
    for number in generator.permutation(len(documents)):
        text, document = documents[number].text[:window], documents[number]
        paragraphs = [match for match in re.finditer(r"\S.*?(?=\n\s*\n|\Z)", text, re.S) if match.end() < len(text)]
        if len(paragraphs) < 3:
            continue
        first = int(generator.integers(len(paragraphs)))
        start, stop = paragraphs[first].start(), paragraphs[first].end()
        for paragraph in paragraphs[first:]:
            if paragraph.end() - start > 1.5 * CHUNK:
                break
            stop = paragraph.end()
        chunk = text[start : min(stop, start + 2 * CHUNK)]
        if len(chunk) >= CHUNK / 3:
            kind = ("short", "normal")[len(found) % 2]
            found.append(Pair(f"{document.source}/{document.name}", start / len(document.text), chunk, kind))
        if len(found) == count:
            return found
    raise ValueError(f"only {len(found)} documents have a chunk of {CHUNK // 3} characters: ask for fewer than {count}")


def parsed(pair: Pair, written: str) -> Pair:
    """The pair with what the model wrote between its tags, or with the reason to drop it."""
    tags = {name: re.search(rf"<{name}>(.*?)</{name}>", written, re.S) for name in ("question", "answer")}
    if not all(tags.values()):
        return replace(pair, dropped="no tags")
    question, answer = (" ".join(tags[name][1].split()) for name in ("question", "answer"))
    pair = replace(pair, question=question, answer=answer)
    if not question or not answer or answer == "the answer":
        return replace(pair, dropped="empty")
    if len(answer.split()) > LONGEST[pair.kind]:
        return replace(pair, dropped="answer too long")
    if re.search(r"\b(this|the) (passage|text|document)\b", question, re.I):
        return replace(pair, dropped="speaks of the passage")
    if pair.found < 0.5:
        return replace(pair, dropped="answer not in the text")
    return pair


def judged(pair: Pair, written: str) -> Pair:
    """The pair with the critic's verdict."""
    verdict = re.search(r"<verdict>\s*(yes|no)\b", written, re.I)
    said = verdict[1].lower() if verdict else "nothing"
    return pair if said == "yes" else replace(pair, dropped=f"critic said {said}")


def self_instruct(asked: Sequence[Pair], chat: Chat) -> list[Pair]:
    """Each chunk with its question and answer, kept or dropped; `chat` is asked for all of them at once, twice."""
    prompts = [ASK.format(chunk=pair.chunk, length=LENGTHS[pair.kind]) for pair in asked]
    pairs = [parsed(pair, text) for pair, text in zip(asked, chat(prompts, 120), strict=True)]
    seen: set[str] = set()
    for number, pair in enumerate(pairs):
        words = " ".join(_words(pair.question))
        if not pair.dropped and words in seen:
            pairs[number] = replace(pair, dropped="duplicate")
        seen.add(words)
    waiting = [number for number, pair in enumerate(pairs) if not pair.dropped]
    verdicts = chat([JUDGE.format(**asdict(pairs[number])) for number in waiting], 12) if waiting else []
    for number, verdict in zip(waiting, verdicts, strict=True):
        pairs[number] = judged(pairs[number], verdict)
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


def generate(preset: Preset, writer: Preset, count: int, folder: Path, *, at_once: int = 8) -> Path:
    """Write the record SLUG: pairs about a preset's training documents by the chat model that is `writer`'s base.

    What was written is kept in runs/, `at_once` prompts at a time: the same call goes on if it is stopped.
    """
    tokenizer = load_tokenizer(locate_base(writer))
    if not tokenizer.chat_template:
        raise ValueError(f"the base of preset {writer.name!r} has no chat template: name a preset with a chat model")
    asked = chunks(training_texts(preset), count, seed=preset.data.split_seed, window=4 * preset.training.window)
    cache = Cache(writer.run_folder / "self-instruct", VERSION, arm_inputs(writer, "base", quantized=False))
    model = load_arm(writer, "base", quantized=False)

    def chat(prompts: Sequence[str], tokens: int) -> list[str]:
        def reply(part: Sequence[str]) -> list[str]:
            options = {"add_generation_prompt": True, "return_dict": False}
            given = [[{"role": "user", "content": prompt}] for prompt in part]
            ids = [np.array(tokenizer.apply_chat_template(message, **options), np.int64) for message in given]
            return write(model, tokenizer, ids, tokens=tokens, tokens_at_once=2**20)

        return cache.items("replies", list(prompts), reply, item_key=str, at_once=at_once, tokens=tokens)

    pairs = self_instruct(asked, chat)
    table = pd.DataFrame([{**asdict(pair), "found": pair.found} for pair in pairs])
    command = f"python -m experiments self-instruct --preset {preset.name} --writer {writer.name} --pairs {count}"
    return write_record(
        folder,
        SLUG,
        preset=writer.name,
        question=QUESTION,
        tables={"quality": quality(pairs), "pairs": table},
        seeds={"chunks": preset.data.split_seed},
        seconds=0.0,
        provenance={"command": command, "device": f"{device_name()}, {writer.base.dtype}"},
    )
