import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import new_llama
from llama_long_utils.model.loss import hidden_states, next_token_nll

VOCABULARY = 1000


def problem(length=300, ignored=0, seed=0):
    torch.manual_seed(seed)
    head = torch.nn.Linear(32, VOCABULARY, bias=False)
    hidden = torch.randn(2, length, 32, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, length))
    labels[:, :ignored] = -100
    return hidden, head, labels


def plain(hidden, head, labels):
    logits = head(hidden)[:, :-1].reshape(-1, VOCABULARY)
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")


@pytest.mark.parametrize("ignored", [0, 40, 130])
def test_trap_10_chunked_sum_is_the_plain_sum_with_every_gradient(ignored):
    hidden, head, labels = problem(ignored=ignored)
    expected = torch.autograd.grad(plain(hidden, head, labels), [hidden, head.weight])
    found = torch.autograd.grad(next_token_nll(hidden, head, labels, chunk=64), [hidden, head.weight])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_trap_10_a_mean_of_chunk_means_is_wrong_and_an_all_masked_text_is_zero():
    hidden, head, labels = problem(ignored=130)
    total = next_token_nll(hidden, head, labels, chunk=64) / (labels[:, 1:] != -100).sum()
    flat_labels = labels[:, 1:].reshape(-1)
    flat = head(hidden)[:, :-1].reshape(-1, VOCABULARY)
    parts = [F.cross_entropy(a, b) for a, b in zip(flat.split(64), flat_labels.split(64), strict=True)]
    assert torch.isnan(torch.stack(parts).mean())  # the trap
    assert torch.isfinite(total)
    nothing = next_token_nll(hidden, head, torch.full_like(labels, -100))
    assert nothing.item() == 0
    assert not torch.isnan(torch.autograd.grad(nothing, hidden)[0]).any()


def test_trap_12_head_gradient_accumulates_in_fp32():
    hidden, head, labels = problem(length=2000)
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16().float())
    exact = torch.autograd.grad(plain(hidden.double(), head.double(), labels), head.weight)[0]
    head.float()
    ours = torch.autograd.grad(next_token_nll(hidden, head, labels, chunk=16), head.weight)[0].double()
    drifting = torch.zeros_like(head.weight, dtype=torch.bfloat16)
    for start in range(0, 1999, 16):
        piece = next_token_nll(hidden[:, start : start + 17], head, labels[:, start : start + 17])
        drifting += torch.autograd.grad(piece, head.weight)[0].bfloat16()
    scale = exact.abs().max()
    assert (ours - exact).abs().max() / scale < 1e-5
    assert (drifting.double() - exact).abs().max() / scale > 1e-3


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_trap_23_logits_of_the_whole_text_never_exist():
    hidden, head, labels = problem(length=1000)
    with LargestTensor() as seen:
        next_token_nll(hidden, head, labels, chunk=64).backward()
        next_token_nll(hidden, head, labels, reduction="none", chunk=64)
    assert seen.elements < 0.2 * 2 * 1000 * VOCABULARY
    with LargestTensor() as seen:
        plain(hidden, head, labels)
    assert seen.elements >= 2 * 999 * VOCABULARY  # the test sees them where they do exist


def test_trap_23_cached_and_uncached_passes_never_mix():
    model = new_llama(seed=0)
    used = []
    model.model.register_forward_hook(lambda _module, _inputs, output: used.append(output.past_key_values))
    hidden_states(model, torch.arange(20)[None])
    assert used == [None]


def test_every_token_alone_sums_to_the_sum():
    hidden, head, labels = problem(ignored=10)
    alone = next_token_nll(hidden, head, labels, reduction="none")
    assert alone.shape == (2, 299)
    assert alone[:, :9].eq(0).all()
    torch.testing.assert_close(alone.sum(), next_token_nll(hidden, head, labels))


@pytest.mark.parametrize("trained", [True, False])
def test_loss_and_gradients_are_those_of_torch(trained):
    hidden, head, labels = problem(ignored=40)
    head.requires_grad_(trained)
    wanted = [hidden, head.weight] if trained else [hidden]
    theirs = F.linear_cross_entropy(
        hidden[:, :-1].reshape(-1, 32), head.weight, labels[:, 1:].reshape(-1), reduction="sum", ignore_index=-100
    )
    ours = next_token_nll(hidden, head, labels, chunk=50)
    torch.testing.assert_close(ours, theirs)
    pairs = zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


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
