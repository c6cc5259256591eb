"""Does a larger model use context better? Loss against context, by cutting the context of the same target tokens.

Llama 2 Long reads the exponent of L(c) = (alpha / c)^beta + gamma as how well a model uses context (section 3.1, Figure
1): it grows with size. Here the targets are the last 32 tokens of held-out stretches, and c is how many tokens stand
before the first of them. Expected, if the paper is right: a larger beta for a larger model, outside of the intervals.
"""

from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from experiments import pretraining_cells
from experiments.pretraining import QUESTION, new_model, texts
from experiments.pretraining_cells import LONG, LONG_BASE, PRESET, Cell
from experiments.pretraining_device import for_reading
from llama_long_utils.evaluation.perplexity import random_stretches, token_nll
from llama_long_utils.model.arms import load_arm
from llama_long_utils.records import write_record
from llama_long_utils.training.trainer import last_whole_checkpoint

TARGETS = 32
CONTEXTS = (32, 64, 128, 256, 512, 1024, 2048, LONG - TARGETS)
STRETCHES = 4  # of each held-out document, at most
TINY = "tiny-llama, extended"


def context_record(name: str) -> Path:
    """Where the record of a model is."""
    return pretraining_cells.RUNS / "contexts" / f"{name.replace(', ', '-')}.json"


def measured_contexts(cells: list[Cell], *, finished: bool, tiny: bool) -> list[Path]:
    """The records of these cells' models, and of the `tiny` Llama; only those that are there, if `finished`."""
    measures = {context_record(f"{cell.size}-{cell.seed}"): partial(measure_cell, cell) for cell in cells}
    if tiny:
        measures[context_record(TINY)] = measure_tiny
    for path, measure_it in measures.items():
        if not finished and not path.is_file():
            measure_it()
    return [path for path in measures if path.is_file()]


def measure_cell(cell: Cell) -> Path:
    """The record of a cell that is long throughout, measured from its last checkpoint."""
    model = new_model(cell.size, LONG_BASE, cell.seed)
    checkpoint, _ = last_whole_checkpoint(cell.folder)
    model.load_state_dict(LlamaForCausalLM.from_pretrained(checkpoint).state_dict())
    for_reading(model)
    return measure(model, f"{cell.size}-{cell.seed}", cell.size, cell.seed)


def measure_tiny() -> Path:
    """The record of the tiny Llama with its adapter for 4,096 tokens."""
    return measure(load_arm(PRESET, "extended"), TINY, TINY, 0)


@torch.no_grad()
def measure(model: PreTrainedModel, name: str, size: str, seed: int) -> Path:
    """Nats of the targets of each held-out document at each context, as a record."""
    path = context_record(name)
    model.eval()
    rows = []
    for document in random_stretches(texts()[2], LONG, at_most=STRETCHES, seed=PRESET.evaluation.seed):
        for context in CONTEXTS:
            cut = [part.part(LONG - TARGETS - context, LONG) for part in document]
            nats = sum(float(token_nll(model, part)[-TARGETS:].sum()) for part in cut)
            about = {"model": size, "seed": seed, "parameters": model.num_parameters()}
            name_of = f"{document[0].source}/{document[0].name}"
            rows.append({**about, "document": name_of, "context": context, "nats": nats, "tokens": TARGETS * len(cut)})
    return write_record(
        path.parent,
        path.stem,
        preset=PRESET.name,
        question=QUESTION,
        tables={"contexts": pd.DataFrame(rows)},
        seeds={"training": seed, "evaluation": PRESET.evaluation.seed, "split": PRESET.data.split_seed},
        seconds=0.0,
        provenance={"command": "python -m experiments pretraining"},
    )
