"""Causal attention within the documents of packed sequences, without a mask; a sequence may be shared by processes.

transformers' "sdpa" finds the documents in the positions, too, but turns them into a mask of length x length: 1 GiB at
32,768 tokens, with which torch leaves its fastest kernels. Here each document is a call without a mask. torch's context
parallelism takes neither packed sequences nor a CPU; ours is `ContextShare`. In bf16 on a CPU attention is ours, too
(`_CausalOnCPU`).
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llama_long_utils.model.loss import Model, causal_lm

DOCUMENTS = "documents"  # what load_base calls it


@dataclass(frozen=True)
class ContextShare:
    """The tokens that a process holds of every sequence, which `size` processes share.

    Of 2 x `size` equal chunks it has number `rank` from the front and from the back, so that all processes have as
    many pairs of tokens to multiply. Without a `group` nothing is sent, as for counting memory.
    """

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None

    def of(self, whole: Tensor, dim: int) -> Tensor:
        """This process' tokens of all of them."""
        if self.size == 1:
            return whole
        chunks = whole.chunk(2 * self.size, dim)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]], dim)

    def gather(self, own: Tensor, dim: int) -> Tensor:
        """All tokens, in order, of which each process gives its own."""
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        if self.group:
            distributed.all_gather(parts, own.contiguous(), group=self.group)
        front, back = zip(*(part.chunk(2, dim) for part in parts), strict=True)
        return torch.cat([*front, *reversed(back)], dim)

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Where its chunks begin and end, if it holds `length` tokens."""
        if self.size == 1:
            return [(0, length)]
        chunk = length // 2
        return [(place * chunk, (place + 1) * chunk) for place in (self.rank, 2 * self.size - 1 - self.rank)]


ALONE = ContextShare()


def share_context(model: Model, share: ContextShare) -> None:
    """Let a model take its process' share of each sequence, by "documents" attention."""
    causal_lm(model).config._attn_implementation = DOCUMENTS
    for layer in (module for module in model.modules() if hasattr(module, "num_key_value_groups")):
        layer.context_share = share


class _Gather(torch.autograd.Function):
    """All processes' keys or values; backwards, each gets the sum of the gradients of its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, share: ContextShare) -> Tensor:
        ctx.share = share
        return share.gather(own, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        share = ctx.share
        parts = [ContextShare(rank, share.size).of(grad, 2) for rank in range(share.size)]
        total = torch.empty_like(parts[share.rank])
        if share.group:
            distributed.reduce_scatter(total, parts, group=share.group)
        return total, None


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    position_ids: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention's output, shape (batch, length, heads, head_dim), where no token sees another document.

    A document starts where the positions do not rise; a jump forwards (PoSE) stays within one.

    Shapes: query (batch, heads, length, head_dim), position_ids (batch or 1, length). Keys and values may have fewer
    heads. With a `ContextShare` all of them are this process' tokens.

    Raises:
        ValueError: there are keys from a cache.
    """
    if key.shape[2] != query.shape[2]:
        raise ValueError('attention = "documents" is for training and takes no cache: generate with "sdpa"')
    share = vars(module).get("context_share", ALONE)
    if share.size > 1:
        position_ids = share.gather(position_ids, 1)
        key, value = _Gather.apply(key, share), _Gather.apply(value, share)
    starts = document_starts(position_ids)
    if share.size == 1 and all(row == [0] for row in starts) and not _is_ours(query, dropout):
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, dropout=dropout)
    starts *= len(query) // len(starts)
    spans, outputs = share.spans(query.shape[2]), []
    for row, *states in zip(starts, query.split(1), key.split(1), value.split(1), strict=True):
        pieces = []
        for (begin, end), queries in zip(spans, states[0].split(query.shape[2] // len(spans), dim=2), strict=True):
            first = row[bisect_right(row, begin) - 1]  # where the document starts that the chunk begins in
            inside = [start for start in row if begin < start < end]
            lengths = [[b - a for a, b in pairwise([edge, *inside, end])] for edge in (begin, first)]
            seen = [kept[:, :, first:end] if end - first < kept.shape[2] else kept for kept in states[1:]]
            # Split, not sliced: the gradients of slices would each be as long as the sequence.
            split = queries.split(lengths[0], 2), *(kept.split(lengths[1], 2) for kept in seen)
            pieces += [_attend(*piece, scaling, dropout).transpose(1, 2) for piece in zip(*split, strict=True)]
        outputs.append(torch.cat(pieces, dim=1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0], None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """Causal attention of one document's last tokens to all of it."""
    # For fewer queries than keys a CPU keeps a mask, without ours; a GPU's kernel needs none.
    square = query.shape[2] == key.shape[2] or isinstance(query, FakeTensor)
    if _is_ours(query, dropout, square):
        return _CausalOnCPU.apply(query, key, value, scaling)
    mask = None if square else causal_lower_right(query.shape[2], key.shape[2])
    options = {"dropout_p": dropout, "scale": scaling, "is_causal": square}
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=len(key[0]) < len(query[0]), **options)


TILE = 128  # tokens of queries whose weights exist at once
FUTURE = torch.full((TILE, TILE), -torch.inf).triu(1)  # added to scores that a query (dim 0) must not see
LEAST = 512  # tokens of a document, below which many small products take longer


def _is_ours(query: Tensor, dropout: float, square: bool = True) -> bool:
    if dropout or query.is_cuda or isinstance(query, FakeTensor) or not query.requires_grad:
        return False
    return not square or (query.dtype == torch.bfloat16 and query.shape[2] >= LEAST)


class _CausalOnCPU(torch.autograd.Function):
    """Products of tiles in bf16, for which CPUs have instructions.

    torch's own kernels took 1.9 times as long forwards, 2.2 times backwards (2,048 tokens of SmolLM2's heads,
    AVX512-BF16, one thread). A product rounds its result to bf16. So what is subtracted from it, the largest or the
    logsumexp of the scores, is one more column of the factors: weights that count are then rounded near 1.
    Shapes: (1, heads, length, head_dim); keys and values may have fewer heads, and begin before the queries do.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (_, heads, length, width), shared, before = query.shape, key.shape[1], key.shape[2] - query.shape[2]
        groups, ctx.scale = heads // shared, scale
        future = FUTURE.to(query.dtype).repeat_interleave(groups, 0)
        left = torch.stack([F.pad(_token_after_token(part), (0, 2)) for part in (query * scale)[0].split(groups)])
        output = torch.empty(length, shared, groups, width, dtype=query.dtype)
        sums, total = query.new_empty(length * groups, width), torch.empty(shared, length * groups)
        for i in range(shared):
            right, values = F.pad(key[0, i], (0, 2), value=-1.0).T, value[0, i].contiguous()
            for begin in reversed(range(0, length, TILE)):  # the largest first: memory is used again
                end = min(begin + TILE, length)
                rows, seen = slice(begin * groups, end * groups), before + end
                scores = left[i, rows] @ right[:, :seen]
                own, hidden = scores[:, before + begin :], future[: (end - begin) * groups, : end - begin]
                own.add_(hidden)
                left[i, rows, -2] = scores.amax(1)
                torch.mm(left[i, rows], right[:, :seen], out=scores)
                own.add_(hidden)
                torch.sum(scores.exp_(), 1, dtype=torch.float32, out=total[i, rows])
                torch.mm(scores, values[:seen], out=sums[rows])
            output[:, i] = (sums / total[i, :, None]).view(length, groups, width)
        _subtract(left, total.log_().add_(left[..., -2]))
        output = output.flatten(1, 2).transpose(0, 1)[None]
        ctx.save_for_backward(left, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, key, value, output = ctx.saved_tensors
        (_, heads, length, width), shared, before = grad.shape, key.shape[1], key.shape[2] - grad.shape[2]
        groups = heads // shared
        future = FUTURE.T.to(grad.dtype).repeat_interleave(groups, 1)
        grad_query = torch.empty(length, shared, groups, width, dtype=grad.dtype)
        sums, totals = grad.new_empty(length * groups, width), torch.zeros(2, *key.shape[1:])
        for i, heads in enumerate(zip(grad[0].split(groups), output[0].split(groups), strict=True)):
            grads, outputs = map(_token_after_token, heads)
            queries, keys = left[i, :, :width].contiguous(), key[0, i].contiguous()
            lefts = left[i], _subtract(F.pad(grads, (0, 2)), (grads.float() * outputs).sum(1))
            rights = [F.pad(part[0, i], (0, 2), value=-1.0) for part in (key, value)]
            for begin in reversed(range(0, length, TILE)):  # the largest first: memory is used again
                end = min(begin + TILE, length)
                rows, seen = slice(begin * groups, end * groups), before + end
                weights = rights[0][:seen] @ lefts[0][rows].T
                weights[before + begin :].add_(future[: end - begin, : weights.shape[1]])
                totals[1, i, :seen].add_(weights.exp_() @ grads[rows])
                weights *= rights[1][:seen] @ lefts[1][rows].T
                totals[0, i, :seen].add_(weights @ queries[rows])
                torch.mm(weights.T, keys[:seen], out=sums[rows])
            grad_query[:, i] = (sums * ctx.scale).view(length, groups, width)
        return grad_query.flatten(1, 2).transpose(0, 1)[None], *totals[:, None].to(key.dtype), None


def _token_after_token(heads: Tensor) -> Tensor:
    """(heads, length, width) -> (length * heads, width)."""
    return heads.transpose(0, 1).flatten(0, 1)


def _subtract(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows whose last two columns are `numbers`, in two parts, as bf16 holds three digits of them."""
    rows[..., -2] = numbers
    rows[..., -1] = numbers - rows[..., -2]
    return rows


def document_starts(position_ids: Tensor) -> list[list[int]]:
    """For each row, the places where a document starts; shape of the positions: (rows, length)."""
    if isinstance(position_ids, FakeTensor):  # no data: all but the last token are one, which takes the most memory
        return [[0, position_ids.shape[1] - 1] for _ in position_ids]
    starts = [[0] for _ in position_ids]
    for row, place in (position_ids.diff(dim=1) <= 0).nonzero().tolist():
        starts[row].append(place + 1)
    return starts


def _no_mask(*_arguments: Any, attention_mask: Tensor | None = None, **_options: Any) -> None:
    """Nothing; ValueError if padding comes before a token, which would see it."""
    if attention_mask is not None and (attention_mask.int().diff(dim=1) > 0).any():
        raise ValueError('attention = "documents" takes padding at the end of a sequence only')


AttentionInterface.register(DOCUMENTS, document_attention)
AttentionMaskInterface.register(DOCUMENTS, _no_mask)
