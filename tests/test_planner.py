import re
import time
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

from conftest import LORA
from experiments.roofline import MovedBytes, Rates, step_seconds
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.loss import hidden_states
from llama_long_utils.model.memory_savings import apply_memory_savings
from llama_long_utils.paths import REPOSITORY, RESULTS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record
from llama_long_utils.settings import MemorySavings
from llama_long_utils.training import ledger as ledger_module
from llama_long_utils.training.ledger import StepShape, ledger
from llama_long_utils.training.planner import (
    GIB,
    TILED,
    USABLE,
    model_shape,
    plan,
    plan_training,
    predict,
    step_flops,
    tile_for,
    unreadable,
)
from llama_long_utils.training.random_llama import random_llama

NOTHING = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")
SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8192,
)
SHALLOW = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 2})  # the planner asks for many ledgers


def eager_llama() -> LlamaForCausalLM:
    """torch's counter knows matrix products, but not the CPU's fused attention."""
    model = LlamaForCausalLM(SMALL)
    model.set_attn_implementation("eager")
    return model


def test_torch_counts_the_same_operations_on_frozen_weights():
    frozen = eager_llama().requires_grad_(False)
    embedded = torch.randn(1, 256, 128, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        frozen(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    flops = step_flops(SMALL, LORA, 256, NOTHING)
    # Unfused, attention has the whole square, and its backward pass four products: it need not compute one again.
    attention = 2 * flops["attention"] * 6 // 7
    assert counter.get_total_flops() == flops["linear"] + flops["head"] + attention


class Operations(TorchDispatchMode):
    """As `FlopCounterMode`, which does not follow a backward pass inside another one."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if function._overloadpacket in flop_registry:
            self.count += flop_registry[function._overloadpacket](*arguments, **(options or {}), out_val=output)
        return output


@pytest.mark.parametrize(("recomputed", "tile"), [(4, 0), (2, 0), (0, 64), (2, 64)])
def test_recomputed_products_are_those_that_torch_does_again(recomputed, tile):
    memory_savings = replace(NOTHING, recomputed_layers=recomputed, tile=tile)
    seen, ours = [], []
    for ways in (NOTHING, memory_savings):
        model = add_lora(eager_llama(), LORA, seed=0).train()
        apply_memory_savings(model, ways)
        with Operations() as operations:
            hidden_states(model, torch.zeros(1, 256, dtype=torch.long)).sum().backward()
        seen.append(operations.count)
        flops = step_flops(SMALL, LORA, 256, ways)
        ours.append(flops["linear"] + flops["adapters"] + 2 * flops["attention"])  # the whole square
    assert seen[1] - seen[0] == pytest.approx(ours[1] - ours[0], rel=0.01)


def test_attention_takes_over_at_twelve_hidden_sizes_of_the_papers_model():
    classic = LlamaConfig(hidden_size=512, intermediate_size=512 * 8 // 3, num_attention_heads=8, vocab_size=128)
    passes = {"linear": 3, "attention": 4.5}  # with every layer recomputed
    flops = step_flops(classic, LORA, 12 * 512, replace(NOTHING, recomputed_layers=1000))
    one, other = (flops[name] / times for name, times in passes.items())
    assert one == pytest.approx(other, rel=0.001)


@pytest.fixture(autouse=True, scope="module")
def nothing_kept_before(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "CACHE", tmp_path_factory.mktemp("cache"))
        ledger_module._kept_trace.cache_clear()
        yield


def test_the_planner_recomputes_nothing_if_it_need_not():
    assert plan(SHALLOW, LORA, StepShape(1024, "float32", NOTHING), 40.0).memory_savings == NOTHING


def test_with_less_memory_the_plan_needs_more_time_and_still_fits():
    shape = StepShape(1024, "float32", NOTHING)
    most, least = (predict(SHALLOW, LORA, shape, recomputed).device_gib for recomputed in (0, 2))
    rooms = [most * 1.01, (most + least) / 2, least * 1.01]
    plans = [plan(SHALLOW, LORA, StepShape(1024, "float32", NOTHING), room / USABLE) for room in rooms]
    for room, chosen in zip(rooms, plans, strict=True):
        assert chosen.device_gib <= room
    assert plans[0].memory_savings == NOTHING
    seconds = [chosen.flops * (TILED if chosen.memory_savings.tile else 1) for chosen in plans]
    assert seconds[0] < seconds[1] <= seconds[2]


def test_whole_layers_are_recomputed_rather_than_tiles_taken_where_that_is_quicker(monkeypatch):
    shape, seven = StepShape(32_768, "bfloat16", NOTHING, gpu=True), model_shape("Llama 2 7B")
    assert plan(seven, LORA, shape, 24.0).memory_savings.tile == 0
    monkeypatch.setattr("llama_long_utils.training.planner.TILED", 1.0)
    assert plan(seven, LORA, shape, 24.0).memory_savings.tile > 0


def test_tiles_cost_the_time_that_was_measured_on_a_gpu():
    steps = Record(RESULTS / "gpu" / "04_one_gpu_budget.json").table("steps")
    steps = steps[(steps.model == "Llama 2 7B") & (steps.context == 32_768)].set_index("plan").share_of_bf16_peak
    tiled = steps["29 layers recomputed, tiles of 2,048 tokens"]
    assert round(steps["10 layers recomputed"] / tiled, 2) == TILED


def test_savings_come_in_the_order_of_what_they_cost():
    tiled = replace(NOTHING, recomputed_layers=4, tile=tile_for(2048))
    lean = replace(tiled, offload_checkpoints=True, optimizer="paged_adamw_8bit")
    ladder = [NOTHING, tiled, replace(tiled, offload_checkpoints=True), lean]
    rooms = [predict(SMALL, LORA, StepShape(2048, "float32", savings)).device_gib / USABLE for savings in ladder]
    chosen = [plan(SMALL, LORA, StepShape(2048, "float32", NOTHING), room * 1.0001) for room in rooms]
    assert chosen[0].memory_savings == NOTHING
    ranks = [(found.memory_savings.offload_checkpoints, "8bit" in found.memory_savings.optimizer) for found in chosen]
    assert ranks == sorted(ranks)
    assert ranks[1] == (False, False)


@pytest.mark.parametrize("gib", [0.1, 0.5])
def test_what_does_not_fit_is_refused_with_the_longest_context_that_would(gib):
    with pytest.raises(ValueError, match=r"131,072 tokens does not fit in .*longest context that would is ") as error:
        plan(SMALL, LORA, StepShape(131_072, "float32", NOTHING), gib)
    longest = int(str(error.value).split("would is ")[1].split(";")[0].replace(",", ""))
    fits = plan(SMALL, LORA, StepShape(longest, "float32", NOTHING), gib)
    assert fits.device_gib <= gib * USABLE
    with pytest.raises(ValueError, match="does not fit"):
        plan(SMALL, LORA, StepShape(2 * longest, "float32", NOTHING), gib)


def test_a_model_that_does_not_fit_at_all_is_refused():
    with pytest.raises(ValueError, match="not even 1,024 tokens would"):
        plan(SMALL, LORA, StepShape(4096, "float32", NOTHING), 0.0015)


def test_a_window_of_four_million_tokens_is_refused_at_once():
    started = time.perf_counter()
    with pytest.raises(ValueError, match="4,000,000 tokens does not fit"):
        plan(SMALL, LORA, StepShape(4_000_000, "float32", NOTHING), 1.0)
    assert time.perf_counter() - started < 60  # it was more than 240 seconds


def test_gradients_that_add_up_over_batches_are_there_at_the_peak():
    shape = StepShape(1024, "float32", replace(NOTHING, recomputed_layers=2))
    adapters, first, later = (
        ledger(SHALLOW, LORA, shape)["adapters"],
        *(predict(SHALLOW, LORA, replace(shape, accumulated=flag)).device_gib for flag in (False, True)),
    )
    assert 0 < later - first <= adapters / GIB


def test_savings_of_the_preset_are_kept():
    wanted = replace(NOTHING, recomputed_layers=1, tile=512)
    chosen = plan(SHALLOW, LORA, StepShape(4096, "float32", wanted), 40.0)
    assert chosen.memory_savings.recomputed_layers == 1
    assert chosen.memory_savings.tile == 512


def test_preset_tiny_trains_without_any_saving():
    preset = load_preset("tiny")
    assert plan_training(preset, preset.training).memory_savings == NOTHING


def test_seconds_are_those_of_products_attention_and_memory_traffic():
    shape = StepShape(1024, "float32", NOTHING)
    found = step_seconds(SMALL, LORA, shape, Rates(1e9, 1e9, 1e9))
    flops = step_flops(SMALL, LORA, 1024, NOTHING)
    assert found["products"] == (flops["linear"] + flops["head"]) / 1e9
    assert found["attention"] == flops["attention"] / 1e9
    twice = step_seconds(SMALL, LORA, replace(shape, length=2048), Rates(1e9, 1e9, 2e9))
    assert twice["memory"] == pytest.approx(found["memory"], rel=0.05)


def test_what_computes_little_is_counted_by_the_bytes_that_it_moves():
    counter = MovedBytes()
    with FakeTensorMode(), counter:
        one = torch.empty(512, 512)
        one.view(-1)[1:].t()
        one @ one
        assert counter.moved == 0
        one @ one[:, :8]  # thin
        assert counter.moved == pytest.approx(one.nbytes, rel=0.05)
        counter.enter("saved")
        one + one.exp()
        assert counter.moved == 5 * one.nbytes
        one.copy_(one.exp())
        assert counter.moved == 9 * one.nbytes


def test_of_a_sharded_base_the_ledger_counts_a_share_and_three_whole_layers():
    whole, shared = (
        ledger(SMALL, LORA, StepShape(512, "bfloat16", NOTHING, processes=4, sharded=one)) for one in (False, True)
    )
    weights = [
        module.weight for module in random_llama(SMALL, LORA, "bfloat16").modules() if isinstance(module, Linear4bit)
    ]
    layer = sum(weight.nbytes for weight in weights) / SMALL.num_hidden_layers
    assert whole["weights"] - shared["weights"] == 4 * layer - (4 * layer / 4 + 3 * layer)
    assert {**whole, "weights": 0} == {**shared, "weights": 0}


def test_what_evaluation_cannot_read_is_named_with_what_it_would_take():
    preset = replace(load_preset("llama3.1-8b"), name="mine")
    assert unreadable(preset) == []
    tasks = replace(preset.retrieval.tasks, generate_up_to=131_072)
    asked = replace(preset, memory_gib=16.0, retrieval=replace(preset.retrieval, tasks=tasks))
    read, answered = unreadable(asked)
    assert re.fullmatch(r"evaluation.far_tokens: 262,144 tokens take 2\d.\d GiB \(predicted\) of 14.7 usable: .*", read)
    assert answered.startswith("retrieval.tasks.generate_up_to: 131,072 tokens take 2")


def test_shapes_of_models_are_known_by_name():
    tiny = LlamaConfig.from_pretrained(REPOSITORY / "data" / "tiny-llama")
    ours = model_shape("tiny")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(tiny, name)
    assert model_shape("meta-llama/Llama-2-7b-hf").hidden_size == 4096  # without the hub
    with pytest.raises(RuntimeError, match=r"cannot get the model 'Llama 3'.* the hub has no .* are owner/name"):
        model_shape("Llama 3")


def test_models_built_like_llama_are_read_from_a_folder_and_others_refused(tmp_path):
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2Config(**shape, tie_word_embeddings=True).save_pretrained(tmp_path / "qwen")
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    found = model_shape(str(tmp_path / "qwen"))
    assert (found.model_type, found.head_dim, found.tie_word_embeddings) == ("qwen2", 32, True)
    with pytest.raises(ValueError, match="has model_type 'gpt2'"):
        model_shape(str(tmp_path / "gpt2"))
    (tmp_path / "gpt2" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is truncated or corrupt"):
        model_shape(str(tmp_path / "gpt2"))
