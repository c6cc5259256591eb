import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conftest import PLAIN, RAISED
from experiments.attention import attention_score, xpos_attention, xpos_decay
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.loss import hidden_states
from llama_long_utils.rope import inverse_frequencies, rotation, wavelengths
from llama_long_utils.settings import METHODS, Scaling

IN_TRANSFORMERS = [name for name in METHODS if name != "xpos_abf"]


def scaling(method, half=32, base=1e4, original=512, factor=8, **changes):
    return Scaling(
        **{
            "method": method,
            "base": base,
            "head_dim": 2 * half,
            "original_window": original,
            "window": original * factor,
            "pair_factors": tuple(1 + j / 7 for j in range(half)) if method == "longrope" else (),
            **changes,
        }
    )


def rotary_module(one):
    config = LlamaConfig(
        hidden_size=one.head_dim,
        num_attention_heads=1,
        max_position_embeddings=one.max_position_embeddings,
        rope_parameters=one.parameters(),
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("method", IN_TRANSFORMERS)
@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(2, 128),
    base=st.floats(1e3, 1e7),
    original=st.sampled_from([256, 512, 2048, 4096, 8192]),
    factor=st.integers(1, 32),
    share=st.sampled_from([0.25, 0.5, 1.0]),
)
def test_every_method_is_that_of_transformers(method, half, base, original, factor, share):
    share = {"rotated_share": share} if method == "proportional" else {}
    one = scaling(method, half, base, original, factor, **share)
    module = rotary_module(one)
    inv_freq, attention_factor = rotation(one)
    torch.testing.assert_close(inv_freq, module.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(module.attention_scaling, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(half=st.integers(2, 128), original=st.sampled_from([256, 512, 4096]), length=st.integers(1, 100_000))
def test_dynamic_ntk_follows_the_length_as_in_transformers(half, original, length):
    one = scaling("dynamic_ntk", half, original=original)
    module = rotary_module(one)
    module(torch.zeros(1), torch.arange(length)[None])
    torch.testing.assert_close(rotation(one, length)[0], module.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_scaling_by_one_is_the_identity(method):
    factors = {"pair_factors": (1.0,) * 32} if method == "longrope" else {}
    inv_freq, attention_factor = rotation(scaling(method, factor=1, **factors), 512)
    torch.testing.assert_close(inv_freq, inverse_frequencies(64, 1e4), rtol=1e-6, atol=0)
    assert attention_factor == 1.0


def test_ntk_leaves_the_fastest_pair_and_interpolates_the_slowest():
    plain, scaled = inverse_frequencies(64, 1e4), rotation(scaling("ntk"))[0]
    assert scaled[0] == plain[0]
    assert (plain[-1] / scaled[-1]).item() == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "yran"}, "yran"),
        ({"window": 256}, "cannot be scaled down"),
        ({"method": "longrope"}, "takes 32 pair_factors"),
        ({"pair_factors": (2.0,)}, "the other methods none"),
        ({"rotated_share": 0.0}, "rotated_share"),
    ],
)
def test_bad_scaling_is_one_clear_error(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(scaling("pi"), **changes)


def test_wavelength_of_the_first_pair_is_one_circle():
    assert wavelengths(inverse_frequencies(64, 1e4))[0].item() == pytest.approx(2 * math.pi)


def test_attention_score_starts_at_root_d_and_decays():
    score = attention_score(inverse_frequencies(128, 1e4), torch.tensor([0, 4096]))
    assert score[0].item() == pytest.approx(math.sqrt(128))
    assert abs(score[1].item()) < 2


@pytest.mark.parametrize("method", IN_TRANSFORMERS)
def test_every_method_loads_by_name(base_folder, method):
    one = scaling(method, half=16, original=64)
    check_rope(load_base(base_folder, one, dtype="float32", quantized=False), one)


def xpos_model(base_folder, decay_window=64):
    model = load_base(base_folder, scaling("xpos_abf", 16, 5e5, 64), dtype="float32", quantized=False)
    model.config.xpos_window = decay_window
    return model


def test_xpos_without_decay_is_abf(base_folder):
    ids = torch.arange(50)[None]
    abf = load_base(base_folder, scaling("abf", 16, 5e5, 64), dtype="float32", quantized=False)
    with torch.no_grad():
        far = hidden_states(xpos_model(base_folder, decay_window=10**9), ids)
        torch.testing.assert_close(far, hidden_states(abf, ids), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(hidden_states(xpos_model(base_folder), ids), far, atol=1e-3)


def test_xpos_depends_on_distance_only(base_folder):
    model, ids = xpos_model(base_folder), torch.arange(50)[None]
    with torch.no_grad():
        here = hidden_states(model, ids)
        there = hidden_states(model, ids, torch.arange(50)[None] + 300, torch.ones_like(ids))
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


def test_xpos_score_is_the_rotated_one_times_the_decay():

    class Module(torch.nn.Module):
        is_causal, config, num_key_value_groups = False, LlamaConfig(), 1

    Module.config.xpos_window = 64
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 40, 32, generator=generator)
    positions = torch.arange(40)[None]
    value = torch.eye(40)[None, None]  # the output is then the attention itself
    output, _ = xpos_attention(Module(), query, key, value, None, position_ids=positions, scaling=1.0)
    distance = positions.T - positions
    decay = xpos_decay(32).repeat(2) ** (distance[..., None] / 64)
    expected = torch.einsum("md,nd,mnd->mn", query[0, 0], key[0, 0], decay).softmax(dim=-1)
    torch.testing.assert_close(output[0, :, 0], expected, rtol=1e-3, atol=1e-5)


def test_xpos_trains(base_folder):
    model = xpos_model(base_folder)
    hidden_states(model, torch.arange(50)[None]).square().sum().backward()
    assert all(layer.self_attn.q_proj.weight.grad.any() for layer in model.model.layers)


def test_trap_1_config_after_loading_changes_nothing(base_folder):
    model = load_base(base_folder, PLAIN, dtype="bfloat16", quantized=False)
    before = model.model.rotary_emb.inv_freq.clone()
    model.config.rope_parameters = RAISED.parameters()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    with pytest.raises(ValueError, match="RoPE is set at load"):
        check_rope(model, RAISED)


def test_trap_2_the_whole_dictionary_is_needed(base_folder):
    with pytest.raises((TypeError, KeyError)):
        LlamaForCausalLM.from_pretrained(base_folder, rope_parameters={"rope_type": "default"})
    for method in METHODS:
        assert {"rope_type", "rope_theta"} <= set(scaling(method).parameters())


@pytest.mark.parametrize("method", ["yarn", "ntk_by_parts", "longrope"])
def test_trap_3_a_raised_window_needs_the_original_one(method):
    assert scaling(method).parameters()["original_max_position_embeddings"] == 512


def test_trap_3_yarn_without_it_silently_builds_another_ramp():
    shape = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 4096}
    parameters = scaling("yarn").parameters()
    del parameters["original_max_position_embeddings"]
    silent = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=parameters, **shape)).inv_freq
    assert not torch.allclose(silent, rotation(scaling("yarn"))[0], rtol=1e-2)


def test_trap_4_casting_the_model_ruins_the_frequencies(base_folder):
    loaded = load_base(base_folder, PLAIN, dtype="bfloat16", quantized=False)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    loaded.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"inv_freq is torch\.bfloat16"):
        check_rope(loaded, PLAIN)


def test_trap_5_dynamic_ntk_is_read_without_a_cache(base_folder):
    # With a cache the keys of a shorter text keep the rotation of that length, and the logits disagree.
    model = load_base(base_folder, scaling("dynamic_ntk", 16, original=64), dtype="float32", quantized=False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 100  # random weights hardly attend by position
    ids = torch.arange(100)[None] % 128
    with torch.no_grad():
        cache = model(ids[:, :80], use_cache=True).past_key_values
        cached = model(ids[:, 80:], past_key_values=cache).logits[:, -1]
        whole = model(ids, use_cache=False).logits[:, -1]
        assert not torch.allclose(whole, cached, atol=1e-3)
        torch.testing.assert_close(model.lm_head(hidden_states(model, ids)[:, -1]), whole, rtol=1e-4, atol=1e-5)


def test_methods_transformers_gained_since_are_looked_at():
    ours = {scaling(name).parameters()["rope_type"] for name in IN_TRANSFORMERS}
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} == ours
