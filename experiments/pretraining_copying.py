"""Does a late switch keep what far context is worth, to a model that uses it? The tiny Llama, trained on.

The models from scratch gain next to nothing from far context: what a late switch may lose could not be seen. Models of
0.4M parameters did not learn to copy from their context either, in pilot runs of one seed and 200 to 400 steps: from
texts that quote themselves, with a loss on where heads should look, or from facts of two tokens that recur.
The tiny Llama copies within its window of 512 tokens. So it is trained on, all its weights, by the arms of
pretraining.py: equal tokens, a part of the sequences long, RoPE base raised at the switch, a third of the sequences
quoting themselves at any distance. The seeds are orders of the texts.

Expected: copying from beyond 1,024 tokens after the switch at 80% is not worse than after long sequences throughout by
more than its interval; after the switch at 95%, with three long steps at the end of the learning rate's decay, it is.
If the switch at 80% is worse beyond its interval, a late switch costs what NLL does not show. It is called equal if a
loss of two points of right tokens is excluded.

The first order of the texts said otherwise: after the switch at 80% copying was worse, near as well as far. An excerpt
whose original stands in another short sequence cannot be continued, and may teach not to copy. So "in-reach" was added,
the switch at 80% whose short sequences quote only what stands in them. Expected, if that is the reason: it copies as
well as "long". And "continued", which has a learning rate of its own after the switch. Expected, if the reason is that
the learning rate has nearly decayed by then: it copies better than the switch. That order is one of the three tested.
"""

from itertools import pairwise, product

import numpy as np
import pandas as pd
import torch
from transformers import LlamaForCausalLM

from experiments.pretraining import held_out_stretches
from experiments.pretraining_cells import LONG, PRESET
from experiments.pretraining_mix import PIECE
from llama_long_utils.data.packing import with_excerpts
from llama_long_utils.model.loss import hidden_states

DISTANCES = [0, 1, 256, 512, 1024, 2048, 4096]  # from an excerpt back to what it quotes: edges; 0 is text of its own
SKIPPED = 4  # first tokens of an excerpt, from which nobody can know what is quoted


@torch.no_grad()
def measure_copying(model: LlamaForCausalLM) -> dict[str, pd.DataFrame]:
    """How well excerpts in held-out texts are continued: document, distance_low, distance_high, tokens, hits, nats.

    `hits` are tokens that the model holds for the most probable one. It reads all 4,096 tokens at once. The arm "short"
    was not trained on most of these positions. Tables: "copying", and "copying_short" of the first 1,024 tokens alone,
    which every data mix trains.
    """
    generator = np.random.default_rng(PRESET.evaluation.seed)
    ends = {"copying": LONG, "copying_short": PIECE}
    rows: dict[str, list[tuple[str, int, int, int, int, float]]] = {name: [] for name in ends}
    for (stretch,) in held_out_stretches(1):
        ids, source = with_excerpts(stretch.token_ids.astype(np.int64), generator)
        tokens = torch.from_numpy(ids)[None].to(model.device)
        scores = (hidden_states(model, tokens)[0].float() @ model.lm_head.weight.T)[:-1]
        nats = torch.nn.functional.cross_entropy(scores, tokens[0, 1:], reduction="none").cpu().numpy()
        hits = (scores.argmax(dim=1) == tokens[0, 1:]).cpu().numpy()
        distance = continued_from(source)[1:]
        for (low, high), (name, end) in product(pairwise(DISTANCES), ends.items()):
            there = np.flatnonzero((distance >= low) & (distance < high))
            there = there[there < end - 1]
            sums = len(there), int(hits[there].sum()), float(nats[there].sum())
            rows[name].append((f"{stretch.source}/{stretch.name}", low, high, *sums))
    columns = ["document", "distance_low", "distance_high", "tokens", "hits", "nats"]
    return {name: pd.DataFrame(part, columns=columns) for name, part in rows.items()}


def continued_from(source: np.ndarray) -> np.ndarray:
    """How far back each token's original stands; 0 in text of its own, -1 at the first tokens of an excerpt."""
    distance = np.where(source >= 0, np.arange(len(source)) - source, 0)
    same = [np.concatenate([np.zeros(k, bool), distance[k:] == distance[:-k]]) for k in range(1, SKIPPED + 1)]
    return np.where((distance == 0) | np.logical_and.reduce(same), distance, -1)
