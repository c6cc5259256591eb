from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from conftest import LORA, new_llama
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.settings import MemorySavings
from llama_long_utils.training.host_memory import _MallocInfo, give_back_gaps
from llama_long_utils.training.memory_savings import OffloadedCheckpoints, apply_memory_savings
from llama_long_utils.training.random_llama import StepShape, random_llama, training_steps

IDS = torch.randint(2, 100, (2, 64), generator=torch.Generator().manual_seed(0))


PLAIN = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")


def step(memory_savings, dtype=torch.float32):
    """Loss and gradients of one step with LoRA-B not at zero."""
    model = add_lora(new_llama(seed=0).to(dtype), LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    apply_memory_savings(model.train(), memory_savings)
    with OffloadedCheckpoints(64) if memory_savings.offload_checkpoints else nullcontext():
        hidden = hidden_states(model, IDS)
    nll = next_token_nll(hidden, causal_lm(model).get_output_embeddings(), IDS)
    nll.backward()
    return nll.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("tile", [0, 16, 24, 64])  # 24 does not divide 64
def test_recomputing_and_tiling_change_neither_loss_nor_gradients(tile, recomputed):
    loss, gradients = step(PLAIN)
    lean = replace(PLAIN, recomputed_layers=recomputed, tile=tile, offload_checkpoints=True)
    lean_loss, lean_gradients = step(lean)
    assert lean_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (lean_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_checkpoints_that_were_copied_away_and_back_give_the_same_gradients(monkeypatch):
    """As offloading does on a GPU: here the copies stay on the CPU, and every checkpoint is replaced by its copy."""
    memory_savings = replace(PLAIN, recomputed_layers=2, tile=16, offload_checkpoints=True)
    loss, gradients = step(memory_savings)
    copied = []

    def to_host(self, tensor):
        if self.is_checkpoint(tensor):
            copied.append(tensor.shape)
        return tensor.device, tensor.clone()

    monkeypatch.setattr(OffloadedCheckpoints, "to_host", to_host)
    copied_loss, copied_gradients = step(memory_savings)
    assert copied_loss == loss
    assert len(copied) >= 2
    assert all(torch.equal(copied_gradients[name], gradient) for name, gradient in gradients.items())


def test_optimizer_in_8_bits_moves_weights_almost_as_the_one_in_32():
    config = LlamaConfig(vocab_size=128, hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    lora, moved = replace(LORA, rank=16), []  # smaller matrices than 4,096 numbers stay in 32 bits
    for optimizer in ("adamw_torch_fused", "adamw_8bit"):
        torch.manual_seed(0)
        model = random_llama(config, lora, "float32")
        before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        shape = StepShape(64, "float32", replace(PLAIN, optimizer=optimizer))
        for _loss in training_steps(model, shape, [64] * 10):
            pass
        moved.append(
            {name: weight.detach() - before[name] for name, weight in model.named_parameters() if name in before}
        )
    large = [name for name, step in moved[0].items() if step.numel() >= 4096]
    assert len(large) == 14
    for name in large:
        assert 0 < (moved[1][name] - moved[0][name]).norm() < 0.2 * moved[0][name].norm(), name


def test_tiling_in_bf16_stays_within_the_rounding_of_bf16():
    loss, gradients = step(replace(PLAIN, recomputed_layers=2), torch.bfloat16)
    tiled_loss, tiled = step(replace(PLAIN, recomputed_layers=2, tile=16), torch.bfloat16)
    assert tiled_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert (tiled[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_only_the_first_layers_are_recomputed():
    model = add_lora(new_llama(seed=0), LORA, seed=0)
    apply_memory_savings(model.train(), replace(PLAIN, recomputed_layers=1))
    passes = Counter()
    for number, layer in enumerate(causal_lm(model).model.layers):
        layer.mlp.act_fn = CountedActivation(layer.mlp.act_fn, passes, number)
    hidden_states(model, IDS).sum().backward()
    assert passes == {0: 2, 1: 1}


class CountedActivation(torch.nn.Module):
    def __init__(self, inner, passes, number):
        super().__init__()
        self.inner, self.passes, self.number = inner, passes, number

    def forward(self, hidden):
        self.passes[self.number] += 1
        return self.inner(hidden)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc, as the function does")
@pytest.mark.parametrize(("limit", "returns"), [(-1.0, 4), (1e6, 0)])
def test_gaps_are_given_back_before_and_after_each_layer_if_they_are_large(limit, returns, monkeypatch):
    calls = []

    class Libc:
        def __init__(self, _name):
            self.malloc_trim = calls.append

        @staticmethod
        def mallinfo2():
            return _MallocInfo()

    monkeypatch.setattr("ctypes.CDLL", Libc)
    monkeypatch.setattr("llama_long_utils.training.host_memory._glibc", lambda: True)
    model = add_lora(new_llama(seed=0), LORA, seed=0)
    hooks = give_back_gaps(model, limit)
    hidden_states(model.train(), IDS).sum().backward()
    assert len(calls) == returns
    for hook in hooks:
        hook.remove()
    hidden_states(model, IDS).sum().backward()
    assert len(calls) == returns


def test_a_tile_is_computed_forward_twice_not_three_times():
    model = add_lora(new_llama(seed=0), LORA, seed=0)
    apply_memory_savings(model.train(), replace(PLAIN, recomputed_layers=2, tile=16))
    mlp, tokens = causal_lm(model).model.layers[0].mlp, []
    mlp.act_fn.register_forward_hook(lambda _module, inputs, _output: tokens.append(len(inputs[0])))
    hidden_states(model, IDS).sum().backward()
    assert sum(tokens) == 2 * IDS.numel()


def test_only_hidden_states_are_offloaded_and_nothing_on_a_cpu():
    offload = OffloadedCheckpoints(hidden_size=64)
    assert offload.is_checkpoint(torch.zeros(1, 8, 64))
    assert not offload.is_checkpoint(torch.zeros(1, 8, 32))
    states = torch.zeros(1, 8, 64)
    assert offload.to_host(states)[1] is states
