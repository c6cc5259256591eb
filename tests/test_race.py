import dataclasses
import json
import os
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from experiments import race_longer_results, searches
from experiments.__main__ import arguments, run
from experiments.pretraining_cells import checked_cell
from experiments.pretraining_gpu_results import HOLDS, OPEN, REFUTED
from experiments.race import (
    Arm,
    arm_record,
    arm_rope,
    arm_training,
    collect,
    race_arms,
    run_arm,
    run_race,
)
from experiments.race_longer import longer_race
from experiments.race_longer_results import METHODS as OF_THE_PAPER
from experiments.race_longer_results import OTHER_RATE, changed_rule, judged_longer, judged_slower, longer_results
from experiments.race_results import (
    ZERO_SHOT,
    RaceResults,
    distances_seen,
    race_results,
    retrieving,
    student_reach,
    trainings_in_words,
    way_label,
)
from experiments.searches import (
    compare_quoting,
    compare_trainings,
    search_longrope,
    search_pair_factors,
    search_rope_base,
)
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.model.weights import locate_base, weights_sha256
from llama_long_utils.paths import REPOSITORY, RESULTS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, recorded, write_record
from llama_long_utils.settings import METHODS, raised_base
from tools.kernels import forked

EQUAL_SECONDS = "-equal-seconds"


@pytest.fixture(scope="module")
def preset():
    return load_preset("tiny")


def sequence(positions):
    positions = np.asarray(positions)
    return TrainingSequence(positions, positions, positions)


def test_every_arm_has_numbers_and_equal_tokens_unless_it_has_equal_seconds(preset):
    arms = race_arms(preset)
    assert len(set(arms)) == len(arms)
    tokens = {}
    for arm in arms:
        assert arm_rope(preset, arm.method).window == preset.extension.window
        settings = arm_training(preset, arm)
        assert (settings is None) == (arm.training == ZERO_SHOT)
        if settings:
            assert settings.seed == arm.seed
            tokens.setdefault(arm.training, set()).add(settings.steps * settings.sequences_per_step * settings.window)
    (equal,) = set.union(*(found for name, found in tokens.items() if not name.endswith(EQUAL_SECONDS)))
    for name in [name for name in tokens if name.endswith(EQUAL_SECONDS)]:
        assert min(tokens[name]) > equal, name


def test_a_longer_race_differs_in_steps_and_methods_alone(preset):
    longer, arms = longer_race(preset, 8, ["pi", "abf"])
    trained = {arm for arm in arms if arm.training != ZERO_SHOT}
    assert trained == {
        arm for arm in race_arms(preset) if arm.training == "full-length" and arm.method in ("pi", "abf")
    }
    assert set(arms) - trained == {Arm("pi", ZERO_SHOT, 0), Arm("abf", ZERO_SHOT, 0)}
    for arm in trained:
        before = arm_training(preset, arm)
        assert arm_training(longer, arm) == dataclasses.replace(before, steps=8 * before.steps)
        assert arm_record(longer, arm, "base") != arm_record(preset, arm, "base")
        slower, _ = longer_race(preset, 8, ["pi", "abf"], learning_rate=5e-4)
        assert arm_training(slower, arm) == dataclasses.replace(arm_training(longer, arm), learning_rate=5e-4)
        assert arm_record(slower, arm, "base") != arm_record(longer, arm, "base")
    with pytest.raises(ValueError, match="name those"):
        longer_race(preset, 8, ["pi", "no such method"])


def test_a_number_that_no_training_has_is_refused_in_a_line(preset):
    with pytest.raises(ValueError, match=r"^training: learning_rate = 2\.0: Input should be less than or equal to 1$"):
        longer_race(preset, 2, ["pi"], learning_rate=2.0)
    for training in ("full-length", ZERO_SHOT):
        with pytest.raises(ValueError, match=r"^training: seed = 1000"):
            arm_training(preset, Arm("abf", training, 10**20))
    with pytest.raises(ValueError, match=r"^race: self_quoting_share = -1e-10: "):
        compare_quoting(preset, [-1e-10], seed=0)
    with pytest.raises(ValueError, match="is no seed: give a whole number from 0 to 4,294,967,295"):
        checked_cell("doll", "long", str(10**20))


def as_longer(pi_near=0.0, abf_far=-0.1, pi_far=-0.1, copies=(50.0, 20.0), pi_copies=-5.0, xpos_copies=-5.0):
    """The race as if it had been longer: nats and points of ROUGE-L by which its arms differ, alike in every text."""
    results = race_results(load_preset("tiny"))
    arms, arrays = results.arms, {name: array.copy() for name, array in results.arrays.items()}
    rows = {name: np.flatnonzero((arms.method == name) & (arms.training == "full-length")) for name in OF_THE_PAPER}
    base = arrays["nats"][np.flatnonzero((arms.method == "none") & (arms.training == "zero-shot"))]
    near = slice(0, results.edges.index(results.window))
    far = slice(near.stop, None)
    for name, nats in {"none": 0.0, "pi": pi_far, "abf": pi_far + abf_far, "xpos_abf": 0.0}.items():
        arrays["nats"][rows[name], :, far] = (base + nats * arrays["tokens"])[:, :, far]
    arrays["nats"][rows["pi"], :, near] = (base + pi_near * arrays["tokens"])[:, :, near]
    shortest, *_, asked, longest = results.lengths
    arrays[f"rouge_l_{shortest}"][rows["abf"]], arrays[f"rouge_l_{longest}"][rows["abf"]] = copies
    for name, points in {"abf": 0.0, "pi": pi_copies, "xpos_abf": xpos_copies}.items():
        arrays[f"rouge_l_{asked}"][rows[name]] = 20 + points
    return dataclasses.replace(results, arrays=arrays)


@pytest.mark.parametrize(
    ("changes", "judged"),
    [
        ({}, [HOLDS] * 7),
        (
            {"pi_near": 0.2, "abf_far": 0.1, "pi_far": 0.1, "copies": (5.0, 5.0), "pi_copies": 5, "xpos_copies": 5},
            [REFUTED] * 7,
        ),
        (
            {"abf_far": 0.0, "pi_far": 0.0, "pi_copies": 0, "xpos_copies": 0},
            [HOLDS, HOLDS, OPEN, HOLDS, HOLDS, OPEN, OPEN],
        ),
    ],
)
def test_each_expectation_of_the_longer_race_can_hold_and_can_be_refuted(changes, judged):
    short = race_results(load_preset("tiny"))
    assert list(judged_longer(as_longer(**changes), short).judged) == judged


def test_what_the_changed_rule_changes_is_said_only_where_the_limit_lies_inside_the_interval():
    longer = longer_results(load_preset("tiny"))
    assert judged_longer(longer, race_results(load_preset("tiny"))).judged[0] == OPEN
    assert "lies inside it. The rule written beforehand would have called that *holds*" in changed_rule(longer)
    assert changed_rule(as_longer()).endswith("lies outside it, so the change makes no difference.")


def test_what_is_expected_at_a_lower_rate_can_hold_and_can_be_refuted():
    short, longer = race_results(load_preset("tiny")), as_longer()
    for points, nats, judged in ((10.0, 0.1, HOLDS), (-10.0, -0.1, REFUTED)):
        slower = as_longer()
        arms, asked = slower.arms, slower.lengths[-2]
        rows = {name: (arms.method == name) & (arms.training == "full-length") for name in ("none", "abf")}
        both = np.maximum, np.minimum
        beyond = both[points < 0](*(race.arrays[f"rouge_l_{asked}"][rows["abf"]] for race in (longer, short)))
        slower.arrays[f"rouge_l_{asked}"][rows["abf"]] = beyond + points
        far = slice(slower.edges.index(slower.window), None)
        tokens = slower.arrays["tokens"][:, far]
        slower.arrays["nats"][rows["none"], :, far] = slower.arrays["nats"][rows["abf"], :, far] + nats * tokens
        assert list(judged_slower(slower, longer, short).judged) == [judged] * 3


def test_the_longer_race_counts_once_all_four_methods_have_all_seeds(preset, monkeypatch, tmp_path):
    monkeypatch.setattr(race_longer_results, "RESULTS", tmp_path)
    assert longer_results(preset) is None
    (tmp_path / "tiny").mkdir()
    for suffix in (".json", ".npz"):
        shutil.copy(RESULTS / "tiny" / f"11_longer_race{suffix}", tmp_path / "tiny")
    assert longer_results(preset).window == preset.base.window
    path = tmp_path / "tiny" / "11_longer_race.json"
    whole = path.read_text()
    path.write_text(whole.replace("--times 16 ", "--times 2 "))
    assert longer_results(preset) is None
    content = json.loads(whole)
    content["tables"]["cost"] = [
        row
        for row in content["tables"]["cost"]
        if (row["method"], row["training"], row["seed"]) != ("pi", "full-length", 2)
    ]
    path.write_text(json.dumps(content))
    assert longer_results(preset) is None


def test_a_race_at_another_rate_is_read_as_one_at_a_quarter_only_if_it_was(preset, monkeypatch, tmp_path):
    methods = ("none", "abf")
    assert longer_results(preset, OTHER_RATE, methods)
    monkeypatch.setattr(race_longer_results, "RESULTS", tmp_path)
    (tmp_path / "tiny").mkdir()
    content = (RESULTS / "tiny" / f"{OTHER_RATE}.json").read_text()
    (tmp_path / "tiny" / f"{OTHER_RATE}.json").write_text(
        content.replace("--learning-rate 0.0005", "--learning-rate 0.001")
    )
    assert longer_results(preset, OTHER_RATE, methods) is None


@pytest.mark.parametrize(
    ("options", "slug"),
    [
        (("16",), "11_longer_race"),
        (("16", "--methods", "none", "abf", "--learning-rate", "5e-4"), OTHER_RATE),
        (("2",), ""),
        (("16", "--methods", "pi"), ""),
        (("16", "--methods", "pi", "--learning-rate", "5e-4"), ""),
        (("16", "--learning-rate", "1e-3"), ""),
    ],
)
def test_a_pilot_replaces_no_record_of_the_study(options, slug, preset, monkeypatch):
    monkeypatch.setattr("experiments.race.run_race", lambda _preset, _arms, *where: where)
    monkeypatch.setattr("sys.argv", ["experiments", "race", "--times", *options])
    folder, name, _ = run(arguments())
    assert folder == (RESULTS / "tiny" if slug else preset.run_folder / "records")
    assert name == slug or not slug


@pytest.mark.parametrize("option", [("--methods", "pi"), ("--learning-rate", "5e-4")])
def test_methods_or_a_rate_without_a_longer_race_are_refused(option, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments", "race", *option])
    with pytest.raises(SystemExit):
        arguments()
    assert f"{option[0]} is for a longer race: give --times N with it" in capsys.readouterr().err


def test_equal_seconds_are_equal_to_a_fifth():
    """Recorded seconds (mean over seeds) include a few of loading model and data, and what else the machine did.

    Full-length training took from 55 to 99 seconds, depending on method and seed, so nothing narrower can be asked.
    """
    cost = Record(RESULTS / "tiny" / "11_ablations.json").table("cost")
    seconds = cost[cost.method == "abf"].groupby("training").seconds.mean()
    for name in [name for name in seconds.index if name.endswith(EQUAL_SECONDS)]:
        assert seconds[name] == pytest.approx(seconds["full-length"], rel=0.2), name
        assert seconds[name.removesuffix(EQUAL_SECONDS)] < 0.8 * seconds["full-length"], name  # with equal tokens
    assert {name + EQUAL_SECONDS for name in ("short", "pose", "s2")} < set(seconds.index)


def test_base_is_raised_for_abf_only(preset):
    raised = {method for method in METHODS if method != "longrope"
              if arm_rope(preset, method).base == preset.extension.rope_base}  # fmt: skip
    assert raised == {"abf", "xpos_abf"}


def test_base_is_raised_where_the_extension_has_a_method_that_raises_none(preset):
    other = dataclasses.replace(preset.extension, method="yarn", rope_base=preset.base.rope_base)
    bases = [arm_rope(dataclasses.replace(preset, extension=other), method).base for method in ("none", "abf")]
    assert bases == [preset.base.rope_base, raised_base(64, preset.base.rope_base, 512, 4096)]


def test_unknown_arm_is_one_clear_error(preset):
    with pytest.raises(ValueError, match="unknown RoPE method 'abff': use one of"):
        arm_rope(preset, "abff")
    with pytest.raises(ValueError, match=r"unknown training 'posee': use one of \['zero-shot', 'full-length'"):
        arm_training(preset, Arm("abf", "posee", 0))


def test_record_of_an_arm_is_named_by_what_it_depends_on(preset):
    arm = Arm("abf", "pose", 0)
    path = arm_record(preset, arm, "base")
    assert path == arm_record(preset, arm, "base")
    others = [
        arm_record(preset, dataclasses.replace(arm, seed=1), "base"),
        arm_record(preset, arm, "another base"),
        arm_record(dataclasses.replace(preset, lora=dataclasses.replace(preset.lora, rank=8)), arm, "base"),
    ]
    assert path not in others
    tasks = dataclasses.replace(preset.retrieval.tasks, questions=2)
    unrelated = dataclasses.replace(preset, retrieval=dataclasses.replace(preset.retrieval, tasks=tasks))
    assert path == arm_record(unrelated, arm, "base")


@pytest.mark.parametrize(("attention", "farthest"), [("sdpa", 15), ("s2", 3)])
def test_distances_seen_are_those_of_the_attention_mask(preset, attention, farthest):
    settings = dataclasses.replace(preset.training, window=16, reach=16, pack=False, attention=attention)
    counts = distances_seen([sequence(range(16))], settings)
    assert np.flatnonzero(counts).max() == farthest
    assert counts[0] == 16
    if attention == "sdpa":
        np.testing.assert_allclose(counts, np.arange(16, 0, -1))
    else:  # group of 4 straight in half of the heads; shifted by 2 in the others
        assert counts[1] == 0.5 * 4 * 3 + 0.5 * (3 * 3 + 2 * 1)


def test_skipped_positions_show_far_distances(preset):
    settings = dataclasses.replace(preset.training, window=4, reach=32, pack=False)
    counts = distances_seen([sequence([0, 1, 20, 21])], settings)
    assert {int(distance) for distance in np.flatnonzero(counts)} == {0, 1, 19, 20, 21}
    assert counts[20] == 2


def test_mean_is_weighted_by_tokens_and_resampled_over_documents_and_seeds():
    generator = np.random.default_rng(0)
    tokens = np.arange(10.0, 100.0, 10.0)
    values = tokens * 2.0 + generator.normal(0, 1, (4, 9))
    results = RaceResults(pd.DataFrame(), [], {}, Bootstrap(9, 500, seed=0), window=512)
    mean, low, high = results.mean(values, tokens).values()
    assert mean == pytest.approx(values.sum() / tokens.sum() / 4)
    assert low < mean < high
    assert [*results.mean(np.stack([tokens * 2.0] * 4), tokens).values()] == pytest.approx([2.0, 2.0, 2.0])
    assert np.isnan(results.mean(values[:, :7], tokens[:7])["low"])  # seven documents have no interval


def test_factors_of_the_preset_are_those_that_the_search_found(preset):
    path = RESULTS / "tiny" / "11_longrope_search.json"
    assert tuple(Record(path).table("factors").factor) == preset.race.pair_factors
    nll = Record(path).table("search").nll
    assert nll.is_monotonic_decreasing
    assert nll.iloc[-1] < nll.iloc[0]


def test_race_that_was_not_run_says_so(preset, tmp_path):
    with pytest.raises(ValueError, match="is missing or corrupt"):
        race_results(preset, tmp_path / "11_ablations.json")


def small(preset):
    """The same with few texts and questions."""
    return dataclasses.replace(
        preset,
        evaluation=dataclasses.replace(preset.evaluation, tokens=256, far_tokens=256, bucket_edges=[1, 64, 256]),
        retrieval=dataclasses.replace(preset.retrieval, lengths=[256], documents=2, answer_tokens=16),
    )


def test_an_arm_is_measured_once(preset, monkeypatch, tmp_path):
    monkeypatch.setattr(type(preset), "run_folder", tmp_path)
    path = run_arm(small(preset), Arm("abf", ZERO_SHOT, 0))
    nll, found = Record(path).table("nll"), Record(path).table("retrieval")
    assert set(nll.method) == {"abf"}
    assert nll.groupby("document").tokens.sum().eq(255).all()
    assert len(found) == 2
    assert found.rouge_l.between(0, 100).all()
    command = json.loads(path.read_text())["provenance"]["command"]
    assert command.endswith("-p preset tiny -p method abf -p training zero-shot -p seed 0")
    measured = path.stat().st_mtime_ns
    assert run_arm(small(preset), Arm("abf", ZERO_SHOT, 0)) == path
    assert path.stat().st_mtime_ns == measured


def test_search_finds_cheaper_factors_that_never_fall():
    wanted = np.array([1.0, 1.0, 2.0, 4.0, 8.0])
    factors, costs = search_pair_factors(
        lambda tried: float(np.abs(np.log(np.array(tried) / wanted)).sum()),
        [(8.0,) * 5, (1.0,) * 5],
        largest=16.0,
        rounds=300,
        seed=0,
    )
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.2 * costs[0]
    assert list(factors) == sorted(factors)


def write_arm(preset, arm, base_sha256, number):
    """The record of an arm, as if it had been measured."""
    common = {**dataclasses.asdict(arm), "document": ["one", "one", "two", "two"]}
    nll = {"position_low": [1, 64] * 2, "position_high": [64, 256] * 2, "tokens": [63, 192] * 2}
    nll["nats"] = [63.0 * (number + 1), 192.0, 63.0 * (number + 3), 192.0]
    found = {"length": 256, "rouge_l": 10.0 * number, "answer": "a", "written": "b"}
    path = arm_record(preset, arm, base_sha256)
    write_record(
        path.parent,
        path.stem,
        preset="tiny",
        question="?",
        tables={"nll": pd.DataFrame({**common, **nll}), "retrieval": pd.DataFrame({**common, **found})},
        seeds={"training": arm.seed},
        seconds=1.0,
    )


def test_a_race_goes_on_with_the_arms_that_have_no_record(preset, tmp_path):
    """In processes of their own, below a run folder of their own."""
    own = dataclasses.replace(small(preset), name=f"test-race-{os.getpid()}")
    arms = [Arm("abf", ZERO_SHOT, 0), Arm("pi", ZERO_SHOT, 0)]
    try:
        first = arm_record(own, arms[0], weights_sha256(locate_base(own)))
        run_race(own, arms[:1], tmp_path / own.name)
        measured = first.stat().st_mtime_ns
        run_race(own, arms, tmp_path / own.name)
        assert first.stat().st_mtime_ns == measured
    finally:
        shutil.rmtree(own.run_folder, ignore_errors=True)
    results = race_results(own, tmp_path / own.name / "11_ablations.json")
    assert list(results.arms.method) == ["abf", "pi"]
    pi = results.table(method="abf").set_index("measure").value
    assert pi["NLL near"] > 0  # untrained, PI harms the old window and ABF hardly


def test_search_for_longrope_reads_training_documents_and_writes_a_record(preset, monkeypatch, tmp_path):
    evaluation = dataclasses.replace(preset.evaluation, tokens=1024, far_tokens=1024, bucket_edges=[1, 1024])
    monkeypatch.setattr(searches, "RESULTS", tmp_path)
    path = search_longrope(dataclasses.replace(preset, evaluation=evaluation), rounds=2, texts=1, seed=0)
    assert len(Record(path).table("factors")) == preset.base.head_dim // 2
    assert len(Record(path).table("search")) == 3


def test_search_for_a_rope_base_measures_the_pretrained_one_beside_it(preset, monkeypatch, tmp_path):
    evaluation = dataclasses.replace(preset.evaluation, tokens=1024, far_tokens=1024, bucket_edges=[1, 512, 1024])
    monkeypatch.setattr(searches, "RESULTS", tmp_path)
    path = search_rope_base(dataclasses.replace(preset, evaluation=evaluation), [5e5], texts=2, seed=0)
    nll = Record(path).table("search").set_index(["rope_base", "position_low"]).nll
    assert nll[10_000.0, 1] < nll[500_000.0, 1]
    assert nll[500_000.0, 512] < nll[10_000.0, 512]


def test_trainings_are_compared_on_held_out_documents_of_each_source(preset, monkeypatch, tmp_path):
    evaluation = dataclasses.replace(preset.evaluation, tokens=1024, far_tokens=1024, bucket_edges=[1, 512, 1024])
    names = ["short", "pose"]
    few = {"steps": 2, "sequences_per_step": 1, "sequences_at_once": 1}
    quick = {name: dataclasses.replace(preset.race.trainings[name], **few) for name in names}
    racing = dataclasses.replace(preset.race, trainings=quick, warmup_steps=1)
    monkeypatch.setattr(searches, "RESULTS", tmp_path)
    monkeypatch.setattr(type(preset), "run_folder", tmp_path / "runs")
    changed = dataclasses.replace(preset, evaluation=evaluation, race=racing)
    path = compare_trainings(changed, names, seed=0)
    cost, nll, difference = (Record(path).table(name) for name in ("cost", "nll_by_position", "difference"))
    short, pose = (nll[nll.arm == name].set_index("position_low").nll for name in names)
    assert difference.set_index("position_low").nll.to_dict() == pytest.approx((pose - short).to_dict(), abs=1e-5)
    assert list(cost.training) == names
    resumed = Record(compare_trainings(changed, names, seed=0)).table("cost")
    pd.testing.assert_frame_equal(resumed, cost)  # a finished run keeps its time, and is not trained again
    assert set(nll.documents) == {len(preset.data.sources) - 1}  # of the Bible nothing is held out
    assert nll.groupby("position_low").nll.nunique().min() == 2
    with pytest.raises(ValueError, match="unknown training 'long': use one of"):
        compare_trainings(changed, ["short", "long"], seed=0)
    for few_names in (["short"], ["short", "short"]):
        with pytest.raises(ValueError, match="name two or more different ones of"):
            compare_trainings(changed, few_names, seed=0)


def test_collected_race_gives_back_every_arm_s_numbers(preset, monkeypatch, tmp_path):
    arms = [Arm("abf", ZERO_SHOT, 0), Arm("abf", "pose", 0), Arm("abf", "pose", 1)]
    monkeypatch.setattr(type(preset), "run_folder", tmp_path)
    with pytest.raises(ValueError, match="is missing or corrupt"):
        collect(preset, arms, "base", tmp_path / "results" / "tiny")
    for number, arm in enumerate(arms):
        write_arm(preset, arm, "base", number)
    written = collect(preset, arms, "base", tmp_path / "results" / "tiny")
    by_position = Record(written).table("nll_by_position")
    assert list(by_position[by_position.position_low == 1].value) == [2.0, 3.0, 4.0]
    results = race_results(preset, written)
    table = results.table().set_index(["training", "measure"]).value
    assert table["pose", "NLL near"] == pytest.approx(1.0)  # the last bucket inside the old window
    assert table["pose", "ROUGE-L 256"] == pytest.approx(15.0)
    change = results.table(training=ZERO_SHOT)
    assert set(change.training) == {"pose"}
    assert change.set_index("measure").value["ROUGE-L 256"] == pytest.approx(15.0)


def test_differences_know_that_three_seeds_are_few():
    """A bootstrap of three seeds alone had LongRoPE ahead of ABF at 1,024 tokens; Student's t does not."""
    results = race_results(load_preset("tiny"))
    table = results.table(method="abf").set_index(["method", "training", "measure"])
    row = table.loc[("longrope", "full-length", "ROUGE-L 1,024")]
    scores, beside = (results.rouge_l(method, "full-length", 1024)[0] for method in ("longrope", "abf"))
    half = student_reach((scores - beside).mean(axis=1))
    assert row.low <= row.value - half < 0 < row.value + half <= row.high
    assert (table.low < table.high).all()  # untrained arms have one seed, and the interval over documents


def test_a_method_retrieves_only_beyond_the_interval_of_an_arm_that_copies_nothing():
    """Twice what answers score by chance at one length let that arm through, and one method at the longest length."""
    results = race_results(load_preset("tiny"))
    scores, quoting = results.table(), recorded("tiny", "11_quoting_share")
    floors = results.floors(quoting)
    none = quoting.table("scores").query("share == 0 and measure.str.startswith('ROUGE-L')")
    assert floors.value.to_dict() == none.set_index("measure").value.to_dict()
    assert floors.value.max() < 2 * results.chance(2048) < floors.high.max()
    of_it = none.assign(method="abf", training="full-length")
    assert all(retrieving(of_it, floors, measure) == [] for measure in floors.index)
    assert "PI" not in {name for measure in floors.index for name in retrieving(scores, floors, measure)}
    assert "dynamic NTK" in retrieving(scores, floors, "ROUGE-L 2,048")  # whatever is drawn
    assert retrieving(scores, floors, "ROUGE-L 4,096") == []
    chances = results.floors(None)
    assert list(chances.index) == list(floors.index) and (chances.value < floors.value).all()


def test_a_lead_far_out_is_stated_beside_the_larger_one_near():
    results = race_results(load_preset("tiny"))
    cheaper = results.table(training="full-length").query("method == 'abf' and training != 'zero-shot'")
    cheaper = cheaper[cheaper.measure.isin(["NLL near", "NLL far", "ROUGE-L 256", "ROUGE-L 2,048"])]
    drawn = cheaper.assign(way=cheaper.training.map(way_label))
    said = trainings_in_words(drawn)
    assert said.startswith("**At equal tokens PoSE retrieves more than full length, S2-Attn less.** ")
    assert "At equal seconds no difference in retrieval to full length is shown. Both in ROUGE-L 2,048." in said
    assert "In ROUGE-L 256 the lead is larger still: PoSE +18 [+8, +29]." in said
    near_zero = trainings_in_words(drawn.assign(low=-1.0, high=1.0))
    assert near_zero.startswith("**At equal tokens no difference in retrieval to full length is shown.** ")
    both = drawn.assign(low=1.0, high=2.0)
    assert trainings_in_words(both).startswith("**At equal tokens short and PoSE and S2-Attn retrieve more than full")
    assert trainings_in_words(drawn.assign(low=-2.0, high=-1.0)).startswith("**At equal tokens short and PoSE and S2-")
    nll = cheaper[cheaper.measure.str.startswith("NLL")]
    beyond = (nll.low * nll.high > 0).sum()
    assert beyond and said.endswith(f"Of the {len(nll)} NLL differences {beyond} exclude zero.")


def test_the_notebook_runs_for_a_preset_whose_race_was_not_run(tmp_path):
    """A copy of tiny.toml under another name, with few and short texts: the paper's four methods, untrained."""
    text = (REPOSITORY / "presets" / "tiny.toml").read_text("utf-8")
    few = {"documents = 24 ": "lengths = [512, 1024]\ndocuments = 2 ", "stretches = 99": "tokens = 1024\nstretches = 1"}
    few |= {"sotu = 18, sh": "sotu = 2, sh", "shakespeare = 6": "shakespeare = 1"}
    for line, shorter in few.items():
        assert text.count(line) == 1
        text = text.replace(line, shorter)
    (tmp_path / "mine.toml").write_text(text)
    notebook = nbformat.read(REPOSITORY / "notebooks" / "11_ablations.ipynb", as_version=4)
    elsewhere = "from pathlib import Path\nfrom llama_long_utils import paths, settings\n"
    elsewhere += f"paths.PRESETS = settings.REPOSITORY = Path({str(tmp_path)!r})\ndel Path, paths, settings"
    notebook.cells = [nbformat.v4.new_code_cell(elsewhere), *notebook.cells]
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = parameters.source.replace('"tiny"', '"mine"')
    with forked():
        NotebookClient(notebook).execute(cwd=str(REPOSITORY / "notebooks"))
    results = race_results(load_preset("tiny"), tmp_path / "runs" / "mine" / "records" / "11_ablations.json")
    assert list(results.arms.method) == ["none", "pi", "abf", "xpos_abf"]
