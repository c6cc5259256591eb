import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from conftest import PLAIN, new_llama
from experiments.attention import S2_GROUPS, s2_attention
from llama_long_utils.model.base import load_base
from llama_long_utils.model.loss import hidden_states


class Module(torch.nn.Module):
    config, num_key_value_groups = LlamaConfig(), 1


def test_s2_is_full_attention_under_a_group_mask():
    query, key, value = torch.randn(3, 2, 4, 64, 16, generator=torch.Generator().manual_seed(0))
    output, _ = s2_attention(Module(), query, key, value, None, scaling=0.25)
    place, group = torch.arange(64), 64 // S2_GROUPS
    causal = place[:, None] >= place
    straight = (place // group)[:, None] == place // group
    shifted = ((place + group // 2) // group)[:, None] == (place + group // 2) // group
    mask = torch.stack([straight & causal] * 2 + [shifted & causal] * 2)[None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.25)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_s2_groups_share_keys_between_query_heads():
    module = Module()
    module.num_key_value_groups = 2
    query = torch.randn(1, 4, 64, 16)
    key, value = torch.randn(2, 1, 2, 64, 16)
    shared, _ = s2_attention(module, query, key, value, None, scaling=0.25)
    spelled, _ = s2_attention(
        Module(), query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), None, scaling=0.25
    )
    torch.testing.assert_close(shared, spelled)


def test_s2_loads_for_training_and_differs_from_full_attention(base_folder):
    sparse = load_base(base_folder, PLAIN, dtype="float32", quantized=False, attention="s2")
    full = load_base(base_folder, PLAIN, dtype="float32", quantized=False)
    ids = torch.arange(64)[None]
    assert not torch.allclose(hidden_states(sparse, ids), hidden_states(full, ids), atol=1e-5)
    hidden_states(sparse, ids).square().sum().backward()
    assert all(layer.self_attn.k_proj.weight.grad.any() for layer in sparse.model.layers)


def test_xpos_reads_the_same_through_a_cache():
    model = new_llama(seed=0, attn_implementation="xpos")
    model.config.xpos_window = 64
    ids = torch.arange(40)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[0, -1]
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        cached = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


def test_s2_refuses_packed_sequences_and_odd_lengths():
    model = new_llama(seed=0, attn_implementation="s2")
    with pytest.raises(ValueError, match="whole sequences only"):
        hidden_states(model, torch.arange(64)[None], torch.arange(32).repeat(2)[None])
    with pytest.raises(ValueError, match="multiple of 8"):
        hidden_states(model, torch.arange(60)[None])
