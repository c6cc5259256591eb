import dataclasses

import pytest
from transformers import LlamaConfig

from conftest import LORA
from llama_long_utils import memory
from llama_long_utils.memory import COMPONENTS, HOST, StepShape, ledger

SHAPE = StepShape(length=2048, dtype="bfloat16", gradient_checkpointing=True)


def config(layers=2):
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=8192,
    )


def peak(shape, layers=2):
    found = ledger(config(layers), LORA, shape)
    return sum(found[name] for name in COMPONENTS)


def test_weights_are_four_bits_and_their_scales():
    found = ledger(config(), LORA, SHAPE)
    quantised = 2 * (4 * 512 * 512 + 3 * 512 * 1408)
    tables = 2 * 2048 * 512 * 2 + 5 * 512 * 2  # embeddings, head and norms in bf16
    assert found["weights"] == pytest.approx(quantised * 4.127 / 8 + tables, rel=0.01)


def test_adapters_are_fp32_and_the_optimizer_keeps_two_numbers_for_each():
    found = ledger(config(), LORA, SHAPE)
    rank = LORA.rank
    lora = 2 * rank * (4 * 1024 + 3 * (512 + 1408))
    norms = 5 * 512
    assert found["adapters"] == 4 * (lora + norms)
    assert found["optimizer"] == pytest.approx(2 * found["adapters"], rel=0.01)


def test_checkpoints_are_one_hidden_state_per_layer():
    saved = [ledger(config(layers), LORA, SHAPE)["saved"] for layers in (2, 4)]
    assert saved[1] - saved[0] == 2 * 2048 * 512 * 2


def test_every_technique_takes_less_memory():
    plain = dataclasses.replace(SHAPE, gradient_checkpointing=False)
    tiled = dataclasses.replace(SHAPE, tile=256)
    offloaded = dataclasses.replace(tiled, offload=True)
    peaks = [peak(shape, layers=4) for shape in (plain, SHAPE, tiled, offloaded)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] < 0.6 * peaks[0]
    assert ledger(config(4), LORA, offloaded)[HOST] >= 4 * 2048 * 512 * 2


def test_memory_grows_linearly_with_the_length():
    peaks = [peak(dataclasses.replace(SHAPE, length=length, tile=4096)) for length in (32_768, 65_536, 131_072)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.001)


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, tile=1024, offload=True)])
def test_layers_that_were_not_run_add_what_the_third_one_added(shape, monkeypatch):
    extrapolated = ledger(config(6), LORA, shape)
    monkeypatch.setattr(memory, "LAYERS_RUN", 6)
    assert extrapolated == ledger(config(6), LORA, shape)
