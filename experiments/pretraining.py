"""When should the sequences of pretraining become long? Small Llamas from scratch, one cell of the tables at a time.

A cell is a size, an arm and a seed. Every arm reads the same 4,096-token stretches in the same order; an arm that
begins short reads each as eight texts of 512 tokens up to its switch. The switch is one run of `train`: weights,
optimizer and learning-rate schedule go on, the sequences become long and the RoPE base is raised, as in the paper
(arXiv:2309.16039, section 4.4). Arms of one seed share their short part, so that it is trained once.

Expected: the NLL at 4,096 tokens of a late switch equals that of long sequences throughout, at fewer operations. An arm
that is worse by more than its interval, over seeds and documents, refutes that for its switch.

Expected at a larger size (`LARGER`), written before it was measured, for 0.4M had left it open: the same of the switch
at 80%, refuted in the same way. Quality is called equal only if a loss of `EQUAL` is outside the interval. Three seeds
may not tell, so both sizes are also judged together, by all their seeds. And 4,064 tokens of context save the larger
model more than 0.4M, on the same documents; an interval below zero refutes that.

To models this small and briefly trained, far context is worth next to nothing. So the same arms begin a second time
where a model already copies from its context: pretraining_copying.py. Data mixes: pretraining_mix.py, both models.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

from experiments.pretraining_cells import (
    AS_SPARSE,
    BEFORE,
    CONTINUED,
    EDGES,
    FROM_SCRATCH,
    LONG,
    LONG_BASE,
    PILOTED,
    PRESET,
    RATES,
    SHORT,
    SHORT_AS_SPARSE,
    SHORT_BASE,
    SHORT_SPARSE,
    SIZES,
    SPARSE,
    SPARSE_ARMS,
    SPARSE_SHARE,
    SWITCHES,
    TRAINED_ON,
    Cell,
    all_cells,
    flops_per_token,
    later_settings,
    long_settings,
    short_folder,
    short_settings,
)
from experiments.pretraining_device import fast_products, for_reading, on_device
from experiments.pretraining_rates import LARGER
from experiments.pretraining_results import LARGER_SLUG, LATER, MIXED, SLUG, add_cells, collect
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import read_documents
from llama_long_utils.data.packing import TrainingSequence, join_pieces, quote_themselves
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
from llama_long_utils.records import read_record, write_record
from llama_long_utils.settings import TrainingSettings
from llama_long_utils.training.trainer import Labels, last_whole_checkpoint, plain_trainer, train

BF16 = "bf16 autocast"
QUESTION = "When should pretraining sequences become long?"
STRETCHES = 2  # of each held-out document, at most


def run_all(folder: Path, *, finished: bool, add: bool = False) -> None:
    """Measure every cell that has no record yet, unless only `finished` ones are asked for; join them in `folder`.

    `add`: the record of the larger size keeps its cells, and gets those that are finished.
    """
    from experiments.pretraining_context import measured_contexts

    cells = [cell for cell in all_cells() if not (finished or add) or cell.record.is_file()]
    for number, cell in enumerate(cells, start=1):
        run_cell(cell)
        print(f"[{number}/{len(cells)}] {cell.size} {cell.arm}, seed {cell.seed}", flush=True)
    if not cells:
        raise ValueError("no cell is measured yet: leave out --finished and --add, or measure one with --cell")
    if add:
        larger = [cell.record for cell in cells if cell.size in (LARGER, *RATES)]
        print(add_cells(folder / f"{LARGER_SLUG}.json", larger))
        return
    for size, slug in ((FROM_SCRATCH, SLUG), (LARGER, LARGER_SLUG)):
        if some := [cell for cell in cells if cell.size in (size, *(RATES if size == LARGER else ()))]:
            contexts = [cell for cell in some if cell.arm == "long" and cell.size == size]
            measured = measured_contexts(contexts, finished=finished, tiny=size == FROM_SCRATCH)
            print(collect([cell.record for cell in some], folder, slug, contexts=measured))
    for mixed, slug in ((False, LATER), (True, MIXED)):
        if some := [cell for cell in cells if cell.size == TRAINED_ON and cell.is_mix == mixed]:
            print(collect([cell.record for cell in some], folder, slug))


def counted_flops(model: LlamaForCausalLM, length: int) -> float:
    """Operations per token of this model: six for each weight that multiplies, attention without its masked half."""
    config = model.config
    weights = sum(weight.numel() for name, weight in model.named_parameters() if name.endswith("_proj.weight"))
    head = config.vocab_size * config.hidden_size
    return 6 * (weights + head) + 6 * config.num_hidden_layers * config.hidden_size * length


@cache
def texts() -> tuple[PreTrainedTokenizerBase, list[TokenizedDocument], list[TokenizedDocument]]:
    """The tokenizer, the documents to train on and the held-out ones: those of the tiny Llama."""
    tokenizer = load_tokenizer(locate_base(PRESET))
    mixture, held_out = read_documents(PRESET.data, tokenizer, length=LONG)
    training = [document for source in mixture.sources for document in mixture.training(source)]
    return tokenizer, training, held_out


def cut(row: TrainingSequence, length: int) -> TrainingSequence:
    """A sequence with the same tokens as texts of `length` tokens, each with BOS in place of its first token."""
    tokenizer = texts()[0]
    pieces = list(row.input_ids.reshape(-1, length))
    return join_pieces(pieces, row.input_ids.size, tokenizer.eos_token_id, tokenizer.bos_token_id)


def cut_short(rows: list[TrainingSequence]) -> list[TrainingSequence]:
    """The same tokens as sequences of 512."""
    pieces = (piece for row in rows for piece in row.input_ids.reshape(-1, SHORT))
    tokenizer = texts()[0]
    return [join_pieces([piece], SHORT, tokenizer.eos_token_id, tokenizer.bos_token_id) for piece in pieces]


def new_model(size: str, rope_base: float, seed: int) -> LlamaForCausalLM:
    """The model to begin with: untrained, equal weights for equal seeds; or the tiny Llama.

    Its weights are fp32, its decoder multiplies in bf16: with one thread of a CPU that has bf16 instructions that is
    1.3 times as fast at 0.4M parameters, twice as fast at 4M. The doll multiplies in fp32, as any CPU can.
    """
    shape, tokenizer = SIZES[size], texts()[0]
    set_seed(seed)
    options = {
        "max_position_embeddings": LONG,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_base},
    }
    if size == TRAINED_ON:
        model = LlamaForCausalLM.from_pretrained(locate_base(PRESET), dtype=torch.float32, **options)
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.hidden * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            initializer_range=0.05,  # 5.15 nats after 600,000 tokens at 0.4M; 5.34 with 0.125
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **options,
        )
        model = LlamaForCausalLM(config)
    return on_device(model, bf16=arithmetic(size) == BF16, compiled=shape.on_a_gpu)


def arithmetic(size: str) -> str:
    """What the products of training are computed in."""
    return "fp32" if "doll" in size else BF16


def begin_with(checkpoint: Path, folder: Path) -> None:
    """Let a run begin where another one has come to; nothing happens if it has begun."""
    if not folder.exists():
        copy = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy / checkpoint.name)
        os.replace(copy, folder)


def leaving_off(until: int, *given: Any) -> tuple[Trainer, Labels]:
    """`plain_trainer` that stops after step `until`, with a checkpoint, from which another call of `train` goes on."""

    class Stop(TrainerCallback):
        def on_step_end(self, _arguments: Any, state: Any, control: Any, **_options: Any) -> None:
            if state.global_step >= until:
                control.should_save = control.should_training_stop = True

    trainer, labels = plain_trainer(*given)
    trainer.add_callback(Stop())
    return trainer, labels


def timed_training(
    model: LlamaForCausalLM, rows: list[TrainingSequence], settings: TrainingSettings, folder: Path, until: int
) -> tuple[list[dict[str, float]], float]:
    """`train`'s rows up to step `until`, and seconds per step of this call's steps.

    One thread of a CPU trains, so that its seconds are those of a machine that does nothing else. A GPU's are seconds
    that passed, whoever shared it.
    """
    now = time.perf_counter if model.device.type == "cuda" else time.process_time
    before, _ = last_whole_checkpoint(folder)
    first, clock = int(before.name.split("-")[1]) if before else 0, folder / "seconds.json"
    if first == until:  # trained before
        log = train(model, rows, settings, folder) if until == settings.steps else []
        return log, json.loads(clock.read_text()) if clock.is_file() else float("nan")
    begin = now()
    with fast_products(model.device):
        log = train(model, rows, settings, folder, build=partial(leaving_off, until))
    seconds = (now() - begin) / max(until - first, 1)
    write_atomically(clock, json.dumps(seconds).encode())
    return log, seconds


def short_part(size: str, seed: int, until: int, *, in_reach: bool = False) -> tuple[Path, float]:
    """The folder of a run on short sequences that has come to step `until`, and its seconds per step."""
    settings = long_settings(size, seed)
    folder = short_folder(size, seed, until, in_reach=in_reach)
    large = SIZES[size].on_a_gpu  # has no switch at 95%, and a stop takes time
    switches = {round(share * settings.steps) for share in SWITCHES.values() if not large or share < 0.95}
    earlier = [switch for switch in switches if 0 < switch < until and not in_reach]
    if earlier and not folder.exists():
        before, _ = short_part(size, seed, max(earlier))
        begin_with(last_whole_checkpoint(before)[0], folder)
    model, rows = new_model(size, SHORT_BASE, seed), cut_short(long_rows(settings))
    if in_reach:
        rows = cut_short(long_rows(replace(settings, self_quoting_share=0.0)))
        rows = list(quote_themselves(rows, settings.self_quoting_share, seed=seed))
    _, seconds = timed_training(model, rows, short_settings(settings), folder, until)
    return folder, seconds


def own_settings(cell: Cell) -> TrainingSettings:
    """Those of an arm from scratch; fewer steps than the others where it is to multiply as much as sparse attention."""
    settings = long_settings(cell.size, cell.seed)
    if cell.arm not in (AS_SPARSE, SHORT_AS_SPARSE):
        return settings
    shape, tokens, length = SIZES[cell.size], len(texts()[0]), SHORT if cell.arm == SHORT_AS_SPARSE else LONG
    weights = shape.layers * (4 + 3 * 11 / 4) * shape.hidden**2 + tokens * shape.hidden
    full, sparse = (weights + shape.layers * shape.hidden * length * share for share in (1, SPARSE_SHARE))
    steps = round(settings.steps * sparse / full)
    return replace(settings, steps=steps, warmup_steps=steps // 20, checkpoint_every=steps)


def long_rows(settings: TrainingSettings) -> list[TrainingSequence]:
    """The sequences of an arm that is long throughout, in order."""
    tokenizer, training, _ = texts()
    return list(TrainingData(training, settings, tokenizer))


def run_cell(cell: Cell) -> Path:
    """Train and measure a cell and write its record, or only name the one of before."""
    if cell.record.is_file():
        read_record(cell.record)
        return cell.record
    settings, mix = own_settings(cell), cell.arm.removeprefix("mix-")
    later = cell.arm == CONTINUED or mix != cell.arm  # trained on, as another run, from the end of "short"
    all_short, sparse = cell.arm in ("short", SHORT_SPARSE, SHORT_AS_SPARSE), cell.arm in (SPARSE, SHORT_SPARSE)
    one_part = cell.is_mix or cell.arm in SPARSE_ARMS
    switch = 0 if one_part else round(SWITCHES.get(cell.arm, 1.0) * settings.steps)
    model = new_model(cell.size, SHORT_BASE if all_short else LONG_BASE, cell.seed)
    folder, seconds, rows = cell.folder, {"short": 0.0, "long": 0.0}, []
    if switch:
        first = 0 if mix != cell.arm else cell.seed
        before, seconds["short"] = short_part(cell.size, first, switch, in_reach=cell.arm == "in-reach")
        checkpoint = last_whole_checkpoint(before)[0]
    if switch == settings.steps:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(checkpoint).state_dict())
        log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    elif switch:
        begin_with(checkpoint, folder)
    if later:
        settings = later_settings(cell)
    if cell.arm == BEFORE:
        log = []
    elif mix != cell.arm:
        from experiments.pretraining_mix import mix_rows

        model.set_attn_implementation("documents")
        rows = mix_rows(mix, settings)
    elif later or switch < settings.steps:
        rows = long_rows(settings)
    if rows and all_short:
        rows, settings, switch = cut_short(rows), short_settings(settings), settings.steps
    if rows:
        if sparse:
            from experiments import attention as _registered  # noqa: F401

            model.set_attn_implementation(SPARSE)
        part = "short" if all_short else "long"
        log, seconds[part] = timed_training(model, rows, settings, folder, settings.steps)
        model.set_attn_implementation("sdpa")
    tables = {"nll": measure(model, cell.size)}
    if cell.size == TRAINED_ON:
        from experiments.pretraining_copying import measure_copying

        tables |= measure_copying(model)
    shape, as_trained = SIZES[cell.size], {}
    if sparse:
        model.set_attn_implementation(SPARSE)
        as_trained = {"as_trained": measure(model, cell.size)}
        model.set_attn_implementation("sdpa")
    cut_up = switch * shape.sequences
    lengths = [float(SHORT)] * cut_up
    if not all_short:
        lengths += [int(row.position_ids.max()) + 1 for row in rows[0 if later else cut_up :]]
    if sparse:
        lengths = [SPARSE_SHARE * length for length in lengths]
    cost = {**asdict(cell), "parameters": model.num_parameters(), "tokens": LONG * len(lengths)}
    if cell.size.split("-x")[0] in PILOTED:
        cost |= {"learning_rate": settings.learning_rate}
    cost |= {"short_steps": switch, "long_steps": len(lengths) // shape.sequences - switch}
    cost["flops"] = sum(LONG * flops_per_token(shape.layers, shape.hidden, length) for length in lengths)
    cost["flops_counted"] = sum(LONG * counted_flops(model, length) for length in lengths)
    cost["seconds"] = switch * seconds["short"] + cost["long_steps"] * seconds["long"]
    if loss := [{"step": int(row["step"]), "loss": row["loss"]} for row in log if "loss" in row]:
        tables["loss"] = pd.DataFrame(loss)
    return write_record(
        cell.record.parent,
        cell.record.stem,
        preset=PRESET.name,
        question=QUESTION,
        tables={**tables, **as_trained, "cost": pd.DataFrame([cost])},
        seeds={"training": cell.seed, "evaluation": PRESET.evaluation.seed, "split": PRESET.data.split_seed},
        seconds=cost["seconds"],
        provenance={"command": f"python -m experiments pretraining --cell {cell.size} {cell.arm} {cell.seed}"},
    )


def measure(model: LlamaForCausalLM, size: str) -> pd.DataFrame:
    """NLL by position of held-out documents at 4,096 tokens: document, way, position_low, position_high, nats, tokens.

    `way` is "full" or "window": windows of 512 tokens that slide by half, which is all that short training can use.
    Models from scratch read in fp32; the tiny Llama reads half as much, in bf16, which is twice as fast.
    """
    if size != TRAINED_ON:
        for_reading(model)
    model.eval()
    stretches = held_out_stretches(1 if size == TRAINED_ON else STRETCHES)
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


def held_out_stretches(at_most: int) -> list[list[TokenizedDocument]]:
    """Stretches of 4,096 tokens of each held-out document."""
    return random_stretches(texts()[2], LONG, at_most=at_most, seed=PRESET.evaluation.seed)
