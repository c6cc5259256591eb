import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import LORA, new_llama
from llama_long_utils.model import loss
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll, patch_loss

VOCABULARY = 1000


def problem(length=300, ignored=0, seed=0):
    torch.manual_seed(seed)
    head = torch.nn.Linear(32, VOCABULARY, bias=False)
    hidden = torch.randn(2, length, 32, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, length))
    labels[:, :ignored] = -100
    return hidden, head, labels


def plain(hidden, head, labels, reduction="sum"):
    logits = head(hidden)[:, :-1].reshape(-1, VOCABULARY)
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction=reduction)


def assert_near(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("ignored", [0, 40, 130])
@pytest.mark.parametrize("trained", [True, False])
def test_the_chunked_sum_is_the_plain_sum_with_every_gradient(trained, ignored):
    hidden, head, labels = problem(ignored=ignored)
    head.requires_grad_(trained)
    wanted = [hidden, head.weight] if trained else [hidden]
    ours, theirs = next_token_nll(hidden, head, labels, chunk=64), plain(hidden, head, labels)
    assert_near([ours], [theirs])
    assert_near(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted))


@pytest.mark.parametrize("trained", [True, False])
def test_each_token_alone_has_its_gradient_and_sums_to_the_sum(trained):
    hidden, head, labels = problem(ignored=10)
    head.requires_grad_(trained)
    wanted = [hidden, head.weight] if trained else [hidden]
    alone = next_token_nll(hidden, head, labels, reduction="none")
    assert alone.shape == (2, 299)
    assert alone[:, :9].eq(0).all()
    torch.testing.assert_close(alone.sum(), next_token_nll(hidden, head, labels))
    theirs = plain(hidden, head, labels, "none").reshape(2, -1)
    assert_near(torch.autograd.grad(alone.square().sum(), wanted), torch.autograd.grad(theirs.square().sum(), wanted))


def test_a_mean_of_chunk_means_is_wrong_and_a_text_without_labels_is_zero():
    hidden, head, labels = problem(ignored=130)
    total = next_token_nll(hidden, head, labels, chunk=64) / (labels[:, 1:] != -100).sum()
    flat_labels = labels[:, 1:].reshape(-1)
    flat = head(hidden)[:, :-1].reshape(-1, VOCABULARY)
    parts = [F.cross_entropy(a, b) for a, b in zip(flat.split(64), flat_labels.split(64), strict=True)]
    assert torch.isnan(torch.stack(parts).mean())  # the trap
    torch.testing.assert_close(total, plain(hidden, head, labels, "mean"))
    for trained in (True, False):
        head.requires_grad_(trained)
        nothing = next_token_nll(hidden, head, torch.full_like(labels, -100))
        assert nothing.item() == 0
        assert torch.autograd.grad(nothing, hidden)[0].eq(0).all()


def test_the_gradient_of_the_head_accumulates_in_fp32():
    """Added up in bf16, chunk after chunk, it drifts."""
    hidden, head, labels = problem(length=2000)
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16().float())
    exact = torch.autograd.grad(plain(hidden.double(), head.double(), labels), head.weight)[0]
    head.float()
    ours = torch.autograd.grad(next_token_nll(hidden, head, labels, chunk=16), head.weight)[0].double()
    drifting = torch.zeros_like(head.weight, dtype=torch.bfloat16)
    for start in range(0, 1999, 16):
        part = next_token_nll(hidden[:, start : start + 17], head, labels[:, start : start + 17])
        drifting += torch.autograd.grad(part, head.weight)[0].bfloat16()
    scale = exact.abs().max()
    assert (ours - exact).abs().max() / scale < 1e-5
    assert (drifting.double() - exact).abs().max() / scale > 1e-3


def test_in_bf16_the_sum_stays_fp32_and_near_the_exact_one():
    hidden, head, labels = problem(length=2000)
    exact = next_token_nll(hidden, head, labels)
    expected = torch.autograd.grad(exact, hidden)[0]
    low = hidden.detach().bfloat16().requires_grad_()
    found = next_token_nll(low, head.bfloat16(), labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)
    gradient = torch.autograd.grad(found, low)[0].float()
    assert (gradient - expected).norm() <= 0.01 * expected.norm()


def test_in_bf16_a_cpu_takes_the_softmax_of_a_few_rows_after_the_other_with_the_same_bits(monkeypatch):
    hidden, head, labels = problem(length=600)
    head, found = head.bfloat16().requires_grad_(False), []
    for rows in (1000, 7):
        monkeypatch.setattr(loss, "CACHED", rows * VOCABULARY)
        low = hidden.detach().bfloat16().requires_grad_()
        nll = next_token_nll(low, head, labels, reduction="none")
        found.append((nll, *torch.autograd.grad(nll.sum(), low)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_second_backward_pass_is_refused():
    """The gradient is scaled in place: scaled twice it would be wrong, and nothing would say so."""
    hidden, head, labels = problem()
    nll = next_token_nll(hidden, head.requires_grad_(False), labels)
    torch.autograd.grad(nll, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        torch.autograd.grad(nll, hidden)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation put out, and the rows multiplied with a vocabulary."""

    elements = rows = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        if function is torch.ops.aten.mm.default and output.shape[1] == VOCABULARY:
            self.rows += len(output)
        return output


def test_logits_of_the_whole_text_never_exist():
    hidden, head, labels = problem(length=1000)
    with LargestTensor() as seen:
        next_token_nll(hidden, head, labels, chunk=64).backward()
        next_token_nll(hidden, head, labels, reduction="none", chunk=64)
    assert seen.elements < 0.2 * 2 * 1000 * VOCABULARY
    with LargestTensor() as seen:
        plain(hidden, head, labels)
    assert seen.elements >= 2 * 999 * VOCABULARY  # the test sees them where they do exist


def test_ignored_labels_are_not_multiplied():
    hidden, head, labels = problem(length=300, ignored=250)
    with LargestTensor() as seen:
        next_token_nll(hidden, head.requires_grad_(False), labels, chunk=64)
    assert seen.rows == 2 * 50


def test_cached_and_uncached_passes_never_mix():
    model = new_llama(seed=0)
    patch_loss(model)
    used = []
    model.model.register_forward_hook(lambda _module, _inputs, output: used.append(output.past_key_values))
    hidden_states(model, torch.arange(20)[None])
    model(torch.arange(20)[None], labels=torch.arange(20)[None], use_cache=True)
    assert used == [None, None]


def batch(rows=4, length=40):
    ids = torch.randint(2, 100, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(rows):  # so that a mean of means differs from the mean over tokens
        labels[row, : 9 * row] = -100
    return ids, labels


def lora_model():
    model = add_lora(new_llama(seed=0), dataclasses.replace(LORA, train_norms=True), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def gradients(model):
    return [weight.grad for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("make", [lora_model, lambda: new_llama(seed=0)], ids=["adapter", "all weights"])
@pytest.mark.parametrize("items", [None, 57])
def test_a_patched_model_has_the_loss_and_gradients_of_transformers(make, items):
    ids, labels = batch()
    options = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    stock, ours = make(), make()
    theirs = stock(ids, labels=labels, **options)
    theirs.loss.backward()
    patch_loss(ours)
    found = ours(ids, labels=labels, **options)
    found.loss.backward()
    assert found.logits is None
    torch.testing.assert_close(found.loss, theirs.loss, rtol=1e-5, atol=0)
    assert_near(gradients(ours), gradients(stock))
    positions = torch.arange(40)[None].expand(4, 40)  # positional arguments, in transformers' order
    again = causal_lm(ours)(ids, torch.ones_like(ids), positions, labels=labels, **options)
    torch.testing.assert_close(again.loss, found.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits)


def test_labels_that_were_shifted_before_give_the_same_loss():
    """As where a sequence is spread over processes: a part's last token has its label in the next part."""
    ids, labels = batch()
    model = new_llama(seed=0)
    patch_loss(model)
    shifted = torch.cat([labels[:, 1:], torch.full((4, 1), -100)], dim=1)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, model(ids, labels=labels).loss)


def test_a_copy_of_a_patched_model_computes_with_its_own_weights():
    ids, labels = batch()
    model = new_llama(seed=0)
    patch_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.zero_()
    assert other(ids, labels=labels).loss.item() != model(ids, labels=labels).loss.item()


def test_a_head_that_is_no_plain_product_is_refused():
    """The weight alone would silently leave its adapter, its bias or a scale out."""
    on_head = get_peft_model(new_llama(seed=0), LoraConfig(target_modules=["lm_head"]))
    with_bias, capped = new_llama(seed=0), new_llama(seed=0)
    with_bias.lm_head = torch.nn.Linear(64, 128)
    capped.config.final_logit_softcapping = 30.0
    for model in (on_head, with_bias, capped):
        with pytest.raises(ValueError, match="hidden states times a weight"):
            patch_loss(model)


def one_process(rank, port, results):
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = lora_model()
    patch_loss(model)
    wrapped = DistributedDataParallel(model)
    ids, labels = batch()
    mine = slice(2 * rank, 2 * rank + 2)
    items = (labels[:, 1:] != -100).sum()
    # As Trainer does it: divided by the labels of all processes, times their number, because DDP averages.
    (2 * wrapped(input_ids=ids[mine], labels=labels[mine], num_items_in_batch=items).loss).backward()
    if rank == 0:
        torch.save(gradients(model), results)
    # First the wrapper: where it is the last to hold the group, it waits for gloo's thread and keeps Python's lock,
    # and that thread may wait for the lock to drop the last work (torch 2.13; one run in four on a busy machine).
    del wrapped
    distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_on_the_whole_batch(tmp_path, free_port):
    multiprocessing.set_forkserver_preload(["llama_long_utils.model.adapters", "peft.tuners.lora"])  # once for both
    given = free_port, tmp_path / "gradients.pt"
    multiprocessing.start_processes(one_process, given, nprocs=2, start_method="forkserver")
    ids, labels = batch()
    model = lora_model()
    model(ids, labels=labels).loss.backward()  # transformers' own loss
    assert_near(torch.load(tmp_path / "gradients.pt"), gradients(model))
