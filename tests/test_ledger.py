import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from conftest import LORA
from experiments import bench
from llama_long_utils.paths import RESULTS
from llama_long_utils.records import read_table
from llama_long_utils.settings import MemorySavings
from llama_long_utils.training.ledger import COMPONENTS, HOST, StepShape, StorageTracker, above_weights, ledger
from llama_long_utils.training.planner import GIB, model_shape

PLAIN = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")
CHECKPOINTED = replace(PLAIN, recomputed_layers=99)
SHAPE = StepShape(length=2048, dtype="bfloat16", memory_savings=CHECKPOINTED)


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
    shapes = [
        replace(SHAPE, memory_savings=memory_savings)
        for memory_savings in (PLAIN, half, CHECKPOINTED, tiled, offloaded)
    ]
    peaks = [peak(shape, layers=4) for shape in shapes]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.6 * peaks[0]
    assert ledger(config(4), LORA, shapes[-1])[HOST] >= 4 * 2048 * 512 * 2


def test_memory_grows_linearly_with_the_length():
    tiled = replace(SHAPE, memory_savings=replace(CHECKPOINTED, tile=4096))
    peaks = [peak(replace(tiled, length=length)) for length in (32_768, 65_536, 131_072)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.001)


@pytest.mark.parametrize(
    "memory_savings",
    [CHECKPOINTED, replace(CHECKPOINTED, tile=1024, offload_checkpoints=True), replace(PLAIN, recomputed_layers=3)],
)
def test_layers_that_were_not_run_add_what_the_second_one_added(memory_savings, monkeypatch):
    shape = replace(SHAPE, memory_savings=memory_savings)
    extrapolated = ledger(config(6), LORA, shape)
    monkeypatch.setattr("llama_long_utils.training.ledger.LAYERS_RUN", 6)
    assert extrapolated == ledger(config(6), LORA, shape)


def test_what_computes_little_is_counted_by_the_bytes_that_it_moves():
    tracker = StorageTracker()
    with FakeTensorMode(), tracker:
        one = torch.empty(512, 512)
        one.view(-1)[1:].t()
        one @ one
        assert tracker.moved == 0
        one @ one[:, :8]  # thin
        assert tracker.moved == pytest.approx(one.nbytes, rel=0.05)
        tracker.enter("saved")
        one + one.exp()
        assert tracker.moved == 5 * one.nbytes
        one.copy_(one.exp())
        assert tracker.moved == 9 * one.nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells how much a process held")
def test_a_real_step_needs_what_the_ledger_says():
    """With real tensors, in a process of its own, as far as the kernel can tell; the record holds more such steps."""
    task = {"kind": "peak", "model": "tiny", "length": 8192, "dtype": "float32"}
    task |= {"memory_savings": asdict(PLAIN), "layers": None}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "--worker", json.dumps(task)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.rpartition("RESULT ")[2])["peak_gib_above_weights"]
    found = ledger(model_shape("tiny"), bench.LORA, StepShape(8192, "float32", PLAIN))
    assert above_weights(found) / GIB == pytest.approx(measured, rel=0.05)


def test_recorded_peaks_are_within_5_percent_of_predicted_ones():
    rows = read_table(RESULTS / "tiny" / "04_one_gpu_budget.json", "ledger_check")
    assert len(rows) >= 8
    assert ((rows.predicted_gib / rows.measured_gib - 1).abs() < 0.05).all()
