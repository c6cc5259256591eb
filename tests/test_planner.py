from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import LORA
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.loss import hidden_states
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import MemorySavings
from llama_long_utils.training import planner
from llama_long_utils.training.ledger import COMPONENTS, HOST, MOVED, StepShape, ledger
from llama_long_utils.training.memory_savings import apply_memory_savings
from llama_long_utils.training.planner import (
    GIB,
    USABLE,
    Rates,
    attention_crossover,
    model_shape,
    plan,
    plan_training,
    predict,
    step_flops,
    step_seconds,
    tile_for,
)

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
    assert attention_crossover(classic) == pytest.approx(12 * 512, rel=0.001)


def simple_ledger(config, lora, shape):
    """A ledger at once, by a formula in which every technique saves something."""
    ways, tokens = shape.memory_savings, shape.length * shape.sequences
    recomputed = min(ways.recomputed_layers, config.num_hidden_layers)
    counts = dict.fromkeys([*COMPONENTS, HOST, MOVED], 0)
    checkpoints = 2 * config.hidden_size * tokens * recomputed
    counts["weights"] = 2**20
    counts["optimizer"] = 2**18 if "8bit" in ways.optimizer else 2**20
    counts["saved"] = 40 * config.hidden_size * tokens * (config.num_hidden_layers - recomputed)
    counts[HOST if ways.offload_checkpoints else "saved"] += checkpoints
    counts["backward"] = 60 * config.hidden_size * (min(ways.tile or tokens, tokens) + tokens // 8)
    return counts


@pytest.fixture
def quick_ledger(monkeypatch):
    monkeypatch.setattr(planner, "ledger", simple_ledger)


@pytest.mark.usefixtures("quick_ledger")
def test_the_planner_recomputes_nothing_if_it_need_not():
    assert plan(SHALLOW, LORA, StepShape(1024, "float32", NOTHING), 40.0).memory_savings == NOTHING


def test_with_less_memory_the_plan_needs_more_operations_and_still_fits():
    """With the real ledger."""
    shape = StepShape(1024, "float32", NOTHING)
    most, least = (predict(SHALLOW, LORA, shape, recomputed).device_gib for recomputed in (0, 2))
    rooms = [most * 1.01, (most + least) / 2, least * 1.01]
    plans = [plan(SHALLOW, LORA, StepShape(1024, "float32", NOTHING), room / USABLE) for room in rooms]
    for room, chosen in zip(rooms, plans, strict=True):
        assert chosen.device_gib <= room
    assert plans[0].memory_savings == NOTHING
    flops = [chosen.flops for chosen in plans]
    assert flops[0] < flops[1] <= flops[2]


@pytest.mark.usefixtures("quick_ledger")
def test_techniques_come_in_the_order_of_what_they_cost():
    recomputed = replace(NOTHING, recomputed_layers=4, tile=tile_for(4096))
    ladder = [NOTHING, recomputed, replace(recomputed, offload_checkpoints=True)]
    ladder.append(replace(ladder[-1], optimizer="paged_adamw_8bit"))
    for ways in ladder:
        room = predict(SMALL, LORA, StepShape(4096, "float32", ways)).device_gib / USABLE * 1.0001
        assert plan(SMALL, LORA, StepShape(4096, "float32", NOTHING), room).memory_savings == ways


@pytest.mark.usefixtures("quick_ledger")
@pytest.mark.parametrize("gib", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("sequences", [1, 2])
def test_what_does_not_fit_is_refused_with_the_longest_context_that_would(gib, sequences):
    with pytest.raises(ValueError, match=r"131,072 tokens does not fit in .*longest context that would is ") as error:
        plan(SMALL, LORA, StepShape(131_072, "float32", NOTHING, sequences), gib)
    longest = int(str(error.value).split("would is ")[1].split(";")[0].replace(",", ""))
    fits = plan(SMALL, LORA, StepShape(longest, "float32", NOTHING, sequences), gib)
    assert fits.device_gib <= gib * USABLE
    with pytest.raises(ValueError, match="does not fit"):
        plan(SMALL, LORA, StepShape(2 * longest, "float32", NOTHING, sequences), gib)


@pytest.mark.usefixtures("quick_ledger")
def test_a_model_that_does_not_fit_at_all_is_refused():
    with pytest.raises(ValueError, match="not even 1,024 tokens would"):
        plan(SMALL, LORA, StepShape(4096, "float32", NOTHING), 0.0015)


def test_gradients_that_add_up_over_batches_are_there_at_the_peak():
    shape = StepShape(1024, "float32", replace(NOTHING, recomputed_layers=2))
    adapters, first, later = (
        ledger(SHALLOW, LORA, shape)["adapters"],
        *(predict(SHALLOW, LORA, replace(shape, accumulated=flag)).device_gib for flag in (False, True)),
    )
    assert 0 < later - first <= adapters / GIB


@pytest.mark.usefixtures("quick_ledger")
def test_techniques_of_the_preset_are_kept():
    wanted = replace(NOTHING, recomputed_layers=1, tile=512)
    chosen = plan(SHALLOW, LORA, StepShape(4096, "float32", wanted), 40.0)
    assert chosen.memory_savings.recomputed_layers == 1
    assert chosen.memory_savings.tile == 512


def test_preset_tiny_trains_without_any_technique():
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


def test_shapes_of_models_are_known_by_name():
    tiny = LlamaConfig.from_pretrained(REPOSITORY / "data" / "tiny-llama")
    ours = model_shape("tiny")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours, name) == getattr(tiny, name)
    with pytest.raises(ValueError, match="unknown model 'Llama 3'"):
        model_shape("Llama 3")
