"""A model as lm-evaluation-harness asks it, with every answer kept on disk.

The harness' own `HFLM` does not serve. It puts no BOS before a text where the tokenizer adds none, as SmolLM2's does.
It computes logits of whole prompts: those of 32,768 tokens over a vocabulary of 49,152 are 6 GiB in fp32. It cuts a
prompt that is longer than the window, and reads one twice whose answer is both read and written. The harness keeps
answers as pickles, and loads a model to find that all are there.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import DynamicCache, PreTrainedTokenizerBase

from llama_long_utils.cache import Cache
from llama_long_utils.evaluation.generation import likelihoods, write
from llama_long_utils.model.loss import Model, in_compute_dtype

KEPT_CHARACTERS = 200_000  # of prompts that are answered between two writes of a file, in at most KEPT_PROMPTS of them
KEPT_PROMPTS = 512

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class Llama(TemplateLM):
    """A model, asked by the harness. It cuts no prompt: see `check_lengths`.

    `load` gives the model and is called when an answer is missing. The inputs of `cache`, which keeps the answers, must
    name the model; `arm` is its name in files and progress lines.
    """

    def __init__(
        self, load: Callable[[], Model], tokenizer: PreTrainedTokenizerBase, cache: Cache | None = None, arm: str = ""
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tokens: dict[tuple[str, str], int] = {}  # of each continuation that was asked about
        self._load, self._cache, self._arm = load, cache, arm

    @functools.cached_property
    def model(self) -> Model:
        """The model, loaded when it is first asked."""
        return self._load()

    @property
    def eot_token_id(self) -> int:
        """What stands before a continuation that has no context: BOS."""
        return self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Token ids, BOS first unless `add_special_tokens` is False or the text starts with it."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        bos = [] if add_special_tokens is False or ids[:1] == [self.eot_token_id] else [self.eot_token_id]
        return bos + ids

    def loglikelihood(self, requests: list[Instance], **_options: Any) -> list[tuple[float, bool]]:
        """For each request the log-probability of the continuation in nats, and whether greedy decoding writes it."""
        answers = self._kept("loglikelihood", requests, functools.partial(super().loglikelihood, disable_tqdm=True))
        self.tokens |= {request.args: tokens for request, (_, _, tokens) in zip(requests, answers, strict=True)}
        return [(likelihood, greedy) for likelihood, greedy, _ in answers]

    def generate_until(self, requests: list[Instance], **_options: Any) -> list[str]:
        """What is written after each prompt, up to a stop text."""
        return self._kept("generate_until", requests, self._write)

    def read_and_write(self, requests: list[Instance]) -> list[dict[str, Any]]:
        """For each request what is `written`, and `answer_nll`: that of its option `right`, in nats per token."""
        return self._kept("read_and_write", requests, lambda part: [self._read_and_write(request) for request in part])

    def loglikelihood_rolling(self, requests: list[Instance], **_options: Any) -> list[float]:
        raise NotImplementedError  # `check_kind` has refused such a task

    def _kept(self, kind: str, requests: list[Instance], ask: Callable[[list[Instance]], list[Any]]) -> list[Any]:
        """Answers in the order of the requests; one file for each task, shortest prompts first."""
        if self._cache is None:
            return ask(requests)
        answers: dict[int, Any] = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            numbers = [number for number, request in enumerate(requests) if request.task_name == task]
            numbers.sort(key=lambda number: len(requests[number].args[0]))
            found = self._cache.items(
                f"{self._arm}-{task}-{kind}",
                [requests[number] for number in numbers],
                ask,
                item_key=lambda request: request.args,
                at_once=max(1, min(KEPT_PROMPTS, KEPT_CHARACTERS // (len(requests[numbers[-1]].args[0]) + 1))),
                progress=f"{task}, {self._arm}, {kind}",
            )
            answers |= zip(numbers, found, strict=True)
        return [answers[number] for number in range(len(requests))]

    def _loglikelihood_tokens(self, requests: list[Any], **_options: Any) -> list[Any]:
        """As `likelihoods`, of (texts, token ids of the context, token ids of the continuation)."""
        return likelihoods(self.model, [(context, continuation) for _, context, continuation in requests])

    def _logits(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        with in_compute_dtype(self.model):
            return self.model(input_ids=ids.to(self.model.device), **options).logits

    def _write(self, requests: Sequence[Instance], **options: Any) -> list[str]:
        written = []
        for given, group in itertools.groupby(requests, key=lambda request: request.args[1]):
            settings = normalize_gen_kwargs(given)
            prompts = [np.array(self.tok_encode(request.args[0])) for request in group]
            stops = [stop for stop in settings["until"] if stop]
            options |= {"tokens": settings["max_gen_toks"], "stops": stops}
            written += write(self.model, self.tokenizer, prompts, **options)
        return written

    @torch.no_grad()
    def _read_and_write(self, request: Instance) -> dict[str, Any]:
        """The prompt is read once: its keys and values serve both, which halves the time of a long prompt."""
        context, right = self._encode_pair(request.args[0], request.args[1]["right"])
        ids, start, cache = torch.tensor([context + right]), len(context) - 1, DynamicCache(config=self.model.config)
        self._logits(ids[:, :start], past_key_values=cache, logits_to_keep=1)
        logits = self._logits(ids[:, start:-1], past_key_values=cache)[0]
        likelihood = logits.float().log_softmax(-1).gather(-1, torch.tensor(right, device=logits.device)[:, None]).sum()
        cache.crop(-len(right))
        (written,) = self._write([request], past_key_values=cache)
        return {"answer_nll": -float(likelihood) / len(right), "written": written}


def check_kind(task: Any) -> None:
    """Raise ValueError if what a task asks for is not answered here: whole texts, and answers drawn at random."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ValueError(f"{task.config.task} measures perplexity on whole texts: use 06_perplexity_by_position")
    if normalize_gen_kwargs(getattr(task.config, "generation_kwargs", None) or {})["do_sample"]:
        raise ValueError(f"{task.config.task} draws its answers at random: only greedy ones are written")


def check_lengths(requests: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, window: int) -> None:
    """Raise ValueError unless every prompt fits into the window, with its continuation or room to write."""
    over: dict[int, int] = {}
    for request in (one for one in requests if len(one.args) == 2):  # whole texts are refused where they are asked
        prompt, after = request.args
        if isinstance(after, str):
            texts = {prompt + after: 0}
        else:
            texts = {prompt + after.get("right", ""): 0, prompt: normalize_gen_kwargs(after)["max_gen_toks"]}
        for text, room in texts.items():
            if len(text.encode()) + 1 + room > window:  # a token has at least one byte
                needed = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1 + room
                over[id(request)] = max(needed, over.get(id(request), 0))
    over = [tokens for tokens in over.values() if tokens > window]
    if over:
        raise ValueError(
            f"{requests[0].task_name}: {len(over):,} of {len(requests):,} prompts do not fit into the window of "
            f"{window:,} tokens (the longest needs {max(over):,}): ask at shorter lengths, or use a longer window"
        )
