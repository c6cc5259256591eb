"""First-sentence retrieval: can the model repeat how a long text began?

The task of Llama 2 Long's Figure 5b (arXiv:2309.16039, section 4.1), whose prompt is not printed. A passage
starts with a sentence and goes on for thousands of tokens; then the first words of that sentence stand
there once more, and the model continues them. That needs no instruction tuning, only copying over a distance.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_long_utils.documents import TokenizedDocument
from llama_long_utils.loss import in_compute_dtype
from llama_long_utils.presets import Retrieval

SENTENCE = re.compile(r"(?<=[.!?]\s)[A-Z][^.!?]*[.!?](?=\s)")


@dataclass(frozen=True)
class RetrievalItem:
    """A question: `prompt`, int64 of shape (length - answer tokens,), ends in the cue; `answer` should follow."""

    document: str
    prompt: np.ndarray
    answer: str


def first_sentence_items(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    settings: Retrieval,
    *,
    seed: int,
) -> list[RetrievalItem]:
    """Questions about as many documents as the settings say, prompt and answer `length` tokens together.

    The passage begins at a random sentence, since the openings of documents may be known by heart.

    Args:
        length: tokens of the passage, the cue and the room for the answer.
        settings: how many words of the sentence are given again after the passage (`cue_words`), and the
            least and largest number of words that are then asked for (`answer_words`).
        seed: of the places; a document shows the same sentence at every length of the settings.

    Raises:
        ValueError: no document has a fitting sentence with enough text after it.
    """
    items = []
    fewest, most = (settings.cue_words + words for words in settings.answer_words)
    for number in np.random.default_rng(seed).permutation(len(documents)):
        if len(items) == settings.documents:
            break
        document = documents[number]
        text = tokenizer.decode(document.token_ids[1:-1], clean_up_tokenization_spaces=False)
        reach = max([length, *(other for other in settings.lengths if other < document.tokens)])
        last_start = len(text) * (1 - reach / document.tokens)
        generator = np.random.default_rng([seed, number])
        sentences = [m for m in SENTENCE.finditer(text) if fewest <= len(m[0].split()) <= most]
        sentences = [sentences[index] for index in generator.permutation(len(sentences))]
        sentence = next((m for m in sentences if m.start() < last_start), None)
        if sentence is None:
            continue
        words = sentence[0].split()
        cue, answer = " ".join(words[: settings.cue_words]), " ".join(words[settings.cue_words :])
        ending = _ids(tokenizer, f"\n\n{cue}")
        room = length - settings.answer_tokens - len(ending) - 1
        passage = _ids(tokenizer, text[sentence.start() : sentence.start() + 12 * length])[:room]
        prompt = np.concatenate([[tokenizer.bos_token_id], passage, ending]).astype(np.int64)
        if len(prompt) == length - settings.answer_tokens:
            items.append(RetrievalItem(f"{document.source}/{document.name}", prompt, answer))
    if not items:
        raise ValueError(
            f"no document holds a sentence of {fewest} to {most} words with {length:,} tokens from there on: "
            "ask at shorter lengths or hold out longer documents"
        )
    return items


@torch.no_grad()
def answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RetrievalItem],
    settings: Retrieval,
) -> list[str]:
    """What the model writes after each prompt, by greedy decoding: `answer_tokens` tokens or up to EOS."""
    model.eval()
    written: list[str] = []
    for start in range(0, len(items), settings.prompts_at_once):
        prompts = np.stack([item.prompt for item in items[start : start + settings.prompts_at_once]])
        ids = torch.from_numpy(prompts).to(model.device)
        with in_compute_dtype(model):
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.answer_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        written += tokenizer.decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return written


def rouge_l(answer: str, written: str) -> float:
    """ROUGE-L (Lin, 2004) of what was written, cut to as many words as the answer has: F1 of the longest common
    subsequence of lower-case words, from 0 to 100. The model is not told where to stop, hence the cut."""
    wanted, found = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, written))
    found = found[: len(wanted)]
    longest = np.zeros((len(wanted) + 1, len(found) + 1))
    for row, word in enumerate(wanted):
        for column, other in enumerate(found):
            longest[row + 1, column + 1] = (
                longest[row, column] + 1 if word == other else max(longest[row, column + 1], longest[row + 1, column])
            )
    return 200 * float(longest[-1, -1]) / max(len(wanted) + len(found), 1)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
