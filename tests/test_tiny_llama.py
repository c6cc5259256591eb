import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import new_llama, training_sequences
from experiments.tiny_llama import (
    FOLDER,
    PRETRAINING,
    QUOTING,
    SETTLING,
    TEACHING,
    CopyTeaching,
    Repeat,
    attention_loss,
    head_masks,
    repeat_passages,
    with_repeat,
)
from llama_long_utils.data.documents import TokenizedDocument, split_documents, tokenize_documents
from llama_long_utils.data.sources import load_documents
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.adapters import read_card
from llama_long_utils.model.loss import hidden_states, next_token_nll
from llama_long_utils.model.weights import load_tokenizer, weights_sha256
from llama_long_utils.paths import ADAPTERS
from llama_long_utils.presets import load_preset

CARD = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def split():
    data = load_preset("tiny").data
    texts = [document for name in data.sources for document in load_documents(name)]
    options = {"minimum_characters": data.minimum_characters, "seed": data.split_seed}
    return split_documents(texts, data.held_out, **options)


def test_it_is_a_small_llama_2():
    config = AutoConfig.from_pretrained(FOLDER)
    assert (config.model_type, config.max_position_embeddings) == ("llama", 512)
    assert config.rope_parameters["rope_theta"] == 10_000
    assert config.vocab_size == len(load_tokenizer(FOLDER)) == 2048
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
    rows = tokenize_documents(split[1], load_tokenizer(FOLDER))
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
    steps = {stage["name"]: len(stage["loss"]) for stage in CARD["stages"]}
    settings = {"pretraining": PRETRAINING, "copying": TEACHING, "settling": SETTLING, "quoting": QUOTING}
    assert steps == {name: stage.steps for name, stage in settings.items()}
    losses = CARD["stages"][0]["loss"]
    assert np.mean(losses[-50:]) < 0.6 * losses[0]
    assert CARD["stages"][0]["tokens"] > 15_000_000


def test_a_repeat_copies_tokens_and_keeps_the_rest():
    ids = np.arange(512)
    for seed in range(50):
        changed, repeat = with_repeat(ids, np.random.default_rng(seed))
        again = slice(repeat.again, repeat.again + repeat.length)
        assert (changed[again] == ids[repeat.first : repeat.first + repeat.length]).all()
        changed[again] = ids[again]
        assert (changed == ids).all()


def test_repeats_go_into_their_share_of_whole_sequences_only():
    generator = np.random.default_rng(0)
    texts = [TokenizedDocument("a", "a", generator.integers(2, 2000, 70_000).astype(np.int32))]
    sequences = training_sequences(texts, 512, 120, padding_id=1, seed=0)
    changed = repeat_passages(sequences, 0.25, seed=0)
    differs = [bool((a.input_ids != b.input_ids).any()) for a, b in zip(sequences, changed, strict=True)]
    assert 0.1 < np.mean(differs) < 0.4
    for before, after, differ in zip(sequences, changed, differs, strict=True):
        assert (after.labels[1:] == after.input_ids[1:]).all() or not differ
        assert before.contiguous or not differ


def test_attention_loss_is_zero_where_heads_look_right():
    settings = CopyTeaching(previous_token_heads=((0, 0),), induction_heads=((0, 1),))
    repeat = Repeat(first=2, again=8, length=3)
    attention = torch.zeros(1, 2, 12, 12)
    attention[0, 0, torch.arange(1, 12), torch.arange(0, 11)] = 1.0
    attention[0, 1, [8, 9, 10], [3, 4, 5]] = 1.0  # the tokens that followed in the first reading
    assert attention_loss([attention], [repeat], settings).item() == pytest.approx(0, abs=1e-5)
    attention[0, 1] = 0.5
    assert attention_loss([attention], [repeat], settings).item() == pytest.approx(np.log(2), abs=1e-4)


def test_only_the_taught_heads_are_trained():
    model = new_llama(seed=0)
    masks = head_masks(model, [(0, 1)])
    assert {id(weight) for weight in masks} == {
        id(getattr(model.model.layers[0].self_attn, name).weight) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert all(mask.sum() == 32 * 64 for mask in masks.values())


def test_it_was_trained_not_drawn(split):
    row = tokenize_documents(split[1][:1], load_tokenizer(FOLDER))[0]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert token_nll(model, row, 512).mean() < 4.0  # a uniform guess costs log(2048) = 7.6


def test_it_copies(split):
    tokenizer = load_tokenizer(FOLDER)
    rows = tokenize_documents(split[1], tokenizer)
    once = np.stack([row.token_ids[1000:1200] for row in rows if row.tokens > 2000])
    twice = torch.from_numpy(np.concatenate([once, once], axis=1)).long()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        nll = next_token_nll(hidden_states(model, twice), model.lm_head, twice, reduction="none")
    assert nll[:, 220:].mean() < nll[:, 20:200].mean() - 1.5


def test_shipped_adapter_belongs_to_it():
    card = read_card(ADAPTERS / "tiny")
    preset = load_preset("tiny")
    assert card.base_sha256 == weights_sha256(FOLDER)
    assert card.rope == preset.extended_rope
