"""A loaded model as lm-evaluation-harness sees it, with every answer kept on disk.

The harness takes a 4-bit base with adapter and RoPE as it is (`HFLM(pretrained=model)`). What it lacks is added here:

- BOS starts every text. The harness leaves it out where the tokenizer adds none, as SmolLM2's does.
- Logits exist for continuations only. Those of 32,768 tokens over a vocabulary of 49,152 are 6 GiB in fp32.
- Texts run together by tokens, not by number.
- A prompt that is longer than the window is refused. The harness cuts it on the left and goes on.
- Answers are kept as JSON with a checksum, and a model is loaded only if one is missing. The harness keeps pickles.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_long_utils.cache import Cache
from llama_long_utils.model.loss import in_compute_dtype

Model = PreTrainedModel | PeftModel
READ_AT_ONCE = 1024  # tokens of padded texts in one forward pass: fewer pad less and stay in a CPU's caches
WRITE_AT_ONCE = 4096  # tokens of padded prompts that are continued together
ANY_NUMBER = 2**31  # of texts at once: tokens set the limit
KEPT_CHARACTERS = 200_000  # of prompts that are answered between two writes of a file, in at most KEPT_PROMPTS of them
KEPT_PROMPTS = 512

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class Llama(HFLM):
    """A loaded model, asked by the harness. Prompts have to fit into `window` tokens (see `check_lengths`)."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=window,
            batch_size=ANY_NUMBER,
            softmax_dtype="float32",
        )
        self._kept_logits = 0
        self.tokens: dict[tuple[str, str], int] = {}  # of each continuation that was read

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Token ids, BOS first unless `add_special_tokens` is False or the text starts with it."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        bos = [] if add_special_tokens is False or ids[:1] == [self.prefix_token_id] else [self.prefix_token_id]
        return bos + ids

    def tok_batch_encode(self, strings: list[str], **_options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask of prompts, each of shape (prompts, longest), padded on the left."""
        rows = [torch.tensor(self.tok_encode(string)) for string in strings]
        options = {"batch_first": True, "padding_side": "left"}
        ids = torch.nn.utils.rnn.pad_sequence(rows, padding_value=self.tokenizer.pad_token_id, **options)
        return ids, torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **options)

    def _model_call(self, inps: torch.Tensor, **_options: Any) -> torch.Tensor:
        with torch.no_grad(), in_compute_dtype(self.model):
            return self.model(input_ids=inps, logits_to_keep=self._kept_logits, use_cache=False).logits

    def _model_generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad(), in_compute_dtype(self.model):
            return super()._model_generate(*arguments, **options)

    def _loglikelihood_tokens(self, requests: list[Any], **_options: Any) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether greedy decoding would write it.

        Continuations of one token after the same prompt (letters) share a pass. Padding is on the right, where causal
        attention never sees it.

        Args:
            requests: (texts, token ids of the context, token ids of the continuation).
        """
        readings: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            readings.setdefault((*context, *continuation[:-1]), []).append(number)
        answers: list[Any] = [None] * len(requests)
        texts = list(readings)
        for batch in _batches([len(text) for text in texts], READ_AT_ONCE):
            numbers = [number for text in batch for number in readings[texts[text]]]
            part = [requests[number] for number in numbers]
            # The first token of a continuation is predicted at the last of its context. The harness counts from the
            # end, so it finds every continuation among the last logits.
            self._kept_logits = len(texts[batch[-1]]) - min(len(context) for _, context, _ in part) + 1
            for number, answer in zip(numbers, super()._loglikelihood_tokens(part, disable_tqdm=True), strict=True):
                answers[number] = answer
                asked, _, continuation = requests[number]
                self.tokens[asked] = len(continuation)
        return answers

    def generate_until(self, requests: list[Instance], **_options: Any) -> list[str]:
        """What the model writes after each prompt, by greedy decoding, up to a stop text."""
        answers = [""] * len(requests)
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        for batch in _batches(lengths, WRITE_AT_ONCE):
            written = super().generate_until([requests[number] for number in batch], disable_tqdm=True)
            for number, answer in zip(batch, written, strict=True):
                answers[number] = answer
        return answers


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of texts, shortest first, as many together as fit into `tokens` when padded to the longest of them."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if batch and (len(batch) + 1) * lengths[number] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class KeptAnswers(LM):
    """Gives the answers that are on disk, and asks the model for the others. A stopped run goes on where it was.

    Args:
        cache: its inputs are all that the model's answers depend on.
        arm: name of the model, for files and progress lines.
        load: gives the model; called only if an answer is missing.
    """

    def __init__(self, cache: Cache, arm: str, load: Callable[[], Llama]) -> None:
        super().__init__()
        self.tokens: dict[tuple[str, str], int] = {}  # of each continuation that was asked about
        self._cache, self._arm, self._load = cache, arm, load
        self._llama: Llama | None = None

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each request the log-probability of the continuation in nats, and whether greedy decoding writes it."""
        answers = self._answers("loglikelihood", requests)
        self.tokens |= {request.args: tokens for request, (_, _, tokens) in zip(requests, answers, strict=True)}
        return [(likelihood, greedy) for likelihood, greedy, _ in answers]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What is written after each prompt."""
        return self._answers("generate_until", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not offered."""
        raise ValueError(f"{requests[0].task_name} measures perplexity on whole texts: use 06_perplexity_by_position")

    def _answers(self, kind: str, requests: list[Instance]) -> list[Any]:
        """In the order of the requests; one file for each task, shortest prompts first."""
        answers: dict[int, Any] = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            numbers = [number for number, request in enumerate(requests) if request.task_name == task]
            numbers.sort(key=lambda number: len(requests[number].args[0]))
            found = self._cache.items(
                f"{self._arm}-{task}-{kind}",
                [requests[number] for number in numbers],
                lambda part: self._ask(kind, part),
                item_key=lambda request: request.args,
                at_once=max(1, min(KEPT_PROMPTS, KEPT_CHARACTERS // (len(requests[numbers[-1]].args[0]) + 1))),
                progress=f"{task}, {self._arm}, {kind}",
            )
            answers |= dict(zip(numbers, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _ask(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        if self._llama is None:
            self._llama = self._load()
        answers = getattr(self._llama, kind)(list(requests), disable_tqdm=True)
        if kind == "generate_until":
            return answers
        tokens = [self._llama.tokens[request.args] for request in requests]
        return [[*answer, count] for answer, count in zip(answers, tokens, strict=True)]


def check_lengths(requests: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, window: int) -> None:
    """Raise ValueError unless every prompt fits into the window, with its continuation or room to write."""
    longest, over = 0, 0
    for request in requests:
        prompt, after = request.args
        room = after.get("max_gen_toks", 256) if isinstance(after, dict) else 0
        text = prompt + ("" if room else after)
        if len(text.encode()) + 1 + room <= window:  # a token has at least one byte
            continue
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1 + room
        longest, over = max(longest, tokens), over + (tokens > window)
    if over:
        raise ValueError(
            f"{requests[0].task_name}: {over:,} of {len(requests):,} prompts do not fit into the window of {window:,} "
            f"tokens (the longest needs {longest:,}): ask at shorter lengths, or use a preset with a longer window"
        )
