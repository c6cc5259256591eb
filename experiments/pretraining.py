"""When should the sequences of pretraining become long? Small Llamas from scratch, one cell of the tables at a time.

A cell is a size, an arm and a seed. Every arm reads the same 4,096-token stretches in the same order; an arm that
begins short reads each as eight texts of 512 tokens up to its switch. The switch is one run of `train`: weights,
optimizer and learning-rate schedule go on, the sequences become long and the RoPE base is raised, as in the paper
(arXiv:2309.16039, section 4.4). Arms of one seed share their short part, so that it is trained once.

Expected: the NLL at 4,096 tokens of a late switch equals that of long sequences throughout, at fewer operations. An arm
that is worse by more than its interval, over seeds and documents, refutes that for its switch.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from llama_long_utils.cache import digest
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import read_documents
from llama_long_utils.data.packing import TrainingSequence, join_pieces
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.evaluation.perplexity import (
    bucket_sums,
    nll_in_windows,
    random_stretches,
    sliding_window,
    token_nll,
)
from llama_long_utils.model.weights import load_tokenizer, locate_base
from llama_long_utils.paths import write_atomically
from llama_long_utils.presets import load_preset
from llama_long_utils.records import read_record, write_record
from llama_long_utils.settings import MemorySavings, TrainingSettings
from llama_long_utils.training.trainer import last_whole_checkpoint, train

QUESTION = "When should pretraining sequences become long?"
VERSION = 1  # of what a cell measures: raise it when its numbers change
PRESET = load_preset("tiny")  # its texts, its tokenizer and its two windows
SHORT, LONG = PRESET.base.window, PRESET.extension.window
SHORT_BASE, LONG_BASE = PRESET.base.rope_base, PRESET.extension.rope_base
RUNS = PRESET.run_folder / "pretraining"
SEEDS = (0, 1, 2)
SWITCHES = {"long": 0.0, "switch-20": 0.2, "switch-40": 0.4, "switch-80": 0.8, "switch-95": 0.95, "short": 1.0}
CONTINUED = "continued"  # the arm "short", then trained on long sequences until it has cost what "switch-80" costs
EDGES = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096]  # of the positions' buckets
STRETCHES = 3  # of each held-out document, at most


@dataclass(frozen=True)
class Size:
    """The shape of a model, which has Llama's proportions and ties its embeddings."""

    hidden: int
    layers: int
    heads: int
    learning_rate: float
    steps: int = 400  # of 4,096 tokens


SIZES = {
    "doll": Size(64, 2, 2, 4e-3, steps=20),
    "0.2M": Size(64, 2, 2, 4e-3),
    "0.7M": Size(128, 2, 2, 3e-3),
    "4M": Size(256, 4, 4, 2e-3),
}


@dataclass(frozen=True)
class Cell:
    size: str
    arm: str
    seed: int

    @property
    def record(self) -> Path:
        """Where it is once it is measured, named by what its numbers depend on."""
        key = digest(VERSION, SIZES[self.size], self.arm, long_settings(self.size, self.seed), PRESET.data, EDGES)
        return RUNS / "cells" / f"{self.size}-{self.arm}-{self.seed}-{key[:8]}.json"


def flops_per_token(layers: int, hidden: int, length: int) -> float:
    """Operations of training on a token of a sequence of `length`, as the paper counts them.

    Six for each weight of the layers, which have 12 h^2, and attention over the whole square. Table 10 follows.
    """
    return 72 * layers * hidden**2 * (1 + length / (6 * hidden))


def counted_flops(model: LlamaForCausalLM, length: int) -> float:
    """Operations per token of this model: six for each weight that multiplies, attention without its masked half."""
    config = model.config
    weights = sum(weight.numel() for name, weight in model.named_parameters() if name.endswith("_proj.weight"))
    head = config.vocab_size * config.hidden_size
    return 6 * (weights + head) + 6 * config.num_hidden_layers * config.hidden_size * length


def long_settings(size: str, seed: int) -> TrainingSettings:
    """A step is one sequence of 4,096 tokens."""
    shape = SIZES[size]
    return TrainingSettings(
        window=LONG,
        reach=LONG,
        pack=False,
        attention="sdpa",
        steps=shape.steps,
        sequences_per_step=1,
        sequences_at_once=1,
        learning_rate=shape.learning_rate,
        warmup_steps=shape.steps // 20,
        weight_decay=0.1,
        gradient_clipping=1.0,
        memory_savings=MemorySavings(
            recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused"
        ),
        long_document_weight=1.0,
        self_quoting_share=0.0,
        checkpoint_every=max(shape.steps // 4, 1),
        seed=seed,
    )


def short_settings(settings: TrainingSettings) -> TrainingSettings:
    """The same tokens in each step, as eight sequences of 512."""
    many = LONG // SHORT
    return replace(settings, window=SHORT, reach=SHORT, sequences_per_step=many, sequences_at_once=many)


@cache
def texts() -> tuple[PreTrainedTokenizerBase, list[TokenizedDocument], list[TokenizedDocument]]:
    """The tokenizer, the documents to train on and the held-out ones: those of the tiny Llama."""
    tokenizer = load_tokenizer(locate_base(PRESET))
    mixture, held_out = read_documents(PRESET.data, tokenizer, length=LONG)
    training = [document for source in mixture.sources for document in mixture.training(source)]
    mixture.workers.close()
    return tokenizer, training, held_out


def cut_short(rows: list[TrainingSequence]) -> list[TrainingSequence]:
    """The same tokens as texts of their own of 512 tokens, each with BOS in place of its first token."""
    tokenizer = texts()[0]
    return [
        join_pieces([part], SHORT, tokenizer.eos_token_id, tokenizer.bos_token_id)
        for row in rows
        for part in row.input_ids.reshape(-1, SHORT)
    ]


def new_model(size: str, rope_base: float, seed: int) -> LlamaForCausalLM:
    """The untrained model: equal weights for equal seeds. Its decoder multiplies in bf16, its weights are fp32.

    With one thread bf16 is 1.3 times as fast as fp32 at 0.2M parameters and twice as fast at 4M.
    """
    shape, tokenizer = SIZES[size], texts()[0]
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.hidden * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=LONG,
            rope_parameters={"rope_type": "default", "rope_theta": rope_base},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    decoder = model.model
    decoder.forward = torch.autocast("cpu", torch.bfloat16)(decoder.forward)
    return model


def begin_with(checkpoint: Path, folder: Path) -> None:
    """Let a run begin where another one has come to; nothing happens if it has begun."""
    if not folder.exists():
        copy = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy / checkpoint.name)
        os.replace(copy, folder)


def timed_training(
    model: LlamaForCausalLM, rows: list[TrainingSequence], settings: TrainingSettings, folder: Path, until: int
) -> tuple[list[dict[str, float]], float]:
    """`train`'s rows up to step `until`, and the CPU's seconds per step of this call's steps.

    One thread trains, so that these are seconds of a machine that does nothing else.
    """
    before, _ = last_whole_checkpoint(folder)
    first, clock = int(before.name.split("-")[1]) if before else 0, folder / "seconds.json"
    if first == until and clock.is_file():  # measured before
        log = train(model, rows, settings, folder) if until == settings.steps else []
        return log, json.loads(clock.read_text())
    begin = time.process_time()
    log = train(model, rows, settings, folder, stop_after=until)
    seconds = (time.process_time() - begin) / max(until - first, 1)
    write_atomically(clock, json.dumps(seconds).encode())
    return log, seconds


def short_part(size: str, seed: int, until: int) -> tuple[Path, float]:
    """The folder of a run on short sequences that has come to step `until`, and its seconds per step."""
    settings = long_settings(size, seed)
    folder = RUNS / "short" / f"{size}-{seed}-{digest(VERSION, SIZES[size], settings, PRESET.data)[:8]}-{until}"
    earlier = [round(share * settings.steps) for share in SWITCHES.values() if 0 < share * settings.steps < until]
    if earlier and not folder.exists():
        before, _ = short_part(size, seed, max(earlier))
        begin_with(last_whole_checkpoint(before)[0], folder)
    model, rows = new_model(size, SHORT_BASE, seed), cut_short(long_rows(settings))
    _, seconds = timed_training(model, rows, short_settings(settings), folder, until)
    return folder, seconds


def long_rows(settings: TrainingSettings) -> list[TrainingSequence]:
    """The sequences of an arm that is long throughout, in order."""
    tokenizer, training, _ = texts()
    return list(TrainingData(training, settings, tokenizer))


def run_cell(cell: Cell) -> Path:
    """Train and measure a cell and write its record, or only name the one of before."""
    if cell.record.is_file():
        read_record(cell.record)
        return cell.record
    settings = long_settings(cell.size, cell.seed)
    steps = settings.steps
    switch = round(SWITCHES.get(cell.arm, 1.0) * steps)
    seconds = {"short": 0.0, "long": 0.0}
    folder = RUNS / "long" / cell.record.stem
    if switch:
        before, seconds["short"] = short_part(cell.size, cell.seed, switch)
        checkpoint = last_whole_checkpoint(before)[0]
    model = new_model(cell.size, SHORT_BASE if cell.arm == "short" else LONG_BASE, cell.seed)
    long_steps = steps - switch
    if cell.arm == CONTINUED:
        long_steps = continued_steps(cell.size)
        settings = replace(
            settings,
            steps=long_steps,
            learning_rate=settings.learning_rate / 2,
            warmup_steps=max(long_steps // 20, 1),
            seed=cell.seed + 1000,  # other sequences than before
        )
        model.load_state_dict(LlamaForCausalLM.from_pretrained(checkpoint).state_dict())
    elif switch == steps:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(checkpoint).state_dict())
        log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        log = [row for row in log if "loss" in row]
    elif switch:
        begin_with(checkpoint, folder)
    if long_steps:
        log, seconds["long"] = timed_training(model, long_rows(settings), settings, folder, settings.steps)
    del model.model.forward  # measured in fp32
    shape = SIZES[cell.size]
    cost = {**asdict(cell), "parameters": model.num_parameters(), "short_steps": switch, "long_steps": long_steps}
    parts = ((switch, SHORT), (long_steps, LONG))
    cost["tokens"] = LONG * (switch + long_steps)
    cost["flops"] = sum(LONG * n * flops_per_token(shape.layers, shape.hidden, length) for n, length in parts)
    cost["flops_counted"] = sum(LONG * n * counted_flops(model, length) for n, length in parts)
    cost["seconds"] = switch * seconds["short"] + long_steps * seconds["long"]
    loss = pd.DataFrame([{"step": int(row["step"]), "loss": row["loss"]} for row in log])
    return write_record(
        cell.record.parent,
        cell.record.stem,
        preset=PRESET.name,
        question=QUESTION,
        tables={"nll": measure(model), "loss": loss, "cost": pd.DataFrame([cost])},
        seeds={"training": cell.seed, "evaluation": PRESET.evaluation.seed, "split": PRESET.data.split_seed},
        seconds=cost["seconds"],
        provenance={"command": f"python -m experiments pretraining {cell.size} {cell.arm} {cell.seed}"},
    )


def continued_steps(size: str) -> int:
    """Long steps after 512 tokens throughout at which both together cost what "switch-80" costs."""
    shape = SIZES[size]
    short, long = (flops_per_token(shape.layers, shape.hidden, length) for length in (SHORT, LONG))
    return round((1 - SWITCHES["switch-80"]) * shape.steps * (long - short) / long)


def measure(model: LlamaForCausalLM) -> pd.DataFrame:
    """NLL by position of held-out documents at 4,096 tokens: document, way, position_low, position_high, nats, tokens.

    `way` is "full" or "window": windows of 512 tokens that slide by half, which is all that short training can use.
    """
    model.eval()
    stretches = random_stretches(texts()[2], LONG, at_most=STRETCHES, seed=PRESET.evaluation.seed)
    rows = []
    for document in stretches:
        ways = {
            "full": [token_nll(model, part) for part in document],
            "window": [sliding_window(nll_in_windows(model, part, SHORT)) for part in document],
        }
        for way, nll in ways.items():
            nats, tokens = bucket_sums([row[None] for row in nll], EDGES)
            name = f"{document[0].source}/{document[0].name}"
            sums = zip(EDGES[:-1], EDGES[1:], nats.sum(axis=0), tokens.sum(axis=0), strict=True)
            rows += [(name, way, *entry) for entry in sums]
    return pd.DataFrame(rows, columns=["document", "way", "position_low", "position_high", "nats", "tokens"])
