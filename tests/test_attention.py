import dataclasses
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from conftest import LORA, PLAIN, new_llama
from experiments.attention import S2_GROUPS, s2_attention
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.attention import DOCUMENTS, TILE, _CausalOnCPU, document_starts
from llama_long_utils.model.base import load_base
from llama_long_utils.model.loss import hidden_states, patch_loss
from llama_long_utils.model.memory_savings import HostBuffers, OffloadedCheckpoints, apply_memory_savings
from llama_long_utils.settings import MemorySavings


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


FAMILIES = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
PACKED = ([10, 1, 1, 45, 7], [64], [1, 62, 1])  # tokens of the documents in each row
NOTHING = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")


def doll(kind, attention, lora=False):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = kind(**shape, num_key_value_heads=2, head_dim=16, vocab_size=128, max_position_embeddings=64)
    config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)  # so that attention is far from even
    if lora:
        model = add_lora(model, LORA, seed=0)
        for name, weight in model.named_parameters():
            weight.data += 0.05 * torch.randn(weight.shape) * ("lora_B" in name)
    patch_loss(model)
    return model.train()


def packed_batch(rows=PACKED):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 128, (len(rows), 64), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def loss_and_gradients(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_training(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-9, name


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_documents_have_the_loss_and_every_gradient_of_the_mask(kind):
    batch = packed_batch()
    expected = loss_and_gradients(doll(kind, "sdpa"), batch)
    assert len(expected) > 20
    assert_equal_training(loss_and_gradients(doll(kind, DOCUMENTS), batch), expected)
    leaking = loss_and_gradients(doll(kind, "sdpa"), batch | {"attention_mask": torch.ones(3, 64)})
    assert abs(leaking["loss"] - expected["loss"]) > 1e-3 * expected["loss"]  # the test would see it


@pytest.mark.parametrize("offloaded", [False, True])
def test_packed_documents_go_with_recomputed_layers_tiles_and_offloading(offloaded):
    batch = packed_batch()
    expected = loss_and_gradients(doll(LlamaConfig, "sdpa", lora=True), batch)
    model = doll(LlamaConfig, DOCUMENTS, lora=True)
    apply_memory_savings(model, dataclasses.replace(NOTHING, recomputed_layers=1 + offloaded, tile=24))
    buffers = HostBuffers(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)) if offloaded else None
    with OffloadedCheckpoints(64, buffers):
        loss = model(**batch).loss
    loss.backward()
    assert_equal_training({"loss": loss.detach(), **gradients(model)}, expected)


def test_padding_at_the_end_changes_nothing_and_before_a_token_is_refused():
    batch = packed_batch([[20, 30, 14]])  # the last "document" is padding
    batch["labels"][:, 50:] = -100
    mask = torch.arange(64)[None] < 50
    plain = {name: value[:, :50] for name, value in batch.items()}
    expected = loss_and_gradients(doll(LlamaConfig, "sdpa"), plain)
    for extra in ({}, {"attention_mask": mask.long()}):
        assert_equal_training(loss_and_gradients(doll(LlamaConfig, DOCUMENTS), batch | extra), expected)
    with pytest.raises(ValueError, match="padding at the end"):
        doll(LlamaConfig, DOCUMENTS)(**batch, attention_mask=mask.flip(1).long())


def test_a_jump_of_positions_stays_in_its_document_and_a_fall_starts_one():
    positions = torch.tensor([[0, 1, 2, 900, 901, 0, 0, 1], [5, 6, 7, 8, 9, 10, 11, 12]])
    assert document_starts(positions) == [[0, 5, 6], [0]]
    batch = packed_batch([[64]])
    batch["position_ids"][:, 20:] += 100  # PoSE
    expected = loss_and_gradients(doll(LlamaConfig, "sdpa"), batch | {"attention_mask": torch.ones(1, 64)})
    assert_equal_training(loss_and_gradients(doll(LlamaConfig, DOCUMENTS), batch), expected)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize(("attention", "squared"), [(DOCUMENTS, False), ("sdpa", True)])
def test_nothing_is_as_large_as_a_mask(attention, squared):
    length = 2048
    model, positions = doll(LlamaConfig, attention), torch.arange(length)[None] % 700
    with LargestTensor() as seen:
        hidden_states(model, torch.ones(1, length, dtype=torch.long), positions).sum().backward()
    assert (seen.elements >= length**2) == squared


def test_documents_take_no_cache():
    model, ids = new_llama(seed=0, attn_implementation=DOCUMENTS).eval(), torch.arange(9)[None]
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="takes no cache"):
        model(ids[:, :1], past_key_values=cache)


def test_packed_documents_are_attended_one_by_one(base_folder):
    """By the textbook's sum, each document alone."""
    model = load_base(base_folder, PLAIN, dtype="float32", quantized=False, attention=DOCUMENTS)
    batch = packed_batch()
    whole = hidden_states(model, batch["input_ids"], batch["position_ids"])
    for ids, states, row in zip(batch["input_ids"], whole, PACKED, strict=True):
        edges = [0, *torch.tensor(row).cumsum(0).tolist()]
        for begin, end in pairwise(edges):
            alone = hidden_states(model, ids[None, begin:end])[0]
            torch.testing.assert_close(states[begin:end], alone, rtol=1e-4, atol=1e-5)


def attended(attend, dtype, *tensors):
    """The output, and the gradients of queries, keys and values."""
    grad, *leaves = (tensor.to(dtype, copy=True) for tensor in tensors)
    output = attend(*(leaf.requires_grad_() for leaf in leaves), 0.1)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def torchs_attention(query, key, value, scale):
    mask = causal_lower_right(query.shape[2], key.shape[2]) if key.shape[2] > query.shape[2] else None
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True)


@pytest.mark.parametrize(("heads", "shared", "length"), [(9, 3, 700), (4, 4, 512), (8, 2, 130)])
@pytest.mark.parametrize("before", [0, 300])
def test_our_attention_on_cpus_is_torchs(heads, shared, length, before):
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, length), (heads, length), (shared, before + length), (shared, before + length)
    tensors = [torch.randn(1, tokens, count, 64, generator=generator).transpose(1, 2) for count, tokens in sizes]
    tensors[1] *= 4  # weights that differ
    exact = attended(torchs_attention, torch.float64, *(tensor.bfloat16() for tensor in tensors))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        rounded = tensors if dtype == torch.float32 else [tensor.bfloat16() for tensor in tensors]
        ours, theirs = (attended(one, dtype, *rounded) for one in (_CausalOnCPU.apply, torchs_attention))
        for found, expected in zip(ours, theirs if dtype == torch.float32 else exact, strict=True):
            assert (found - expected).norm() <= tolerance * expected.norm(), dtype


class WorstHeap(TorchDispatchMode):
    """The bytes that a heap grows to whose freed blocks never merge: each takes again what is no larger than it."""

    def __init__(self):
        super().__init__()
        self.size, self.free, self.live = 0, [], set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.take(storage)
        return output

    def take(self, storage):
        block = min((one for one in self.free if one >= storage.nbytes()), default=0)
        if block:
            self.free.remove(block)
        else:
            block = storage.nbytes()
            self.size += block
        self.live.add(storage._cdata)
        weakref.finalize(storage, self.release, storage._cdata, block)

    def release(self, place, block):
        self.live.remove(place)
        self.free.append(block)


def test_the_heap_does_not_grow_with_the_tiles_of_our_attention_on_cpus():
    """oneDNN keeps kernels between them, so freed blocks do not merge. 131,072 tokens took 10.9 GiB when tiles grew."""
    query, key, value = (torch.randn(1, heads, 4096, 16).bfloat16().requires_grad_() for heads in (4, 1, 1))
    with WorstHeap() as forward:
        output = _CausalOnCPU.apply(query, key, value, 0.1)
    with WorstHeap() as backward:
        output.sum().backward()
    for heap in (forward, backward):
        assert heap.size < 8 * (2 * TILE * 4 * 4096)  # 3 and 4 of 32 tiles; with the smallest first 17 and 35


def names_of(node):
    """Of the functions in a graph."""
    waiting, seen = [node], set()
    while waiting:
        if (one := waiting.pop()) and one not in seen:
            seen.add(one)
            waiting += [before for before, _ in one.next_functions]
    return {one.name() for one in seen}


@pytest.mark.parametrize(
    ("dtype", "length", "ours"), [("bfloat16", 600, True), ("bfloat16", 64, False), ("float32", 600, False)]
)
def test_documents_take_it_in_bf16_where_they_are_long(dtype, length, ours):
    model, plain = (new_llama(seed=0, num_attention_heads=4, num_key_value_heads=2) for _ in range(2))
    model.set_attn_implementation(DOCUMENTS)
    ids = torch.randint(2, 100, (2, length), generator=torch.Generator().manual_seed(0))
    losses = [one.to(getattr(torch, dtype))(input_ids=ids, labels=ids, use_cache=False).loss for one in (model, plain)]
    assert ["_CausalOnCPUBackward" in names_of(loss.grad_fn) for loss in losses] == [ours, False]
    assert torch.allclose(*losses, rtol=1e-3 if ours else 0, atol=0)
