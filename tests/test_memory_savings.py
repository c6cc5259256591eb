import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from conftest import LORA, new_llama
from experiments.gpu_budget import give_back
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.memory_savings import (
    READING,
    HostBuffers,
    HostCopy,
    OffloadedCheckpoints,
    apply_memory_savings,
)
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.settings import MemorySavings
from llama_long_utils.training.random_llama import StepShape, random_llama, training_steps

IDS = torch.randint(2, 100, (2, 64), generator=torch.Generator().manual_seed(0))


PLAIN = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")


def lora_model(dtype=torch.float32):
    """A model with LoRA-B not at zero."""
    model = add_lora(new_llama(seed=0).to(dtype), LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return model.train()


def nll(model, ids):
    return next_token_nll(hidden_states(model, ids), causal_lm(model).get_output_embeddings(), ids)


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def step(memory_savings, dtype=torch.float32):
    """Loss and gradients of one step."""
    model = lora_model(dtype)
    apply_memory_savings(model, memory_savings)
    loss = nll(model, IDS)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("tile", [0, 16, 24, 64])  # 24 does not divide 64
def test_recomputing_and_tiling_change_neither_loss_nor_gradients(tile, recomputed):
    loss, gradients = step(PLAIN)
    lean = replace(PLAIN, recomputed_layers=recomputed, tile=tile)
    lean_loss, lean_gradients = step(lean)
    assert lean_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (lean_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_what_is_read_in_tiles_reads_the_same():
    model = lora_model().eval()
    with torch.no_grad():
        expected = hidden_states(model, IDS)
        apply_memory_savings(model, replace(PLAIN, tile=24))
        assert torch.allclose(hidden_states(model, IDS), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def host():
    """Offloading to host memory from a CPU: the copies are real, and so is what takes their place afterwards."""
    made = []
    return HostBuffers(lambda nbytes: made.append(nbytes) or torch.empty(nbytes, dtype=torch.uint8)), made


def test_checkpoints_that_were_copied_away_and_back_give_the_same_gradients(host):
    buffers, made = host
    memory_savings = replace(PLAIN, recomputed_layers=2, tile=16)
    loss, expected = step(memory_savings)
    model = lora_model()
    apply_memory_savings(model, memory_savings)
    for _ in range(3):
        with OffloadedCheckpoints(64, buffers):
            copied = nll(model, IDS)
        copied.backward()
        assert copied.item() == loss
        assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in expected.items())
        model.zero_grad()
        del copied
        assert made == [IDS.numel() * 64 * 4] * 5  # two layers', three of the last norm's; the same in every step


def test_shorter_sequences_need_no_buffers_of_their_own(host):
    """Batches of instruction and preference tuning nearly all differ in length."""
    (buffers, made), model = host, lora_model()
    buffers.least = IDS.numel() * 64 * 4
    apply_memory_savings(model, replace(PLAIN, recomputed_layers=2))
    for length in (20, 31, 24, IDS.shape[1]):
        with OffloadedCheckpoints(64, buffers):
            loss = nll(model, IDS[:, :length])
        loss.backward()
        del loss
    assert made == [buffers.least] * 5


def test_buffers_that_are_free_can_be_given_back():
    released = []
    buffers = HostBuffers(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    model = lora_model()
    apply_memory_savings(model, replace(PLAIN, recomputed_layers=2))
    with OffloadedCheckpoints(64, buffers):
        loss = nll(model, IDS)
    give_back(buffers, released.append)
    assert not released  # the backward pass still needs them
    loss.backward()
    del loss
    give_back(buffers, released.append)
    assert len(released) == 5
    assert not buffers.free


def test_two_forward_passes_before_a_backward_pass_keep_their_own_checkpoints(host):
    """As in preference tuning: a buffer must not be given away while a backward pass still needs it."""
    model, (first, second) = lora_model(), (IDS, IDS.flip(1))
    apply_memory_savings(model, replace(PLAIN, recomputed_layers=2))
    (nll(model, first) - 0.5 * nll(model, second)).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    with OffloadedCheckpoints(64, host[0]):
        one = nll(model, first)
        other = nll(model, second)
    (one - 0.5 * other).backward()
    assert all(torch.equal(gradients(model)[name], gradient) for name, gradient in expected.items())
    assert len(host[1]) == 10


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


@pytest.mark.parametrize("tile", [16, 2**15])
def test_norms_are_trained_of_a_model_that_was_read_in_tiles_before(tile):
    """PEFT copies each norm to train the copy: its forward must run its own weight, not that of the original."""
    model = new_llama(seed=0)
    apply_memory_savings(model, replace(READING, tile=tile))
    model = add_lora(model, replace(LORA, train_norms=True), seed=0).train()
    nll(model, IDS).backward()
    trained = gradients(model)
    assert any("layernorm" in name for name in trained)
    assert [name for name, gradient in trained.items() if gradient is None] == []
    apply_memory_savings(model, PLAIN)
    assert not [name for name, module in model.named_modules() if "plain_forward" in vars(module)]


def test_only_the_first_layers_are_recomputed():
    model = add_lora(new_llama(seed=0), LORA, seed=0)
    apply_memory_savings(model.train(), replace(PLAIN, recomputed_layers=1))
    passes = Counter()
    for number, layer in enumerate(causal_lm(model).model.layers):
        layer.mlp.act_fn = CountedActivation(layer.mlp.act_fn, passes, number)
    hidden_states(model, IDS).sum().backward()
    assert passes == {0: 2, 1: 1}


def test_savings_can_be_switched_off_again():
    model = add_lora(new_llama(seed=0), LORA, seed=0).train()
    apply_memory_savings(model, replace(PLAIN, recomputed_layers=2, tile=3))
    apply_memory_savings(model, replace(PLAIN, tile=5))  # not nested in the first ones
    apply_memory_savings(model, PLAIN)
    passes, tokens = Counter(), []
    for number, layer in enumerate(causal_lm(model).model.layers):
        layer.mlp.act_fn = CountedActivation(layer.mlp.act_fn, passes, number)
        layer.mlp.register_forward_hook(lambda _mlp, inputs, _output: tokens.append(inputs[0].shape[1]))
    hidden_states(model, IDS).sum().backward()
    assert passes == {0: 1, 1: 1}
    assert tokens == [IDS.shape[1]] * 2


class CountedActivation(torch.nn.Module):
    def __init__(self, inner, passes, number):
        super().__init__()
        self.inner, self.passes, self.number = inner, passes, number

    def forward(self, hidden):
        self.passes[self.number] += 1
        return self.inner(hidden)


RESIDENT = """
import os, platform, sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
sys.path.insert(0, "tests")
from conftest import new_llama
from llama_long_utils.model.loss import hidden_states
from llama_long_utils.training.host_memory import give_back_gaps, keep_freed_memory

if platform.libc_ver()[0] != "glibc":
    sys.exit(77)
for limit in (0.1, 100):
    if (child := os.fork()) == 0:
        keep_freed_memory()
        model = new_llama(seed=0)
        hooks = give_back_gaps(model, limit)
        blocks = [torch.ones(2**18) for _ in range(800)]  # 800 MiB
        del blocks[::2]
        hidden_states(model, torch.arange(8)[None])
        print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20, len(hooks), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_layer_gives_back_gaps_of_freed_memory_above_the_limit():
    """In two forks of a process that has imported everything and computed nothing."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    (low, *hooks), (high, *others) = (line.split() for line in done.stdout.splitlines())
    assert hooks == others == ["2"]  # one for each layer
    assert int(high) - int(low) > 300


def test_a_tile_is_computed_forward_twice_not_three_times():
    model = add_lora(new_llama(seed=0), LORA, seed=0)
    apply_memory_savings(model.train(), replace(PLAIN, recomputed_layers=2, tile=16))
    mlp, tokens = causal_lm(model).model.layers[0].mlp, []
    mlp.act_fn.register_forward_hook(lambda _module, inputs, _output: tokens.append(len(inputs[0])))
    hidden_states(model, IDS).sum().backward()
    assert sum(tokens) == 2 * IDS.numel()


def test_only_hidden_states_are_offloaded_and_nothing_on_a_cpu(host):
    offload = OffloadedCheckpoints(64, host[0])
    states, other = torch.zeros(1, 8, 64), torch.zeros(1, 8, 32)
    assert offload.to_host(other) is other
    assert isinstance(offload.to_host(states), HostCopy)
    assert OffloadedCheckpoints(64).to_host(states) is states
