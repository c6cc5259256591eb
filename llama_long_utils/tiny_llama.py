"""Trains data/tiny-llama, the Llama that every notebook uses by default: `make tiny-llama`.

A real LlamaForCausalLM of 4.3M parameters with Llama 2's proportions (untied embeddings, no grouped
queries, RoPE base 10,000) and a window of 512 tokens, so that 512 -> 4,096 is the paper's factor 8.
Interrupted, the command goes on from its last checkpoint.

Five stages, because a model that has read 18M tokens does not copy from its context (measured: a
passage read a second time costs as much as the first time), and one that does not copy gains nothing
from a longer context. Larger models grow induction heads by themselves (Olsson et al.,
arXiv:2209.11895); here stage 2 shows three heads where to look, stage 3 trains everything on, and stages
4 and 5 train on texts that quote themselves, after which the model continues a sentence that it has read.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

from llama_long_utils.documents import (
    CORPORA,
    REPOSITORY,
    Document,
    TokenizedDocument,
    load_documents,
    split_documents,
    tokenize_documents,
)
from llama_long_utils.figures import use_style
from llama_long_utils.models import library_versions
from llama_long_utils.packing import IGNORED_LABEL, TrainingSequence, training_sequences, with_excerpts
from llama_long_utils.records import device_name, write_atomically
from llama_long_utils.training import TrainingSettings, run_fingerprint, train

FOLDER = REPOSITORY / "data" / "tiny-llama"
HELD_OUT = {"sotu": 18, "shakespeare": 6}
HELD_OUT_MINIMUM_CHARACTERS = 30_000
SPLIT_SEED = 0
VOCABULARY = 2048
SPECIAL_TOKENS = 2  # <s> and </s>, ids 0 and 1

WINDOW = 512

PRETRAINING = TrainingSettings(
    window=WINDOW,
    reach=WINDOW,
    pack=True,
    attention="sdpa",
    steps=2200,
    sequences_per_step=16,
    sequences_at_once=16,
    learning_rate=3e-3,
    warmup_steps=100,
    weight_decay=0.1,
    gradient_clipping=1.0,
    gradient_checkpointing=False,
    long_document_weight=1.0,
    self_quoting_share=0.0,
    checkpoint_every=200,
    seed=0,
)


@dataclass(frozen=True)
class CopyTeaching:
    """A stage that teaches copying. Heads are (layer, head); `attention_weight` scales the loss on their attention.

    Args:
        kinds: what the sequences of a step hold, in turn: "text", "random" tokens, or "plain" text without repeats.
        share_with_repeat: of the sequences that are not plain, how many repeat something.
        repeat: what is repeated: one "passage", "excerpts" filling the second half, or "excerpts everywhere".
        everything: train all weights, not the heads alone.
        copied_weight: weight of a copied token in the loss; `random_weight`: that of random tokens copied from nowhere.
    """

    steps: int
    sequences_per_step: int
    learning_rate: float
    seed: int
    kinds: tuple[str, ...]
    share_with_repeat: float
    repeat: Literal["passage", "excerpts", "excerpts everywhere"]
    everything: bool
    attention_weight: float
    copied_weight: float
    random_weight: float
    warmup_steps: int
    learning_rate_falls: bool
    beta2: float
    weight_decay: float
    previous_token_heads: tuple[tuple[int, int], ...] = ((1, 2),)
    induction_heads: tuple[tuple[int, int], ...] = ((2, 0), (3, 1))


TEACHING = CopyTeaching(
    steps=400,
    sequences_per_step=4,
    learning_rate=4e-3,
    seed=1,
    kinds=("text", "random"),
    share_with_repeat=0.75,
    repeat="passage",
    everything=False,
    attention_weight=0.5,
    copied_weight=4.0,
    random_weight=1.0,
    warmup_steps=30,
    learning_rate_falls=False,
    beta2=0.98,
    weight_decay=0.0,
)

SETTLING = replace(PRETRAINING, steps=500, learning_rate=1.5e-3, warmup_steps=20, checkpoint_every=100, seed=2)
SETTLING_SHARE_WITH_REPEAT = 0.25

QUOTING = CopyTeaching(
    steps=600,
    sequences_per_step=8,
    learning_rate=1.5e-3,
    seed=3,
    kinds=("text", "text", "text", "text", "text", "random", "plain", "plain"),
    share_with_repeat=1.0,
    repeat="excerpts",
    everything=True,
    attention_weight=0.2,
    copied_weight=2.0,
    random_weight=0.0,
    warmup_steps=20,
    learning_rate_falls=True,
    beta2=0.95,
    weight_decay=0.1,
)

# Quoting alone teaches to copy wherever the second half of a window is: plain text got 0.8 nat worse there.
BALANCING = replace(
    QUOTING,
    steps=400,
    learning_rate=1.2e-3,
    seed=4,
    kinds=("text", "text", "text", "random", "plain", "plain", "plain", "plain"),
    repeat="excerpts everywhere",
    attention_weight=0.1,
)


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; like Llama's it puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model; its shape is all there is to choose."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def with_repeat(ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Let a passage of 8 tokens up to half a window occur twice in a sequence, at random places.

    Returns:
        The changed ids, and for each token the place that it is copied from, or -1.
    """
    window = len(ids)
    length = int(generator.integers(8, window // 2))
    again = int(generator.integers(length + 1, window - length + 1))
    first = int(generator.integers(1, again - length + 1))
    ids, source = ids.copy(), np.full(window, -1)
    ids[again : again + length] = ids[first : first + length]
    source[again : again + length] = np.arange(first, first + length)
    return ids, source


def repeat_passages(sequences: list[TrainingSequence], share: float, *, seed: int) -> list[TrainingSequence]:
    """Put a repeated passage into a share of the sequences that hold a single piece."""
    generator = np.random.default_rng(seed)
    changed = []
    for sequence in sequences:
        if sequence.one_piece and generator.random() < share:
            ids, _source = with_repeat(sequence.input_ids, generator)
            labels = np.where(sequence.labels == IGNORED_LABEL, IGNORED_LABEL, ids)
            sequence = replace(sequence, input_ids=ids, labels=labels)
        changed.append(sequence)
    return changed


def goes_on(source: torch.Tensor) -> torch.Tensor:
    """Where the next token continues a copy, and could be known: bool, shape (batch, length - 1)."""
    return (source[:, :-1] >= 0) & (source[:, 1:] == source[:, :-1] + 1)


def attention_loss(
    attentions: Sequence[torch.Tensor], source: torch.Tensor, settings: CopyTeaching
) -> torch.Tensor | float:
    """-log of the attention that the taught heads pay to where they should look, mean over heads, in nats.

    Previous-token heads should look one token back; induction heads, inside a copy, at the token
    after the one that the current one is copied from.

    Args:
        attentions: per layer, shape (batch, heads, length, length).
        source: from which place each token is copied, or -1: shape (batch, length).
    """

    def cost(layer: int, head: int, row: torch.Tensor | slice, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return -(attentions[layer][row, head, query, key] + 1e-6).log().mean()

    every = torch.arange(1, source.shape[1])
    previous = [cost(layer, head, slice(None), every, every - 1) for layer, head in settings.previous_token_heads]
    row, query = goes_on(source).nonzero(as_tuple=True)
    induction = [cost(layer, head, row, query, source[row, query] + 1) for layer, head in settings.induction_heads]
    return torch.stack(previous).mean() + (torch.stack(induction).mean() if len(row) else 0.0)


def head_masks(model: LlamaForCausalLM, heads: Sequence[tuple[int, int]]) -> dict[nn.Parameter, torch.Tensor]:
    """For every projection that holds a head's weights, ones at those weights and zeros elsewhere."""
    size = model.config.head_dim
    masks: dict[nn.Parameter, torch.Tensor] = {}
    for layer, head in heads:
        attention = model.model.layers[layer].self_attn
        for name, dimension in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            weight = getattr(attention, name).weight
            mask = masks.setdefault(weight, torch.zeros_like(weight))
            mask.narrow(dimension, head * size, size).fill_(1.0)
    return masks


def teach_copying(
    model: LlamaForCausalLM, documents: list[TokenizedDocument], settings: CopyTeaching
) -> list[dict[str, float]]:
    """Train, in place, on sequences that repeat text or random tokens, with a loss on where the taught heads look.

    Returns one row per step: step, tokens, loss (nats, unweighted), attention_loss (nats).
    """
    generator = np.random.default_rng(settings.seed)
    model.set_attn_implementation("eager")  # the one that gives out its attention weights
    masks = head_masks(model, settings.previous_token_heads + settings.induction_heads)
    if settings.everything:
        masks = {weight: torch.ones_like(weight) for weight in model.parameters()}
    for weight in model.parameters():
        weight.requires_grad_(weight in masks)
    optimizer = torch.optim.AdamW(
        masks, lr=settings.learning_rate, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay
    )
    rows = []
    for step in range(1, settings.steps + 1):
        ids, source, random = copying_batch(documents, settings, model.config.vocab_size, generator)
        output = model(input_ids=ids, output_attentions=True, use_cache=False)
        nll = nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1)
        copied = goes_on(source)
        weight = torch.where(copied, settings.copied_weight, torch.where(random, settings.random_weight, 1.0))
        looking = attention_loss(output.attentions, source, settings)
        fall = 1 - step / settings.steps if settings.learning_rate_falls else 1.0
        rate = settings.learning_rate * min(1.0, step / settings.warmup_steps) * max(fall, 0.02)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        ((nll * weight).sum() / weight.sum() + settings.attention_weight * looking).backward()
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)
        nn.utils.clip_grad_norm_(masks, 1.0)
        optimizer.step()
        rows.append(
            {"step": step, "tokens": step * ids.numel(), "loss": nll.mean().item(), "attention_loss": float(looking)}
        )
        if step % 25 == 0:
            print(f"step {step:,}: loss {rows[-1]['loss']:.3f}, attention loss {float(looking):.3f}", flush=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return rows


def copying_batch(
    documents: list[TokenizedDocument], settings: CopyTeaching, vocabulary: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step's sequences: ids and sources, shape (batch, window), and which are random, shape (batch, 1)."""
    texts = [document.token_ids for document in documents if document.tokens > WINDOW]
    share = np.array([len(text) for text in texts]) / sum(len(text) for text in texts)
    batch, sources, random = [], [], []
    for number in range(settings.sequences_per_step):
        kind = settings.kinds[number % len(settings.kinds)]
        text = texts[generator.choice(len(texts), p=share)]
        start = int(generator.integers(0, len(text) - WINDOW))
        ids, source = text[start : start + WINDOW].astype(np.int64), np.full(WINDOW, -1)
        repeats = kind != "plain" and (
            settings.share_with_repeat == 1.0 or generator.random() < settings.share_with_repeat
        )
        if repeats:
            if kind == "random":
                ids = generator.integers(SPECIAL_TOKENS, vocabulary, WINDOW)
            if settings.repeat == "passage":
                ids, source = with_repeat(ids, generator)
            else:
                ids, source = with_excerpts(ids, generator, everywhere=settings.repeat == "excerpts everywhere")
        batch.append(ids)
        sources.append(source)
        random.append([repeats and kind == "random"])
    return torch.from_numpy(np.stack(batch)), torch.from_numpy(np.stack(sources)), torch.tensor(random)


def card(record: dict[str, Any], parameters: int) -> str:
    """The model card, in the hub's format."""
    columns = {
        "stage": lambda stage: stage["name"],
        "trained": lambda stage: stage["trained"],
        "steps": lambda stage: f"{len(stage['loss']):,}",
        "tokens": lambda stage: f"{stage['tokens'] / 1e6:.1f}M",
        "peak learning rate": lambda stage: f"{stage['settings']['learning_rate']}",
        "loss, first to last": lambda stage: f"{stage['loss'][0]:.2f} to {np.mean(stage['loss'][-50:]):.2f}",
        "minutes": lambda stage: f"{stage['seconds'] / 60:.0f}",
        "machine": lambda stage: f"{stage['device']}, {stage['arithmetic']}",
    }
    stages = record["stages"]
    rows = [
        columns,
        dict.fromkeys(columns, "---"),
        *({name: show(stage) for name, show in columns.items()} for stage in stages),
    ]
    table = "\n".join("| " + " | ".join(row if row is columns else row.values()) + " |" for row in rows)
    versions = ", ".join(f"{name} {number}" for name, number in stages[-1]["versions"].items())
    held_out = ", ".join(document["name"] for document in record["held_out"])
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny-llama

A `LlamaForCausalLM` of {parameters / 1e6:.1f}M parameters, trained from scratch for the notebooks of this repository:
4 layers, hidden 256, 4 heads of 64, vocabulary 2,048 (byte-level BPE of the same documents), untied embeddings,
window {WINDOW}, RoPE base 10,000. It is there to measure what happens past the window, not to write prose.

Data: {len(record["trained_on"])} public-domain documents (speeches, the King James Bible, Shakespeare),
{record["tokens_in_one_pass"] / 1e6:.1f}M tokens in one pass. Command: `make tiny-llama`. Versions: {versions}.

{table}

AdamW throughout. Losses are nats per token; the last is a mean of 50 steps, every step is in training.json. After
pretraining the model did not copy: a passage read a second time cost as much as the first time. The second stage trains
three heads only (a previous-token head and two induction heads), on sequences in which a passage of text or of random
tokens occurs twice, with a loss on where these heads look. The third trains everything on; a quarter of its sequences
hold a repeated passage of text. In the fourth, the second half of most sequences is excerpts from the first: now the model
continues a sentence that it has read, but takes every second half for excerpts. The fifth mends that: half of its sequences
are plain text, in the others excerpts stand anywhere. `make tiny-llama` computes every stage in fp32.

![Training loss of every step](loss.png)

Held out, never trained on: {held_out}.
"""


def draw_loss(stages: list[dict[str, Any]], path: Path) -> None:
    """The loss curves of the model card."""
    use_style()
    widths = [1 + len(stage["loss"]) / 500 for stage in stages]
    figure, panels = plt.subplots(1, len(stages), figsize=(9, 3), sharey=True, width_ratios=widths)
    for panel, stage in zip(panels, stages, strict=True):
        panel.plot(range(1, len(stage["loss"]) + 1), stage["loss"], linewidth=0.6)
        panel.set(title=stage["name"], xlabel="step")
    panels[0].set_ylabel("loss (nats per token)")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def run_stage(
    name: str,
    trained: str,
    settings: TrainingSettings | CopyTeaching,
    work: Callable[[LlamaForCausalLM], list[dict[str, float]]],
    model: LlamaForCausalLM,
    folder: Path,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Do one stage, or read what it left in `folder` if it was finished before."""
    result = folder / "stage.json"
    if not result.is_file():
        started = time.perf_counter()
        rows = work(model)
        model.save_pretrained(folder)
        stage = {
            "name": name,
            "trained": trained,
            "settings": asdict(settings),
            "tokens": rows[-1]["tokens"],
            "seconds": round(time.perf_counter() - started),
            "device": device_name(),
            "arithmetic": "fp32",
            "versions": library_versions(),
            "loss": [round(row["loss"], 4) for row in rows],
        }
        write_atomically(result, (json.dumps(stage) + "\n").encode())
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, json.loads(result.read_text())


def main(folder: Path = FOLDER, run_folder: Path = REPOSITORY / "runs" / "tiny-llama") -> None:
    """Train, or go on training, and write the model, its tokenizer and its card into `folder`."""
    documents = [document for name in CORPORA for document in load_documents(name)]
    training, held_out = split_documents(
        documents, HELD_OUT, minimum_characters=HELD_OUT_MINIMUM_CHARACTERS, seed=SPLIT_SEED
    )
    tokenizer = train_tokenizer(training)
    tokenized = tokenize_documents(training, tokenizer)

    def on_text(settings: TrainingSettings, share_with_repeat: float) -> Callable:
        def work(model: LlamaForCausalLM) -> list[dict[str, float]]:
            count = settings.steps * settings.sequences_per_step
            sequences = training_sequences(
                tokenized, WINDOW, count, padding_id=tokenizer.eos_token_id, seed=settings.seed
            )
            sequences = repeat_passages(sequences, share_with_repeat, seed=settings.seed)
            checkpoints = run_folder / run_fingerprint(settings, sequences, config=model.config.to_dict())
            model.model.compile()  # 1.25 times the tokens per second on 2 cores; needs a C++ compiler
            return train(model, sequences, settings, checkpoints, report_every=50)

        return work

    set_seed(PRETRAINING.seed)
    model = new_model(tokenizer)
    stages = []
    for name, trained, settings, work in (
        ("pretraining", "everything", PRETRAINING, on_text(PRETRAINING, 0.0)),
        ("copying", "three heads", TEACHING, lambda model: teach_copying(model, tokenized, TEACHING)),
        ("settling", "everything", SETTLING, on_text(SETTLING, SETTLING_SHARE_WITH_REPEAT)),
        ("quoting", "everything", QUOTING, lambda model: teach_copying(model, tokenized, QUOTING)),
        ("balancing", "everything", BALANCING, lambda model: teach_copying(model, tokenized, BALANCING)),
    ):
        model, stage = run_stage(name, trained, settings, work, model, run_folder / name)
        stages.append(stage)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "stages": stages,
        "tokens_in_one_pass": sum(document.tokens for document in tokenized),
        "trained_on": [{"source": document.source, "name": document.name} for document in training],
        "held_out": [{"source": document.source, "name": document.name} for document in held_out],
    }
    write_atomically(folder / "training.json", (json.dumps(record) + "\n").encode())
    write_atomically(folder / "README.md", card(record, parameters=model.num_parameters()).encode())
    draw_loss(stages, folder / "loss.png")


if __name__ == "__main__":
    main()
