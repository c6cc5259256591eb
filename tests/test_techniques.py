import pytest
import torch

from conftest import LORA, new_llama
from llama_long_utils.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.models import add_lora
from llama_long_utils.training import OffloadedCheckpoints, tile_over_sequence

IDS = torch.randint(2, 100, (2, 64), generator=torch.Generator().manual_seed(0))


def step(tile, checkpointing, dtype=torch.float32):
    """Loss and gradients of one step with LoRA-B not at zero."""
    model = add_lora(new_llama(seed=0).to(dtype), LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tile_over_sequence(model.train(), tile)
    nll = next_token_nll(hidden_states(model, IDS), causal_lm(model).get_output_embeddings(), IDS)
    nll.backward()
    return nll.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tile", [16, 24, 64])  # 24 does not divide 64
def test_tiling_changes_neither_loss_nor_gradients(tile, checkpointing):
    loss, gradients = step(0, False)
    tiled_loss, tiled = step(tile, checkpointing)
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (tiled[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_tiling_in_bf16_stays_within_the_rounding_of_bf16():
    loss, gradients = step(0, True, torch.bfloat16)
    tiled_loss, tiled = step(16, True, torch.bfloat16)
    assert tiled_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert (tiled[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_a_tile_is_computed_forward_twice_not_three_times():
    model = add_lora(new_llama(seed=0), LORA, seed=0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tile_over_sequence(model.train(), 16)
    mlp, tokens = causal_lm(model).model.layers[0].mlp, []
    mlp.act_fn.register_forward_hook(lambda _module, inputs, _output: tokens.append(inputs[0].shape[1]))
    hidden_states(model, IDS).sum().backward()
    assert sum(tokens) == 2 * IDS.shape[1]


def test_only_hidden_states_are_offloaded_and_nothing_on_a_cpu():
    offload = OffloadedCheckpoints(hidden_size=64)
    assert offload.is_checkpoint(torch.zeros(1, 8, 64))
    assert not offload.is_checkpoint(torch.zeros(1, 8, 32))
    states = torch.zeros(1, 8, 64)
    assert offload.to_host(states)[1] is states
