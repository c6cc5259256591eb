"""Trains data/tiny-llama, the Llama that every notebook uses by default: `make tiny-llama`.

A real LlamaForCausalLM of 4.3M parameters with Llama 2's proportions (untied embeddings, no grouped
queries, RoPE base 10,000) and a window of 512 tokens, so that 512 -> 4,096 is the paper's factor 8.
Interrupted, the command goes on from its last checkpoint.

Four stages, because a model that has read 18M tokens does not copy from its context (measured: a
passage read a second time costs as much as the first time), and one that does not copy gains nothing
from a longer context. Larger models grow induction heads by themselves (Olsson et al.,
arXiv:2209.11895); here stage 2 shows three heads where to look, stage 3 trains everything on, and
stage 4 reads text that quotes itself until the model continues a quotation.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

from llama_long_utils.cache import digest
from llama_long_utils.data.documents import Document, TokenizedDocument, split_documents, tokenize_documents
from llama_long_utils.data.packing import TrainingSequence, join_pieces, packed_pieces
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.data.sources import CORPORA, load_documents
from llama_long_utils.figures import use_style
from llama_long_utils.paths import REPOSITORY, write_atomically
from llama_long_utils.records import device_name, package_versions
from llama_long_utils.settings import IGNORED_LABEL, MemorySavings, TrainingSettings
from llama_long_utils.training.trainer import run_key, train

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
    memory_savings=MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused"),
    long_document_weight=1.0,
    self_quoting_share=0.0,
    checkpoint_every=200,
    seed=0,
)


@dataclass(frozen=True)
class CopyTeaching:
    """Stage 2. Heads are (layer, head); `attention_weight` scales the loss on their attention weights."""

    steps: int = 400
    sequences_per_step: int = 4
    learning_rate: float = 4e-3
    warmup_steps: int = 30
    previous_token_heads: tuple[tuple[int, int], ...] = ((1, 2),)
    induction_heads: tuple[tuple[int, int], ...] = ((2, 0), (3, 1))
    attention_weight: float = 0.5
    repeated_token_weight: float = 4.0
    share_with_repeat: float = 0.75
    seed: int = 1


TEACHING = CopyTeaching()
SETTLING = replace(PRETRAINING, steps=500, learning_rate=1.5e-3, warmup_steps=20, checkpoint_every=100, seed=2)
SETTLING_SHARE_WITH_REPEAT = 0.25
QUOTING = replace(SETTLING, steps=1200, self_quoting_share=0.6, seed=3)


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


@dataclass(frozen=True)
class Repeat:
    """Tokens first .. first + length - 1 of a sequence stand again at again .. again + length - 1."""

    first: int
    again: int
    length: int


def with_repeat(ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, Repeat]:
    """Let a passage of 8 tokens up to half a window occur twice in a sequence, at random places."""
    window = len(ids)
    length = int(generator.integers(8, window // 2))
    again = int(generator.integers(length + 1, window - length + 1))
    first = int(generator.integers(1, again - length + 1))
    ids = ids.copy()
    ids[again : again + length] = ids[first : first + length]
    return ids, Repeat(first, again, length)


def repeat_passages(sequences: list[TrainingSequence], share: float, *, seed: int) -> list[TrainingSequence]:
    """Put a repeated passage into a share of the sequences that hold a single piece."""
    generator = np.random.default_rng(seed)
    changed = []
    for sequence in sequences:
        if sequence.contiguous and generator.random() < share:
            ids, _repeat = with_repeat(sequence.input_ids, generator)
            labels = np.where(sequence.labels == IGNORED_LABEL, IGNORED_LABEL, ids)
            sequence = replace(sequence, input_ids=ids, labels=labels)
        changed.append(sequence)
    return changed


def attention_loss(
    attentions: Sequence[torch.Tensor], repeats: list[Repeat | None], settings: CopyTeaching
) -> torch.Tensor:
    """-log of the attention that the taught heads pay to where they should look, mean over heads, in nats.

    Previous-token heads should look one token back; induction heads, in the second reading of a
    passage, at the token that followed the current one in the first reading.

    Args:
        attentions: per layer, shape (batch, heads, length, length).
        repeats: per sequence; None where nothing is repeated.
    """

    def cost(layer: int, head: int, sequence: slice | int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return -(attentions[layer][sequence, head, query, key] + 1e-6).log().mean()

    every = torch.arange(1, attentions[0].shape[-1])
    previous = [cost(layer, head, slice(None), every, every - 1) for layer, head in settings.previous_token_heads]
    induction = []
    for row, repeat in enumerate(repeats):
        if repeat:
            query = torch.arange(repeat.again, repeat.again + repeat.length)
            key = query - (repeat.again - repeat.first) + 1
            induction += [cost(layer, head, row, query, key) for layer, head in settings.induction_heads]
    return torch.stack(previous).mean() + (torch.stack(induction).mean() if induction else 0.0)


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
    """Train only the taught heads, in place, on sequences with a repeated passage of text or random tokens.

    Returns one row per step: step, tokens, loss (nats), attention_loss (nats).
    """
    generator = np.random.default_rng(settings.seed)
    model.set_attn_implementation("eager")  # the one that gives out its attention weights
    masks = head_masks(model, settings.previous_token_heads + settings.induction_heads)
    for weight in model.parameters():
        weight.requires_grad_(weight in masks)
    optimizer = torch.optim.AdamW(masks, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    texts = [document.token_ids for document in documents if document.tokens > WINDOW]
    share = np.array([len(text) for text in texts]) / sum(len(text) for text in texts)
    rows = []
    for step in range(1, settings.steps + 1):
        batch, repeats = [], []
        for number in range(settings.sequences_per_step):
            text = texts[generator.choice(len(texts), p=share)]
            start = int(generator.integers(0, len(text) - WINDOW))
            ids, repeat = text[start : start + WINDOW].astype(np.int64), None
            if generator.random() < settings.share_with_repeat:
                if number % 2:
                    ids = generator.integers(SPECIAL_TOKENS, model.config.vocab_size, WINDOW)
                ids, repeat = with_repeat(ids, generator)
            batch.append(torch.from_numpy(ids))
            repeats.append(repeat)
        ids = torch.stack(batch)
        output = model(input_ids=ids, output_attentions=True, use_cache=False)
        nll = nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1)
        weight = torch.ones_like(nll)
        for row, repeat in enumerate(repeats):
            if repeat:
                weight[row, repeat.again : repeat.again + repeat.length - 1] = settings.repeated_token_weight
        looking = attention_loss(output.attentions, repeats, settings)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, step / settings.warmup_steps)
        optimizer.zero_grad()
        ((nll * weight).sum() / weight.sum() + settings.attention_weight * looking).backward()
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)
        nn.utils.clip_grad_norm_(masks, 1.0)
        optimizer.step()
        rows.append(
            {"step": step, "tokens": step * ids.numel(), "loss": nll.mean().item(), "attention_loss": looking.item()}
        )
        if step % 25 == 0:
            print(f"step {step:,}: loss {rows[-1]['loss']:.3f}, attention loss {looking.item():.3f}", flush=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return rows


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
hold a repeated passage of text. In the fourth, {QUOTING.self_quoting_share:.0%} of the sequences quote themselves: half
of their stretches are excerpts of 12 to 64 tokens from what stands before them. `make tiny-llama` computes every
stage in fp32; the fourth stage of these weights began from the third's rounded to bf16.

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
            "versions": package_versions(),
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

    def on_text(settings: TrainingSettings) -> list[TrainingSequence]:
        count, passes = settings.steps * settings.sequences_per_step, itertools.repeat(tokenized)
        packed = itertools.islice(packed_pieces(passes, WINDOW, seed=settings.seed), count)
        return [join_pieces(pieces, WINDOW, tokenizer.eos_token_id) for pieces in packed]

    def on_sequences(settings: TrainingSettings, draw: Callable[[], list[TrainingSequence]]) -> Callable:
        def work(model: LlamaForCausalLM) -> list[dict[str, float]]:
            sequences = draw()
            data = digest([(sequence.input_ids, sequence.labels, sequence.position_ids) for sequence in sequences])
            checkpoints = run_folder / digest(run_key(settings, data, config=model.config.to_dict()))
            model.model.compile()  # 1.25 times the tokens per second on 2 cores; needs a C++ compiler
            return train(model, sequences, settings, checkpoints, report_every=50)

        return work

    def settling_sequences() -> list[TrainingSequence]:
        return repeat_passages(on_text(SETTLING), SETTLING_SHARE_WITH_REPEAT, seed=SETTLING.seed)

    set_seed(PRETRAINING.seed)
    model = new_model(tokenizer)
    stages = []
    for name, trained, settings, work in (
        ("pretraining", "everything", PRETRAINING, on_sequences(PRETRAINING, lambda: on_text(PRETRAINING))),
        ("copying", "three heads", TEACHING, lambda model: teach_copying(model, tokenized, TEACHING)),
        ("settling", "everything", SETTLING, on_sequences(SETTLING, settling_sequences)),
        (
            "quoting",
            "everything",
            QUOTING,
            on_sequences(QUOTING, lambda: list(TrainingData(tokenized, QUOTING, tokenizer))),
        ),
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
