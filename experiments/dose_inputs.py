"""What the dose experiment trains on, reads and asks, as token ids in one file: a rented GPU needs no network.

`python -m experiments dose --prepare FILE` writes it where the texts and task packages are; `--inputs FILE` reads it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from experiments.dose_questions import Haystack, Question, haystacks
from experiments.dose_settings import Doses
from experiments.dose_texts import Which, read_texts
from experiments.task_requests import Request, collect
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.records import read_arrays, write_arrays
from llama_long_utils.settings import Preset


@dataclass(frozen=True)
class Inputs:
    """Documents to train on, held-out texts with a row about each, texts to ask behind, and requests of tasks."""

    training: list[TokenizedDocument]
    texts: list[TokenizedDocument]
    about: list[dict[str, Any]]
    haystacks: list[Haystack]
    requests: list[Request]


def prepare(
    preset: Preset, doses: Doses, tokenizer: PreTrainedTokenizerBase, which: Which = "first", *, doll: bool = False
) -> Inputs:
    """Read and tokenize everything; `doll`: two texts and one source only. The second set is texts and nothing else."""
    data, whole = preset.data, preset.extension.window // 2
    if doll:
        last = data.sources[-1]
        data = replace(data, sources=[last], held_out={last: 2})
    training, texts, about = read_texts(data, tokenizer, doses.lengths, "own" if doll else which)
    if which == "second":
        return Inputs([], texts, about, [], [])
    if doses.join_documents:
        training = join_neighbours(training, whole)
    texts = texts[:2] if doll else texts
    long = {text.source: text for text in reversed(texts) if text.tokens == doses.lengths[0]}  # one of each kind
    chosen = list(long.values())[-5:]
    return Inputs(
        [document for document in training if document.tokens >= whole],
        texts,
        about[: len(texts)],
        haystacks(chosen[: 1 if doll else 5], tokenizer, doses.asked, keys=doses.questions),
        collect(preset, doses.tasks, tokenizer),
    )


def join_neighbours(documents: list[TokenizedDocument], tokens: int) -> list[TokenizedDocument]:
    """Documents of at least so many tokens: shorter ones of a source are joined with those that follow them in it.

    Each keeps its BOS and EOS. What is left at a source's end joins the document before, and is dropped without one.
    """
    joined: list[TokenizedDocument] = []
    for source in dict.fromkeys(document.source for document in documents):
        groups: list[list[TokenizedDocument]] = [[]]
        for document in documents:
            if document.source == source:
                groups[-1].append(document)
                if sum(part.tokens for part in groups[-1]) >= tokens:
                    groups.append([])
        rest = groups.pop()
        if groups:
            groups[-1] += rest
        for group in groups:
            name = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
            joined.append(TokenizedDocument(source, name, np.concatenate([part.token_ids for part in group])))
    return joined


def save_inputs(inputs: Inputs, path: Path) -> None:
    """Write them as .npz: arrays of token ids, and one of JSON."""
    rows = [document.token_ids for document in (*inputs.training, *inputs.texts)]
    rows += [stack.prefix for stack in inputs.haystacks]
    rows += [np.array(ids) for request in inputs.requests for ids in (request.context, request.continuation)]
    described = {
        "training": [[document.source, document.name] for document in inputs.training],
        "texts": [[document.source, document.name] for document in inputs.texts],
        "about": inputs.about,
        "haystacks": [
            [stack.length, stack.text, [asdict(question) for question in stack.questions]] for stack in inputs.haystacks
        ],
        "requests": [[request.task, request.key, request.tokens, request.stops] for request in inputs.requests],
    }
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.concatenate(rows).astype(np.int32)
    write_arrays(path, {"ids": flat, "lengths": lengths, "described": np.array(json.dumps(described))})


def load_inputs(path: Path) -> Inputs:
    """What `save_inputs` wrote."""
    arrays = read_arrays(path)
    described = json.loads(str(arrays["described"]))
    rows = iter(np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1]))

    def documents(kind: str) -> list[TokenizedDocument]:
        return [TokenizedDocument(source, name, next(rows)) for source, name in described[kind]]

    return Inputs(
        documents("training"),
        documents("texts"),
        described["about"],
        [
            Haystack(length, text, next(rows).astype(np.int64), [Question(**question) for question in questions])
            for length, text, questions in described["haystacks"]
        ],
        [
            Request(task, key, next(rows).tolist(), next(rows).tolist(), tokens, tuple(stops))
            for task, key, tokens, stops in described["requests"]
        ],
    )
