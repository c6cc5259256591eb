import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_long_utils.models import check_rope, load_base
from llama_long_utils.rope import attention_score, inverse_frequencies, rope_parameters, wavelengths


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 128), base=st.floats(100, 1e8))
def test_frequencies_are_those_of_transformers(half, base):
    config = LlamaConfig(hidden_size=2 * half, num_attention_heads=1, rope_parameters=rope_parameters(base))
    torch.testing.assert_close(
        inverse_frequencies(2 * half, base), LlamaRotaryEmbedding(config).inv_freq, rtol=1e-5, atol=0
    )


def test_wavelength_of_the_first_pair_is_one_circle():
    assert wavelengths(inverse_frequencies(64, 1e4))[0].item() == pytest.approx(2 * math.pi)


def test_attention_score_starts_at_root_d_and_decays():
    score = attention_score(inverse_frequencies(128, 1e4), torch.tensor([0, 4096]))
    assert score[0].item() == pytest.approx(math.sqrt(128))
    assert abs(score[1].item()) < 2


def test_trap_1_config_after_loading_changes_nothing(base_folder):
    model = load_base(base_folder, rope_base=1e4, window=64, quantized=False)
    before = model.model.rotary_emb.inv_freq.clone()
    model.config.rope_parameters = rope_parameters(5e5)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    with pytest.raises(ValueError, match="give the base at load"):
        check_rope(model, 5e5)


def test_trap_2_the_whole_dictionary_is_needed(base_folder):
    with pytest.raises((TypeError, KeyError)):
        LlamaForCausalLM.from_pretrained(base_folder, rope_parameters={"rope_type": "default"})
    assert set(rope_parameters(5e5)) == {"rope_type", "rope_theta"}
    check_rope(load_base(base_folder, rope_base=5e5, window=512), 5e5)


def test_trap_3_yarn_with_a_raised_window_needs_the_original_one():
    # Two readings of the same factor: without the original window the ramp is built for another one.
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
    shape = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 4096}
    silent = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=yarn, **shape)).inv_freq
    right = LlamaRotaryEmbedding(
        LlamaConfig(rope_parameters={**yarn, "original_max_position_embeddings": 512}, **shape)
    ).inv_freq
    assert not torch.allclose(silent, right, rtol=1e-2)
    assert rope_parameters(5e5)["rope_type"] == "default"  # what this collection loads has no ramp to get wrong


def test_trap_4_casting_the_model_ruins_the_frequencies(base_folder):
    loaded = load_base(base_folder, rope_base=1e4, window=64, quantized=False)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    loaded.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"inv_freq is torch\.bfloat16"):
        check_rope(loaded, 1e4)
