"""Trains data/tiny-llama, the Llama that every notebook uses by default: `make tiny-llama`.

A real LlamaForCausalLM of 4.3M parameters with Llama 2's proportions (untied embeddings, no grouped
queries, RoPE base 10,000) and a window of 512 tokens, so that 512 -> 4,096 is the paper's factor 8.
Interrupted, the command goes on from its last checkpoint.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

from llama_long_utils.documents import (
    CORPORA,
    REPOSITORY,
    Document,
    load_documents,
    split_documents,
    tokenize_documents,
)
from llama_long_utils.figures import use_style
from llama_long_utils.models import library_versions
from llama_long_utils.packing import training_sequences
from llama_long_utils.records import device_name, write_atomically
from llama_long_utils.training import TrainingSettings, run_fingerprint, train

FOLDER = REPOSITORY / "data" / "tiny-llama"
HELD_OUT = {"sotu": 18, "shakespeare": 6}
HELD_OUT_MINIMUM_CHARACTERS = 30_000
SPLIT_SEED = 0
VOCABULARY = 2048

SETTINGS = TrainingSettings(
    window=512,
    steps=2200,
    sequences_per_step=16,
    sequences_at_once=16,
    learning_rate=3e-3,
    warmup_steps=100,
    weight_decay=0.1,
    gradient_clipping=1.0,
    gradient_checkpointing=False,
    long_document_weight=1.0,
    checkpoint_every=200,
    seed=0,
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
        max_position_embeddings=SETTINGS.window,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Measured on 2 cores at 512 tokens: forward and backward of `eager` take half of `sdpa`'s time.
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def card(record: dict[str, Any], parameters: int) -> str:
    """The model card, in the hub's format."""
    losses = record["loss"]
    table = {
        "data": f"{len(record['trained_on'])} public-domain documents: speeches, the King James Bible, Shakespeare",
        "tokens": f"{record['tokens'] / 1e6:.1f}M, in passes over {record['tokens_in_one_pass'] / 1e6:.1f}M",
        "optimizer": f"AdamW, peak learning rate {SETTINGS.learning_rate}, warm-up and cosine, weight decay 0.1",
        "batches": f"{SETTINGS.steps} steps of {SETTINGS.sequences_per_step} sequences of {SETTINGS.window} tokens",
        "first loss": f"{losses[0]:.2f} nats per token",
        "last loss": f"{sum(losses[-50:]) / 50:.2f} nats per token, mean of 50 steps (every step: training.json)",
        "time": f"{record['seconds'] / 60:.0f} minutes on {record['device']}",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        "command": "`make tiny-llama`",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    held_out = ", ".join(document["name"] for document in record["held_out"])
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny-llama

A `LlamaForCausalLM` of {parameters / 1e6:.1f}M parameters, trained from scratch for the notebooks of this repository:
4 layers, hidden 256, 4 heads of 64, vocabulary 2,048 (byte-level BPE of the same documents), untied embeddings,
window {SETTINGS.window}, RoPE base 10,000. It is there to measure what happens past the window, not to write prose.

| | |
|---|---|
{rows}

![Training loss of every step](loss.png)

Held out, never trained on: {held_out}.
"""


def draw_loss(losses: list[float], path: Path) -> None:
    """The loss curve of the model card."""
    use_style()
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.6)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def main(folder: Path = FOLDER, run_folder: Path = REPOSITORY / "runs" / "tiny-llama") -> None:
    """Train, or go on training, and write the model, its tokenizer and its card into `folder`."""
    documents = [document for name in CORPORA for document in load_documents(name)]
    training, held_out = split_documents(
        documents, HELD_OUT, minimum_characters=HELD_OUT_MINIMUM_CHARACTERS, seed=SPLIT_SEED
    )
    tokenizer = train_tokenizer(training)
    tokenized = tokenize_documents(training, tokenizer)
    sequences = training_sequences(
        tokenized,
        SETTINGS.window,
        SETTINGS.steps * SETTINGS.sequences_per_step,
        padding_id=tokenizer.eos_token_id,
        seed=SETTINGS.seed,
    )
    set_seed(SETTINGS.seed)
    model = new_model(tokenizer)
    run_folder /= run_fingerprint(SETTINGS, sequences, config=model.config.to_dict())
    model.model.compile()  # 1.25 times the tokens per second on 2 cores; needs a C++ compiler
    rows = train(model, sequences, SETTINGS, run_folder)
    per_step = np.diff([0, *(row["tokens"] for row in rows)])
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "settings": asdict(SETTINGS),
        "tokens": rows[-1]["tokens"],
        "tokens_in_one_pass": sum(document.tokens for document in tokenized),
        "seconds": round(sum(step / row["tokens_per_second"] for step, row in zip(per_step, rows, strict=True))),
        "device": device_name(),
        "versions": library_versions(),
        "loss": [round(row["loss"], 4) for row in rows],
        "trained_on": [{"source": document.source, "name": document.name} for document in training],
        "held_out": [{"source": document.source, "name": document.name} for document in held_out],
    }
    write_atomically(folder / "training.json", (json.dumps(record) + "\n").encode())
    write_atomically(folder / "README.md", card(record, parameters=model.num_parameters()).encode())
    draw_loss(record["loss"], folder / "loss.png")


if __name__ == "__main__":
    main()
