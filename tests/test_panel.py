"""The blind panel: what is asked, what is kept, and what its summary says."""

import itertools
import json
import multiprocessing

import numpy as np
import pandas as pd
import pytest
from nltk.metrics.agreement import AnnotationTask

from experiments.panel import VERDICTS, Pair, Panel, Votes, agreement, ask_judge, summary

PAIRS = [Pair(f"question {n}", f"good {n}", f"bad {n}", "rival") for n in range(12)]


def prefer_good(opened, count):
    """Votes of somebody who reads both answers and prefers the good one, wherever it is."""
    for _ in range(count):
        opened.vote("1" if "good" in opened.answers[0].value else "3")


def open_as(votes, name, pairs=PAIRS, seed=0):
    opened = Panel(pairs, votes, seed=seed)
    opened.name.value = name
    return opened


def test_sides_are_random_and_a_vote_counts_for_the_answer_and_not_for_the_side(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    opened, left = open_as(votes, "Ada"), 0
    while opened.waiting:
        left += "good" in opened.answers[0].value
        assert {"good", "bad"} == {word for word in ("good", "bad") for shown in opened.answers if word in shown.value}
        prefer_good(opened, 1)
    assert 2 <= left <= 10
    assert set(votes.table().verdict) == {"win"}
    assert len(votes.table()) == len(PAIRS)
    sides = {name: [pair.left_is_ours(name, 0) for pair in PAIRS] for name in ("Ada", "Bo")}
    assert sides["Ada"] != sides["Bo"]


def test_nothing_that_is_shown_tells_the_models_apart(tmp_path):
    opened = open_as(Votes(tmp_path / "votes"), "Ada")
    shown = [opened.status, opened.prompt, *opened.answers]
    assert not any("rival" in widget.value or "ours" in widget.value for widget in shown)


def test_keys_vote_at_once_and_other_letters_do_nothing(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    opened = open_as(votes, "Ada")
    for typed, expected in (("x", 0), ("2", 1), ("1", 2), ("3", 3), ("22", 4)):
        opened.keys.value = typed
        assert len(votes.table()) == expected
        assert opened.keys.value == ""
    assert votes.table().verdict[0] == "tie"


def test_a_panel_goes_on_where_it_was_left_and_asks_nothing_twice(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    first = open_as(votes, "Ada")
    asked = [pair.key for pair in first.waiting]
    prefer_good(first, 5)
    again = open_as(votes, "Ada")
    assert [pair.key for pair in again.waiting] == asked[5:]
    assert len(open_as(votes, "Bo").waiting) == len(PAIRS)
    prefer_good(again, 7)
    assert "Thank you" in again.status.value
    assert again.question.layout.display == "none"
    again.vote("1")
    assert len(votes.table()) == len(PAIRS)
    assert [pair.key for pair in open_as(votes, "Cy", seed=1).waiting] != asked


def test_nobody_votes_without_a_name(tmp_path):
    opened = Panel(PAIRS, Votes(tmp_path / "votes.jsonl"))
    opened.vote("1")
    opened.name.value = "  "
    opened.vote("1")
    assert not (tmp_path / "votes.jsonl").exists()


def test_a_vote_that_a_kill_cut_is_asked_again_and_hurts_no_other(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    prefer_good(open_as(votes, "Ada"), 3)
    whole = votes.file.read_bytes()
    votes.file.write_bytes(whole[:-20])
    opened = open_as(votes, "Ada")
    assert len(opened.waiting) == len(PAIRS) - 2
    prefer_good(opened, 1)
    assert len(votes.table()) == 3
    lines = votes.file.read_text().splitlines()
    assert len([json.loads(line) for line in (*lines[:2], lines[3])]) == 3


def write_many(file, name):
    votes = Votes(file)
    for pair in PAIRS:
        votes.add(pair, "win", name, "person")


def test_several_people_write_to_one_file_at_once(tmp_path):
    names = ["Ada", "Bo", "Cy", "Di"]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(write_many, [(tmp_path / "votes.jsonl", name) for name in names])
    table = Votes(tmp_path / "votes.jsonl").table()
    assert len(table) == len(names) * len(PAIRS)
    assert (table.groupby("annotator").size() == len(PAIRS)).all()


def test_an_answer_is_text_and_never_markup(tmp_path):
    opened = open_as(Votes(tmp_path / "votes"), "Ada", [Pair("<b>q</b>", "<script>x</script>", "<img src=x>", "r")])
    assert not any(f"<{tag}" in widget.value for widget in opened.answers for tag in ("script", "img"))


def test_a_judge_is_never_counted_as_people(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    judged = []

    def judge(pair):
        judged.append(pair.key)
        return "loss"

    ask_judge(PAIRS, votes, judge, "Ada")  # even one with a person's name
    ask_judge(PAIRS, votes, judge, "Ada")
    assert len(judged) == len(PAIRS)
    opened = open_as(votes, "Ada")
    assert len(opened.waiting) == len(PAIRS)
    prefer_good(opened, 12)
    table = summary(votes.table()).set_index("by")
    assert (table.loc["person", "preferred"], table.loc["judge", "preferred"]) == (1.0, 0.0)
    assert list(table.annotators) == [1, 1]


def test_votes_on_other_answers_are_not_mixed_in(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    prefer_good(open_as(votes, "Ada"), 12)
    changed = [Pair(pair.prompt, "better", pair.others, pair.rival) for pair in PAIRS]
    assert votes.table(changed).empty
    assert len(open_as(votes, "Ada", changed).waiting) == len(PAIRS)


def random_votes(seed, annotators, pairs, missing=0.0):
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 3, pairs)
    rows = [
        {"pair": str(pair), "rival": "r", "annotator": str(who), "by": "person", "verdict": VERDICTS[verdict]}
        for who, pair in itertools.product(range(annotators), range(pairs))
        for verdict in [truth[pair] if generator.random() < 0.6 else generator.integers(0, 3)]
        if generator.random() >= missing
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("annotators", "missing"), [(2, 0.0), (3, 0.0), (4, 0.4)])
def test_agreement_is_krippendorffs_alpha_of_nltk(annotators, missing):
    votes = random_votes(1, annotators, 40, missing)
    oracle = AnnotationTask(list(votes[["annotator", "pair", "verdict"]].itertuples(index=False, name=None)))
    assert agreement(votes) == pytest.approx(oracle.alpha(), abs=1e-12)


def test_agreement_has_its_ends():
    votes = random_votes(0, 1, 30)
    assert np.isnan(agreement(votes))
    same = pd.concat([votes, votes.assign(annotator="other")])
    assert agreement(same) == 1.0
    other = random_votes(7, 1, 3000)
    chance = votes.iloc[:0].copy()
    shuffled = other.assign(annotator="b", verdict=other.verdict.sample(frac=1, random_state=0).to_numpy())
    assert abs(agreement(pd.concat([chance, other, shuffled]))) < 0.05


def test_three_votes_on_a_pair_are_not_three_pairs():
    """Annotators agree about a pair, so votes on it are no independent samples: intervals resample pairs."""
    one = random_votes(0, 1, 60)
    three = pd.concat([one.assign(annotator=str(who)) for who in range(3)])
    alone, together = summary(one).iloc[0], summary(three).iloc[0]
    assert (alone.low, alone.high, alone.pairs) == (together.low, together.high, together.pairs)
    assert together.annotators == 3
    assert together.low < together.preferred < together.high
    assert together[list(VERDICTS)].sum() == pytest.approx(1)


def test_fewer_than_eight_pairs_have_no_interval():
    found = summary(random_votes(0, 3, 7)).iloc[0]
    assert np.isnan(found.low)
    assert np.isnan(found.high)
