import json
import sys
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest

from experiments import __main__ as command
from experiments import pretraining, pretraining_cells, pretraining_mix
from experiments.pretraining import cut_short
from experiments.pretraining_cells import LONG, MIXES, SHORT, Cell, Size, flops_per_token, long_settings
from experiments.pretraining_copying import SKIPPED, continued_from
from experiments.pretraining_figures import (
    context_headline,
    context_pairs,
    late_headline,
    late_switches,
    other_switches,
    power_laws,
    when_long,
)
from experiments.pretraining_mix import PIECE, mix_rows
from experiments.pretraining_rates import (
    FACTORS,
    IN_WORDS,
    LAST,
    at_own_rate,
    beyond_share,
    larger_sizes,
    losses_at_the_end,
    rate_name,
)
from experiments.pretraining_results import (
    CONTENT,
    LENGTH,
    NAMES,
    PretrainingResults,
    add_cells,
    collect,
    heavier,
    over_sizes,
    pretraining_results,
    recorded_loss,
)
from experiments.race_results import wider_interval
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.records import Record, read_published

SETTINGS = replace(long_settings("doll", 0), steps=10)


def test_our_count_gives_the_papers_operations_to_all_digits():
    table = read_published("llama2_long")["table_10"]
    tokens = 100_000 * 4 * 2**20
    for share, published in zip(table["short_share"], table["flops"], strict=True):
        short, long = (flops_per_token(32, 4096, length) for length in (4096, 32_768))
        assert f"{tokens * (share * short + (1 - share) * long):.3e}" == f"{published:.3e}"


def test_short_and_long_arms_read_the_same_tokens_in_every_step():
    rows = pretraining.long_rows(SETTINGS)
    parts = cut_short(rows)
    assert len(parts) == len(rows) * LONG // SHORT
    joined = np.concatenate([part.input_ids for part in parts]).reshape(len(rows), LONG)
    whole = np.array([row.input_ids for row in rows])
    starts = np.arange(0, LONG, SHORT)
    assert (joined[:, starts] == 0).all()  # BOS
    inside = np.delete(np.arange(LONG), starts)
    assert (joined[:, inside] == whole[:, inside]).all()
    assert {part.position_ids.max() for part in parts} == {SHORT - 1}


def test_shredding_takes_length_away_and_nothing_else():
    original, shredded = mix_rows("original", SETTINGS), mix_rows("shredded", SETTINGS)
    assert sum(row.contiguous for row in original) == SETTINGS.steps // 2
    assert not any(row.contiguous for row in shredded)
    for one, other in zip(original, shredded, strict=True):
        assert (np.flatnonzero(one.input_ids != other.input_ids) % PIECE == 0).all()
        assert other.position_ids.max() == PIECE - 1


def test_mixes_have_their_shares_of_long_rows_and_repeat_no_text(monkeypatch):
    monkeypatch.setattr(pretraining_mix, "documents", cache(pretraining_mix.documents))
    for name, (_, _, share) in MIXES.items():
        rows = mix_rows(name, SETTINGS)
        if name not in ("shredded", "cut-first"):
            assert sum(row.contiguous for row in rows) == round(share * SETTINGS.steps)
        assert len({row.input_ids[1:PIECE].tobytes() for row in rows}) == len(rows)


def test_without_length_texts_quote_only_what_stands_in_their_own_piece():
    quoting = replace(SETTINGS, self_quoting_share=0.6)
    plain, original, shredded, cut_first = (
        mix_rows(name, settings)
        for name, settings in (
            ("shredded", SETTINGS),
            ("original", quoting),
            ("shredded", quoting),
            ("cut-first", quoting),
        )
    )
    quotes = np.array([(one.input_ids != two.input_ids).any() for one, two in zip(plain, cut_first, strict=True)])
    assert 0.5 < quotes.mean() <= 1
    for one, other in zip(original, shredded, strict=True):
        assert (np.flatnonzero(one.input_ids != other.input_ids) % PIECE == 0).all()
    foreign = {}
    for name, rows in {"shredded": shredded, "cut-first": cut_first}.items():
        pairs = [
            zip(*(x.input_ids.reshape(-1, PIECE) for x in both), strict=True) for both in zip(plain, rows, strict=True)
        ]
        foreign[name] = sum(len(set(piece) - set(own)) for pair in pairs for own, piece in pair)
    assert foreign["cut-first"] == 0 < foreign["shredded"]


def test_a_data_mix_begins_with_the_tiny_llama_and_is_recorded_beside_it(tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining_cells.SIZES, "tiny-llama", Size(256, 4, 4, 1e-3, steps=2))
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    tokenizer, training, held_out = pretraining.texts()
    monkeypatch.setattr(pretraining, "texts", lambda: (tokenizer, training, held_out[:1]))
    cells = [Cell("tiny-llama", arm, 0) for arm in ("mix-original", "mix-cut-first", "before")]
    assert not any(cell.short_owner for cell in cells)
    paths = [pretraining.run_cell(cell) for cell in cells]
    results = pretraining_results(collect(paths, tmp_path / "record", "mixes"))
    assert list(results.cells.tokens) == [2 * LONG, 2 * LONG, 0]
    assert list(np.isnan(results.arrays["loss"]).all(axis=1)) == [False, False, True]
    edges, short, all_ = (results.arrays[name] for name in ("distances", "short_tokens", "copied_tokens"))
    assert (short <= all_).all()
    assert short[:, edges[1:] <= PIECE].all() and not short[:, edges[:-1] >= PIECE].any()
    effects = results.content_or_length("tiny-llama").set_index(["change", "place", "measure"])
    far = [results.copying("tiny-llama", arm)["value"] for arm in ("mix-cut-first", "mix-original")]
    assert effects.value[LENGTH, "far", "copying"] == pytest.approx(100 * (far[0] - far[1]))
    content = json.loads(paths[1].read_text())
    del content["tables"]["copying_short"]
    paths[1].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"without 'copying_short'.*{cells[1].record.stem}"):
        collect(paths, tmp_path / "record", "mixes")


def test_the_heavier_change_is_the_one_whose_paired_lead_lies_above_zero():
    def effects(length, content):
        changes = {LENGTH: np.array(length), CONTENT: np.array(content)}
        rows = [{"change": name, "each": each} for name, each in changes.items()]
        return pd.DataFrame(rows).assign(measure="NLL", place="far")

    noise = np.array([-0.01, 0.0, 0.01])
    assert heavier(effects(0.015 + noise, -0.04 + noise), "NLL") == "neither"  # noise that parts the two
    assert heavier(effects(0.015 + noise, -0.06 - noise / 9), "NLL") == "content"
    assert heavier(effects(0.05 + noise, -0.01 - noise), "NLL") == "length"  # intervals overlap, pairs do not
    assert heavier(effects(-0.05 + noise, 0.0 + noise), "NLL") == "neither"  # length taken away helps
    assert heavier(effects(-0.05 + noise, 0.0 - noise).assign(measure="copying"), "copying") == "length"
    mixed = effects([0.05, 0.05, 0.051, -0.05, 0.2, 0.0], [0.0, 0.0, 0.001, 0.0, 0.0, 0.001])
    assert heavier(mixed.assign(each=mixed.each.str[:3]), "NLL") == "length"
    assert heavier(mixed, "NLL", skip=3) == "neither"


def test_an_arm_is_one_run_with_its_short_part_shared(tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining_cells.SIZES, "doll", Size(64, 2, 2, 7e-3, steps=5))
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    tokenizer, training, held_out = pretraining.texts()
    monkeypatch.setattr(pretraining, "texts", lambda: (tokenizer, training, held_out[:2]))
    paths = {arm: pretraining.run_cell(Cell("doll", arm, 0)) for arm in ("short", "switch-80", "continued")}
    loss = {arm: Record(path).table("loss").loss.to_numpy() for arm, path in paths.items()}
    assert (loss["switch-80"][:4] == loss["short"][:4]).all()
    assert (loss["switch-80"][4:] != loss["short"][4:]).all()
    rates = json.loads(next(tmp_path.glob("long/doll-switch-80-*/checkpoint-5/trainer_state.json")).read_text())
    learning_rate = [row["learning_rate"] for row in rates["log_history"] if "loss" in row]
    assert np.diff(learning_rate).max() <= 0  # one cosine: no warm-up at the switch
    cost = pd.concat([Record(path).table("cost") for path in paths.values()]).set_index("arm")
    assert list(cost.short_steps) == [5, 4, 5]
    assert cost.flops["continued"] == pytest.approx(cost.flops["switch-80"], abs=LONG * flops_per_token(2, 64, LONG))
    assert cost.tokens["short"] == cost.tokens["switch-80"] == 5 * LONG
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert pretraining.run_cell(Cell("doll", "switch-80", 0)) == paths["switch-80"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    record = collect(list(paths.values()), tmp_path / "record")
    results = pretraining_results(record)
    assert results.seeds("doll", "short", "switch-80") == [0]
    assert results.arrays["nats"].shape == (3, 2, 2, 8)


def test_a_copying_model_is_trained_on_and_its_copying_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining_cells.SIZES, "tiny-llama", Size(256, 4, 4, 1e-3, steps=3))
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    tokenizer, training, held_out = pretraining.texts()
    monkeypatch.setattr(pretraining, "texts", lambda: (tokenizer, training, held_out[:1]))
    paths = [pretraining.run_cell(Cell("tiny-llama", arm, 0)) for arm in ("switch-80", "in-reach")]
    losses = [Record(path).table("loss").loss for path in paths]
    assert (losses[0][:2] != losses[1][:2]).any()  # other quotations
    results = pretraining_results(collect(paths, tmp_path / "record", "copies"))
    assert results.arrays["copied_tokens"].sum(axis=1).max() < LONG
    near, own = (results.copying("tiny-llama", "in-reach", low=low, high=high) for low, high in ((1, 256), (0, 1)))
    assert near["value"] > own["value"] + 0.1
    less = results.copying("tiny-llama", "in-reach", "switch-80", 1024, 4096)
    each = [results.copying("tiny-llama", arm)["value"] for arm in ("in-reach", "switch-80")]
    assert less["value"] == pytest.approx(each[0] - each[1])


def test_a_copied_token_is_counted_once_it_can_be_known_what_is_quoted():
    source = np.array([-1] * 10 + [2, 3, 4, 5, 6, 7] + [0, 1, 2] + [-1])
    assert list(continued_from(source)) == [0] * 10 + [-1] * SKIPPED + [8, 8] + [-1] * 3 + [0]


def test_unknown_cells_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown size '7B': use one of"):
        pretraining_cells.checked_cell("7B", "long", "0")
    with pytest.raises(ValueError, match="unknown arm 'switch-50': use one of"):
        pretraining_cells.checked_cell("0.4M", "switch-50", "0")


def test_of_two_intervals_the_outer_bounds_count():
    generator, tokens, bootstrap = np.random.default_rng(0), np.full(40, 100), Bootstrap(40, 500, 0)
    documents = generator.normal(0, 50, 40)
    alike = wider_interval(documents + np.array([[-0.1], [0.0], [0.1]]), tokens, bootstrap)  # documents vary, not seeds
    assert alike["high"] - alike["low"] > 0.1
    apart = wider_interval(np.array([[-1.0], [0.0], [1.0]]) * tokens, tokens, bootstrap)  # seeds vary, not documents
    assert apart["value"] == pytest.approx(0)
    assert apart["high"] == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)  # Student's t of two degrees of freedom


def test_an_arm_that_gains_less_from_far_context_is_found_though_its_nll_is_equal():
    cells = pd.DataFrame([{"size": "s", "arm": arm, "seed": seed} for arm in ("long", "late") for seed in range(3)])
    full = 300 + np.random.default_rng(0).normal(0, 1, (6, 12))
    windows = full + np.repeat([2.0, 0.5], 3)[:, None]
    ways, edges = np.array(["full", "window"]), np.array([2048, 4096])
    arrays = {"nats": np.stack([full, windows], axis=1)[..., None], "tokens": np.full((12, 1), 100)}
    results = PretrainingResults(cells, arrays | {"edges": edges, "ways": ways}, Bootstrap(12, 500, 0))
    found = results.less_from_context("s", "late", 2048, 4096)
    assert [found["value"], *found["each"]] == pytest.approx([0.015] * 4)
    assert found["low"] > 0 > results.difference("s", ("late", "full"), ("long", "full"), 2048, 4096)["low"]


def test_what_context_saves_is_paired_by_document():
    results = pretraining_results()
    laws = results.record.table("power_law").groupby("model").saved.mean()
    more = results.context_saves_more("tiny-llama, extended", "0.4M")
    assert more["value"] == pytest.approx(laws["tiny-llama, extended"] - laws["0.4M"], abs=1e-4)
    assert more["seeds"] == 3
    alone = results.context_saves_more("0.4M", "0.4M", pretraining_results())
    assert (alone["value"], alone["each"]) == (0, [0, 0, 0])  # of two records, seed with seed


def late_switch(size, worse, seeds):
    """Results of a size whose switch at 80% is `worse` nats a token than long throughout, by seed."""
    cells = pd.DataFrame([(size, arm, seed) for arm in ("long", "switch-80") for seed in seeds], columns=NAMES)
    cells = cells.assign(flops=np.where(cells.arm == "long", 10.0, 4.0), flops_counted=1, seconds=1, tokens=1)
    cells = cells.assign(short_steps=0, long_steps=1, parameters=9)
    nll = np.array([2.0] * len(seeds) + [2 + one for one in worse])
    nats = 100 * np.repeat(nll, 12).reshape(len(nll), 1, 12, 1)
    arrays = {"nats": nats, "tokens": np.full((12, 1), 100), "edges": np.array([1, 4096]), "ways": np.array(["full"])}
    return PretrainingResults(cells, arrays, Bootstrap(12, 500, 0))


def test_sizes_together_count_each_seed_once():
    parts = [(late_switch("a", (0.01, 0.02, 0.03), (0, 1, 2)), "a"), (late_switch("b", (0.02, 0.04), (0, 2)), "b")]
    together = over_sizes(parts, "switch-80")
    assert together["each"] == pytest.approx([0.01, 0.02, 0.03, 0.02, 0.04])
    assert (together["value"], together["seeds"]) == (pytest.approx(0.024), 5)
    alone = parts[0][0].difference("a", ("switch-80", "full"), ("long", "full"))
    assert together["high"] - together["low"] < alone["high"] - alone["low"]


def test_a_saving_at_equal_quality_needs_a_loss_that_is_excluded():
    seeds = (0, 1, 2)
    equal, unsure, worse = ([0.001, 0.0, -0.001], [-0.02, 0.0, 0.02], [0.05, 0.051, 0.052])
    saved = [late_switch("a", change, seeds).saved_at_equal_quality("a") for change in (equal, unsure, worse)]
    assert saved == [pytest.approx((0.6, 0.6)), pytest.approx((0, 0.6)), (0, 0)]


def test_the_switch_gets_the_rate_with_the_lowest_training_loss_at_the_end_of_seed_0():
    """Held-out NLL, the start of training and the other seed speak for other rates, and choose nothing."""
    names = ["a", *(rate_name("a", factor) for factor in FACTORS)]
    cells = pd.DataFrame(product(names, ("long", "switch-80"), (0, 1)), columns=NAMES)
    chosen = (cells["size"] == np.where(cells.arm == "long", "a", names[1])).to_numpy()
    loss = np.where((cells.seed == 0) == chosen, 4.0, 5.0)[:, None] + np.zeros(LAST + 9)
    loss[chosen, :9] = 9.0
    nats = np.where(chosen, 600.0, 500.0).reshape(-1, 1, 1, 1)
    arrays = {"nats": nats, "loss": loss, "tokens": np.array([[100]]), "edges": np.array([1, 4096])}
    results = PretrainingResults(cells, arrays | {"ways": np.array(["full"])}, Bootstrap(1, 9, 0))
    own = at_own_rate(results, "a")
    assert sorted(own.cells.index) == list(np.flatnonzero(chosen))
    assert own.seeds(f"a, switch at {IN_WORDS[FACTORS[0]]}", "long", "switch-80") == [0, 1]


def test_the_rate_recorded_as_an_arms_own_has_all_seeds_and_a_worse_rate_on_both_sides():
    results, own = larger_sizes().values()
    assert own.seeds(own.cells["size"].iloc[0], "long", "switch-80") == [0, 1, 2]
    for arm in ("long", "switch-80"):
        losses = list(losses_at_the_end(results, "0.9M", arm).values())
        assert min(losses) not in (losses[0], losses[-1])


def test_what_is_left_beyond_share_is_paired_by_seed():
    """Half of each seed's loss is left, so zero is beyond half, though the seeds' losses differ widely."""
    one, own = (
        late_switch(size, worse, (0, 1, 2)) for size, worse in (("a", (0.2, 0.4, 0.9)), ("b", (0.1, 0.2, 0.45)))
    )
    cells = pd.concat([one.cells, own.cells.assign(size=rate_name("a", 0.5))], ignore_index=True)
    loss = np.where(cells["size"] == "a", 5.0, 4.0)[:, None] + np.zeros(LAST)
    arrays = one.arrays | {"nats": np.concatenate([one.arrays["nats"], own.arrays["nats"]]), "loss": loss}
    own_long = (cells["size"] != "a") & (cells.arm == "long")
    results = PretrainingResults(cells[~own_long], arrays, one.bootstrap)
    halved = (at_own_rate(results, "a"), "a, switch at half the rate", "switch-80")
    assert beyond_share(halved, (results, "a", "switch-80")) == pytest.approx([0, 0, 0])


def test_the_answer_names_the_tokens_on_which_a_late_switch_is_good_enough_and_the_sizes_where_it_is_worse():
    seeds = (0, 1, 2)
    worse, unsure, level = ((0.05, 0.051, 0.052), (-0.02, 0.0, 0.02), (0.001, 0.0, -0.001))
    few = {"0.4M": late_switch("0.4M", unsure, seeds), "0.9M": late_switch("0.9M", worse, seeds)}
    few |= {"0.9M, switch at half": late_switch("0.9M, switch at half", level, seeds)}
    many = late_switch("0.9M-as-16M", level, seeds)
    many = replace(many, cells=many.cells.assign(tokens=13e6))
    late = late_switches(few | {"0.9M-as-16M": many})
    assert late_headline(late) == (
        "A late switch is good enough on 13.0 million tokens, and worse at 0.9M on 0.0 million"
    )
    said = when_long(late)
    assert "| switch at 80% | 0.0 million tokens | 13.0 million tokens |" in said
    assert "| 0.4M | not shown: -0.000 [" in said.replace("+0.000", "-0.000") and "worse: +0.051 [" in said
    assert " at one rate; not shown: " in said and " at its own rate | not shown: " in said
    assert late_headline(late_switches({"0.4M": few["0.4M"]})).endswith("is not shown to be good enough on 0.0 million")
    assert late_headline(late_switches({"a": late_switch("a", level, seeds)})).endswith(
        "good enough on 0.0 million tokens"
    )


def test_other_switches_are_held_against_that_at_80_percent():
    rows = [("switch-20", 0.1, 0.2), ("switch-80", 0.1, 0.2), ("switch-95", -0.1, 0.2)]
    table = pd.DataFrame(rows, columns=["arm", "low", "high"]).assign(seeds=3)
    said = other_switches({"a": table})
    assert "come out as that at 80%: 20% at a." in said and "do not: 95% at a." in said
    assert said.endswith("still earlier one would be as good was not tested.")
    assert other_switches({"a": table[table.arm == "switch-80"].assign(low=-0.1)}) == ""


def test_an_arm_of_fewer_than_three_seeds_is_shown_and_not_judged():
    few = late_switch("a", (-0.05, -0.06), (0, 1))
    late = late_switches({"a": few})
    assert "| a | too few seeds to judge: -0.050, -0.060 |" in when_long(late)
    assert late_headline(late) == "A late switch is not judged: too few seeds"
    assert few.saved_at_equal_quality("a") == (0, 0)


def test_what_context_saves_by_size_is_said_as_the_intervals_say():
    pairs = pd.DataFrame({"larger": ["b", "c"], "smaller": ["a", "b"], "low": [0.1, -0.1], "high": [0.2, 0.1]})
    laws = pd.DataFrame({"model": ["a", "b", "c"], "parameters": [1, 2, 3]}).assign(beta_low=0.4, beta_high=0.5)
    unseen = "; that β grows is not shown"
    assert context_headline(pairs, laws) == f"Context saves b more than a on as many tokens{unseen}"
    assert context_headline(pairs.assign(low=0.1), laws) == f"Larger models save more by context{unseen}"
    assert context_headline(pairs.assign(low=-0.1), laws).startswith(
        "That context saves larger models more is not shown"
    )
    less = context_headline(pairs.assign(low=[-0.2, 0.1], high=[-0.1, 0.2]), laws)
    assert less.startswith("Context saves c more than b and b less than a")
    assert context_headline(pairs, laws.assign(beta_low=[0.1, 0.4, 0.6])).endswith("; β grows")


def test_models_on_as_many_tokens_are_paired_with_the_next_smaller_one():
    wide = larger_sizes()["0.9M"]
    groups = [{"0.4M": pretraining_results(), "0.9M": wide}]
    pairs = context_pairs(groups)
    assert list(zip(pairs.larger, pairs.smaller, strict=True)) == [("0.9M", "0.4M")]
    assert {"0.4M", "0.9M"} <= set(power_laws(groups).model)


def test_a_live_cell_is_held_against_the_record_that_has_it():
    results = pretraining_results()
    row = results.cells.index[(results.cells.arm == "switch-40") & (results.cells.seed == 1)][0]
    assert recorded_loss("0.4M", "switch-40", 1) == results.mean_nll(row)
    assert recorded_loss("doll", "switch-80", 0) is None


def test_the_arms_that_decide_are_measured_first_at_the_larger_size():
    cells = [cell for cell in pretraining_cells.all_cells() if cell.size == pretraining_cells.LARGER]
    assert [(cell.arm, cell.seed) for cell in cells[:3]] == [("long", 0), ("switch-80", 0), ("short", 0)]
    assert {cell.arm for cell in cells[:9]} == {"long", "switch-80", "short"}
    assert len(set(cells)) == len(cells) == 18


@pytest.mark.parametrize("words", [("--steps", "-1"), ("--steps", "5"), ("--seed", "0"), ("--speed",), ("--join", "x")])
def test_what_is_for_a_gpu_s_size_does_not_start_hours_of_another_training(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", "pretraining", *words])
    with pytest.raises(SystemExit, match="2"):
        command.arguments()
    wanted = (
        "-1 must be a number of 1 or more"
        if "-1" in words
        else "are for a size with rates by pilots: add --size 4M or 16M"
    )
    assert wanted in capsys.readouterr().err


def test_cells_are_added_to_a_record_which_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining_cells.SIZES, "doll", Size(64, 2, 2, 7e-3, steps=2))
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path / "runs")
    tokenizer, training, held_out = pretraining.texts()
    monkeypatch.setattr(pretraining, "texts", lambda: (tokenizer, training, held_out[:1]))
    first, second = (pretraining.run_cell(Cell("doll", arm, 0)) for arm in ("short", "long"))
    record = collect([first], tmp_path)
    before = json.loads(record.read_text())
    whole = pretraining_results(collect([first, second], tmp_path / "whole"))
    added = pretraining_results(add_cells(record, [first, second]))
    assert added.record.content["tables"] == whole.record.content["tables"]
    assert added.record.content["tables"]["cells"][:1] == before["tables"]["cells"]
    assert all(np.array_equal(added.arrays[name], array) for name, array in whole.arrays.items())
    content = record.read_bytes()
    assert add_cells(record, [second]) == record and record.read_bytes() == content
