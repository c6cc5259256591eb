"""What must be right on a GPU before a run is trusted there: `make gpu` runs these first. A CPU runs them small."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.gpu_checks import Machine, gradients, nf4, optimizers
from llama_long_utils.model.attention import DOCUMENTS
from llama_long_utils.model.memory_savings import PINNED

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)


@pytest.fixture(scope="module", params=["cpu", GPU])
def machine(request):
    return Machine(request.param)


def test_nf4_rounds_as_it_should_and_all_of_a_model_is_on_its_device(machine):
    found = nf4(machine)
    assert 0.09 < found["relative error"] < 0.1
    assert found["tensors elsewhere"] == 0


def test_gradients_with_every_saving_are_the_plain_step_s(machine):
    found = gradients(machine)
    assert max(error for name, error in found.items() if "float32" in name) < 1e-5
    assert max(error for name, error in found.items() if "bfloat16" in name) < 0.03  # of the chunked loss


def test_every_optimizer_moves_every_trained_weight(machine):
    found = optimizers(machine)
    assert {value for name, value in found.items() if name.endswith("moved")} == {1.0}
    assert found.get("paged minus unpaged, 262,144 numbers", 0.0) == 0.0


def test_packed_documents_without_a_mask_are_those_under_the_mask(machine):
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_key_value_heads = 2
    torch.manual_seed(0)
    masked = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(machine.device)
    ids = torch.randint(128, (1, 300), device=machine.device)
    places = torch.cat([torch.arange(length) for length in (120, 1, 179)])[None].to(machine.device)
    expected = masked(input_ids=ids, position_ids=places, use_cache=False).logits
    masked.set_attn_implementation(DOCUMENTS)
    torch.testing.assert_close(
        masked(input_ids=ids, position_ids=places, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_checkpoints_wait_in_pinned_memory():
    assert PINNED.take(2**20).is_pinned()
