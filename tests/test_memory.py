from dataclasses import replace

import pytest
from transformers import LlamaConfig

from conftest import LORA
from llama_long_utils import memory
from llama_long_utils.memory import COMPONENTS, HOST, StepShape, ledger
from llama_long_utils.training import Techniques

PLAIN = Techniques(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")
CHECKPOINTED = replace(PLAIN, recomputed_layers=99)
SHAPE = StepShape(length=2048, dtype="bfloat16", techniques=CHECKPOINTED)


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
    half = replace(PLAIN, recomputed_layers=2)
    tiled = replace(CHECKPOINTED, tile=256)
    offloaded = replace(tiled, offload_checkpoints=True)
    shapes = [replace(SHAPE, techniques=techniques) for techniques in (PLAIN, half, CHECKPOINTED, tiled, offloaded)]
    peaks = [peak(shape, layers=4) for shape in shapes]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.6 * peaks[0]
    assert ledger(config(4), LORA, shapes[-1])[HOST] >= 4 * 2048 * 512 * 2


def test_memory_grows_linearly_with_the_length():
    tiled = replace(SHAPE, techniques=replace(CHECKPOINTED, tile=4096))
    peaks = [peak(replace(tiled, length=length)) for length in (32_768, 65_536, 131_072)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.001)


@pytest.mark.parametrize(
    "techniques",
    [CHECKPOINTED, replace(CHECKPOINTED, tile=1024, offload_checkpoints=True), replace(PLAIN, recomputed_layers=5)],
)
def test_layers_that_were_not_run_add_what_the_third_one_added(techniques, monkeypatch):
    shape = replace(SHAPE, techniques=techniques)
    extrapolated = ledger(config(9), LORA, shape)
    monkeypatch.setattr(memory, "LAYERS_RUN", 9)
    assert extrapolated == ledger(config(9), LORA, shape)
