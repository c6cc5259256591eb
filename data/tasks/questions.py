"""What the task files beside this module cannot say: reading packages, solved examples, written answers, scores."""

import gzip
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask

from llama_long_utils.data.packages import Package, read_files
from llama_long_utils.paths import CACHE

Doc = dict[str, Any]


def rows(
    *, package: str, sha256: str, file: str, items: int, cache: str | Path = CACHE, **_: Any
) -> dict[str, Dataset]:
    """The lines of a JSON Lines file in a package, as {"test": ...}.

    Fields are those of the file, with `number` within `topic` (or within all), and `name`.
    """
    content = read_files(Package(package, sha256), file, cache=Path(cache))[file]
    lines = (gzip.decompress(content) if file.endswith(".gz") else content).decode().split("\n")
    found = [json.loads(line) for line in lines if line.strip()]
    found = [row for row in found if row.get("correct_answer") != "answer"]  # MMLU's file has two header rows
    if len(found) != items:
        raise ValueError(f"{file} should hold {items:,} items, found {len(found):,}: delete {package} from data/cache")
    count: Counter[str] = Counter()
    for row in found:
        topic = row.get("topic", "")
        row["number"] = count[topic]
        row["name"] = row.get("id") or row.get("task_id") or f"{topic}/{row['number']}"
        count[topic] += 1
    return {"test": Dataset.from_list(found)}


class NextOnes(ContextSampler):
    """Solved examples: the next questions of the same topic, after its last one the first."""

    def __init__(self, df: Sequence[Doc] | None = None, **options: Any) -> None:
        super().__init__(df, **options)
        self._topics: dict[str, list[Doc]] = {}
        for doc in self.df:
            self._topics.setdefault(doc.get("topic", ""), []).append(doc)

    def sample(self, n: int, eval_doc: Doc, **_: Any) -> list[Doc]:
        """The `n` that follow `eval_doc`."""
        topic = self._topics[eval_doc.get("topic", "")]
        return [topic[(eval_doc["number"] + step) % len(topic)] for step in range(1, n + 1)]


class Written(ConfigurableTask):
    """A task whose answer is written, and of whose right answer the likelihood is read too.

    `doc_to_target` gives that answer, or several of which the first is read. The harness has one request per item.
    """

    def __init__(self, config: Doc) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """One request to write and one to read."""
        write = super().construct_requests(doc, ctx, **options)
        target = self.doc_to_target(doc)
        right = target if isinstance(target, str) else target[0]
        asked = (ctx, f"{self.config.target_delimiter}{right}")
        return [write, Instance("loglikelihood", doc, asked, 1, metadata=options["metadata"])]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, float]:
        """Scores of what was written."""
        return self.config.process_results(doc, results[0])


class WrittenAfterLongPrompt(Written):
    """The same in one request, so that the prompt is read once. Such a prompt fills a batch by itself."""

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """One request for both."""
        write, read = super().construct_requests(doc, ctx, **options)
        asked = (ctx, {**write.args[1], "right": read.args[1]})
        return [Instance("read_and_write", doc, asked, 0, metadata=options["metadata"])]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, float]:
        """Scores of what was written."""
        return super().process_results(doc, [results[0]["written"]])


def without_tags(text: str) -> str:
    """HellaSwag's text without the tags of its wikiHow part, as is customary."""
    text = re.sub(r"\[[^\]]*\]", "", text.replace(" [title]", ". "))
    return re.sub(r" +", " ", text).strip()


def hellaswag_prompt(doc: Doc) -> str:
    """{activity}: {context}"""
    return f"{doc['activity_label']}: {without_tags(doc['ctx'])}"


def hellaswag_endings(doc: Doc) -> list[str]:
    """The four endings."""
    return [without_tags(ending) for ending in doc["endings"]]


def score_number(doc: Doc, written: str) -> dict[str, float]:
    """Whether the number after ####, or else the last one written, is right."""
    marked = re.search(r"####\s*(-?[\d,]*\.?\d+)", written)
    numbers = [marked[1]] if marked else re.findall(r"-?\d[\d,]*(?:\.\d+)?", written)[-1:]
    right = bool(numbers) and float(numbers[0].replace(",", "")) == float(doc["expected"].replace(",", ""))
    return {"exact_match": float(right)}


def score_answer(doc: Doc, written: str) -> dict[str, float]:
    """F1 and exact match of words with the accepted answer that fits best (SQuAD, arXiv:1606.05250, section 6.1)."""
    found = _words(written)
    f1, exact = 0.0, 0.0
    for accepted in doc["accepted"]:
        wanted = _words(accepted)
        same = sum((Counter(wanted) & Counter(found)).values())
        f1 = max(f1, 2 * same / (len(wanted) + len(found)) if same else 0.0)
        exact = max(exact, float(wanted == found))
    return {"f1": f1, "exact_match": exact}


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()
