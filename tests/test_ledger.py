import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, Qwen3Config

from conftest import LORA
from experiments import bench
from llama_long_utils.model.loss import hidden_states
from llama_long_utils.model.memory_savings import apply_memory_savings
from llama_long_utils.paths import REPOSITORY, RESULTS
from llama_long_utils.records import Record
from llama_long_utils.settings import Lora, MemorySavings
from llama_long_utils.training import ledger as ledger_module
from llama_long_utils.training.ledger import (
    COLUMNS,
    COMPONENTS,
    HOST,
    ON_DEVICE,
    StepShape,
    StorageTracker,
    _CountedOffload,
    attention_workspace,
    ledger,
    random_llama,
    reading,
    training_steps,
)
from llama_long_utils.training.planner import GIB, leanest, model_shape, predict

PLAIN = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")
CHECKPOINTED = replace(PLAIN, recomputed_layers=99)
SHAPE = StepShape(length=2048, dtype="bfloat16", memory_savings=CHECKPOINTED)


@pytest.fixture(autouse=True, scope="module")
def nothing_kept_before(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "CACHE", tmp_path_factory.mktemp("cache"))
        ledger_module._kept_trace.cache_clear()
        yield


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
    tiled = replace(CHECKPOINTED, tile=512)
    offloaded = replace(tiled, offload_checkpoints=True)
    shapes = [
        replace(SHAPE, memory_savings=memory_savings)
        for memory_savings in (PLAIN, half, CHECKPOINTED, tiled, offloaded)
    ]
    peaks = [peak(shape, layers=4) for shape in shapes]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < 0.6 * peaks[0]
    assert ledger(config(4), LORA, shapes[-1])[HOST] >= 4 * 2048 * 512 * 2


def run_whole(config, shape):
    """The peak by component, and bytes on the host, of a step of all layers at its whole length, nothing derived."""
    tracker = StorageTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        options = {"packed": shape.packed, "context": shape.context}
        options["made"] = lambda tensor, component, _name: tracker.add(tensor, component)
        model = random_llama(config, LORA, shape.dtype, **options)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: tracker.add(weight.grad, "gradients"))
        with tracker:
            offloading = _CountedOffload(config.hidden_size, tracker)
            lengths = [16, shape.length]
            list(training_steps(model, shape, lengths, entering=tracker.enter, offloading=offloading))
            tracker.begin("end")
    moments = np.array([counts for segment in tracker.segments.values() for counts in segment], dtype=float)
    highest = moments[(moments @ ON_DEVICE).argmax()]
    counts = dict(zip(COLUMNS, highest.tolist(), strict=True))
    return {name: counts[name] for name in COMPONENTS}, moments[:, COLUMNS.index(HOST)].max()


@pytest.mark.parametrize(
    ("memory_savings", "other"),
    [
        (CHECKPOINTED, {"sequences": 3}),
        (replace(CHECKPOINTED, tile=1024, offload_checkpoints=True), {"packed": True}),
        (replace(PLAIN, recomputed_layers=3, tile=1024), {"context": 2}),
        (replace(PLAIN, recomputed_layers=2, optimizer="paged_adamw_8bit"), {}),
    ],
)
def test_three_layers_at_two_short_lengths_give_the_peak_of_any_step(memory_savings, other):
    shape = replace(SHAPE, length=4096, memory_savings=memory_savings, **other)
    derived = ledger(config(4), LORA, shape)
    whole, host = run_whole(config(4), shape)
    assert sum(whole.values()) == pytest.approx(sum(derived[name] for name in COMPONENTS), rel=1e-3)
    assert derived[HOST] == pytest.approx(host, rel=1e-6)


def test_of_tiles_and_of_the_loss_chunks_those_after_the_third_change_no_byte(monkeypatch):
    savings = replace(CHECKPOINTED, tile=256, offload_checkpoints=True)
    shape = replace(SHAPE, length=1024, sequences=2, memory_savings=savings, packed=True, gpu=True)  # 8 tiles, 4 chunks
    few = ledger(config(4), LORA, shape)
    monkeypatch.setattr(ledger_module, "ALIKE", 1000)
    ledger_module._kept_trace.cache_clear()
    monkeypatch.setattr(ledger_module, "VERSION", "all parts")
    assert ledger(config(4), LORA, shape) == few


def test_from_where_the_peak_stays_at_a_moment_bytes_are_a_line_in_the_number_of_sequences():
    shape = replace(SHAPE, length=512, memory_savings=replace(CHECKPOINTED, tile=256))
    few, one_more, many = (ledger(config(), LORA, replace(shape, sequences=count)) for count in (16, 17, 64))
    assert {name: few[name] + 48 * (one_more[name] - few[name]) for name in few} == many


def test_a_sequence_that_is_shared_is_counted_where_its_chunks_are_as_long_as_hidden_states_are_wide():
    offloaded = replace(CHECKPOINTED, tile=1024, offload_checkpoints=True)
    found = ledger(config(4), LORA, replace(SHAPE, length=4096, context=2, memory_savings=offloaded))
    assert found[HOST] == pytest.approx((4 + 1 + 2 * 2) * 4096 * 512 * 2, rel=0.01)


@pytest.mark.parametrize(("hidden", "tiles"), [(1024, 0), (2048, 4), (1088, 17)])
def test_models_as_wide_as_a_run_is_long_have_a_peak_too(hidden, tiles):
    """Offloading knows a hidden state by its shape, (batch, length, hidden): a run must not be that long.

    Runs have 1,024 and 2,048 tokens, those of 17 tiles 1,088 and 2,176.
    """
    wide = LlamaConfig(**{**config(4).to_dict(), "hidden_size": hidden, "head_dim": hidden // 8})
    savings = replace(CHECKPOINTED, tile=8192 // tiles if tiles else 0, offload_checkpoints=True)
    found = ledger(wide, LORA, replace(SHAPE, length=8192, memory_savings=savings))
    # One for each layer; of the last norm, one in bf16 and two in fp32.
    assert found[HOST] == pytest.approx((4 + 1 + 2 * 2) * 8192 * hidden * 2, rel=0.01)


def test_a_first_layer_that_is_plain_counts_at_most_two_hidden_states_too_much():
    shape = replace(SHAPE, length=4096, memory_savings=PLAIN)
    whole, _host = run_whole(config(5), shape)
    more = peak(shape, layers=5) - sum(whole.values())
    assert 0 <= more <= 1.01 * 2 * 4096 * 512 * 2


PEAKS = """
import json, sys
from experiments.bench import measured_peak

task = json.loads(sys.argv[1])
print(json.dumps([measured_peak(**task, packed=packed)["peak_gib_above_weights"] for packed in (False, True)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells how much a process held")
@pytest.mark.parametrize("model", ["tiny", "qwen3"])
def test_a_real_step_needs_what_the_ledger_says(tmp_path, model):
    """With real tensors, in a process of its own, as far as the kernel can tell; the record holds more such steps."""
    if model == "qwen3":  # whose heads have norms of their own
        model, heads = str(tmp_path), {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048}
        Qwen3Config(**shape, **heads).save_pretrained(model)
    task = {"model": model, "length": 2048, "dtype": "float32", "memory_savings": asdict(PLAIN), "layers": None}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-c", PEAKS, json.dumps(task)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    for packed, measured in zip((False, True), json.loads(done.stdout.splitlines()[-1]), strict=True):
        found = ledger(model_shape(model), bench.LORA, StepShape(2048, "float32", PLAIN, packed=packed))
        assert bench.above_weights(found) / GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_to_read_a_text_takes_what_is_predicted_and_less_than_without_tiles(dtype, monkeypatch):
    """By every allocation of real tensors."""
    needed = {}
    for tile in (0, 512):
        monkeypatch.setattr(ledger_module, "READING", replace(PLAIN, tile=tile))
        empty, needed[tile] = (reading(config(5), LORA, dtype, tokens) for tokens in (1, 2048))
    model = random_llama(config(5), LORA, dtype).eval()
    apply_memory_savings(model, replace(PLAIN, tile=512))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        hidden_states(model, torch.zeros((1, 2048), dtype=torch.long))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert needed[512] - empty == pytest.approx(allocated.max(), rel=0.03)
    assert needed[512] - empty < 0.85 * (needed[0] - empty)
    keys = 2 * 5 * 512 * 2048 * getattr(torch, dtype).itemsize
    assert reading(config(5), LORA, dtype, 2048, kept=True) == needed[512] + keys


def test_recorded_peaks_are_within_5_percent_of_predicted_ones():
    rows = Record(RESULTS / "tiny" / "04_one_gpu_budget.json").table("ledger_check")
    assert len(rows) >= 8
    assert ((rows.predicted_gib / rows.measured_gib - 1).abs() < 0.05).all()


def test_attention_needs_on_a_gpu_what_its_kernels_were_measured_to_need():
    """cuDNN: three gradients and the workspace. FlashAttention copied the output's gradient besides, 2 bytes each."""
    rows = Record(RESULTS / "gpu" / "04_one_gpu_budget.json").table("attention")
    assert set(rows.kernel) == {"torch's choice", "flash", "cudnn"}
    for row in rows.itertuples():
        query, key = (torch.empty(1, heads, 1, 128) for heads in (row.query_heads, row.key_value_heads))
        expected = 2 * query.numel() + 4 * key.numel() + attention_workspace(query, key)
        expected += 2 * query.numel() * (row.kernel == "flash")
        assert row.peak_bytes_per_token == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("model", "rank"), [("Llama 2 7B", 16), ("Llama 3.1 8B", 32)])
def test_steps_on_a_gpu_need_what_was_measured_there_less_the_gradient_that_the_loss_then_kept(model, rank):
    rows = Record(RESULTS / "gpu" / "04_one_gpu_budget.json").table("steps")
    rows = rows[(rows.model == model) & (rows.host_gib > 0)]
    assert len(rows) >= 3
    lora = Lora(rank, 2 * rank, bench.MODULES, train_norms=False, train_embeddings=False)
    for row in rows.itertuples():
        lean = leanest(model_shape(model), row.context, PLAIN)
        shape = StepShape(row.context, "bfloat16", lean, gpu=True)
        kept = 2 * row.context * model_shape(model).hidden_size
        now = predict(model_shape(model), lora, shape).device_gib
        assert now + kept / GIB == pytest.approx(row.allocated_gib, rel=0.03)
        assert now + kept / GIB == pytest.approx(row.predicted_gib, rel=0.005)
    assert predict(model_shape(model), lora, replace(shape, gpu=False)).device_gib <= now  # of the last one
