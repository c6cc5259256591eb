import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from llama_long_utils import documents, models
from llama_long_utils.perplexity import token_nll
from llama_long_utils.presets import load_preset
from llama_long_utils.tiny_llama import FOLDER, SETTINGS

CARD = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def split():
    data = load_preset("tiny").data
    texts = [document for name in data.sources for document in documents.load_documents(name)]
    options = {"minimum_characters": data.minimum_characters, "seed": data.split_seed}
    return documents.split_documents(texts, data.held_out, **options)


def test_it_is_a_small_llama_2():
    config = AutoConfig.from_pretrained(FOLDER)
    assert (config.model_type, config.max_position_embeddings) == ("llama", 512)
    assert config.rope_parameters["rope_theta"] == 10_000
    assert config.vocab_size == len(models.load_tokenizer(FOLDER)) == 2048
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 10 * 2**20
    with safe_open(weights, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_presets_describe_the_model_they_load():
    preset = load_preset("tiny")
    config = AutoConfig.from_pretrained(FOLDER)
    assert preset.base.head_dim == config.head_dim
    assert preset.base.window == config.max_position_embeddings
    assert preset.base.rope_base == config.rope_parameters["rope_theta"]


def test_nothing_held_out_was_trained_on(split):
    training, held_out = split
    trained = {(document["source"], document["name"]) for document in CARD["trained_on"]}
    assert trained == {(document.source, document.name) for document in training}
    assert not trained & {(document.source, document.name) for document in held_out}


def test_enough_long_documents_are_held_out(split):
    rows = documents.tokenize_documents(split[1], models.load_tokenizer(FOLDER))
    lengths = sorted(row.tokens for row in rows)
    assert sum(length >= 4096 for length in lengths) >= 12
    assert sum(length >= 16_384 for length in lengths) >= 5


def test_held_out_documents_share_no_text_with_training(split):
    def word_runs(text, length=13):
        words = text.lower().split()
        return {hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1)}

    training, held_out = split
    seen = set().union(*(word_runs(document.text) for document in training))
    for document in held_out:
        runs = word_runs(document.text)
        assert len(runs & seen) / len(runs) < 0.05, document.name


def test_every_step_s_loss_is_recorded():
    losses = CARD["loss"]
    assert len(losses) == SETTINGS.steps
    assert np.mean(losses[-50:]) < 0.6 * losses[0]
    assert CARD["tokens"] > 15_000_000


def test_it_was_trained_not_drawn(split):
    row = documents.tokenize_documents(split[1][:1], models.load_tokenizer(FOLDER))[0]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    assert token_nll(model, row, 512).mean() < 4.5  # a uniform guess costs log(2048) = 7.6


def test_shipped_adapter_belongs_to_it():
    card = models.read_card(models.ADAPTERS / "tiny")
    preset = load_preset("tiny")
    assert card.base_sha256 == models.weights_sha256(FOLDER)
    assert (card.rope_base, card.window) == (preset.extension.rope_base, preset.extension.window)
