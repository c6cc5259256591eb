"""What notebook 13 reads out of the records, recomputed from their arrays."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments.by_position import collapse_in_words
from experiments.dose_doubts import (
    WITHOUT,
    beside_seeds,
    found_by_seed,
    found_in_words,
    leads_by_text,
    nearly_full,
    nearly_full_in_words,
    prices_in_words,
    unpacked_in_words,
    verdicts,
    worth_table,
)
from experiments.dose_record import BIN
from experiments.real_models import (
    FILES,
    WAYS,
    base_in_words,
    contrast_beside_accuracy,
    fallen_in_words,
    read_dose_results,
    read_other_texts,
    read_tasks,
    speed_and_memory,
    tasks_in_words,
    training_in_words,
    unpacked,
    worth_in_words,
)
from llama_long_utils.evaluation.statistics import FEWEST
from llama_long_utils.notebooks import measured
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.records import Record, recorded, write_record


@pytest.fixture(scope="module")
def results():
    return read_dose_results(["smollm2", "no such preset"])["smollm2"]


def test_only_presets_with_a_record_are_read(results):
    assert results.preset == "smollm2"
    assert read_dose_results(["no such preset"]) == {}
    with pytest.raises(ValueError, match=r"06_dose_response: name one of \['qwen2.5-coder-1.5b', 'smollm2'\]"):
        read_dose_results(["no such preset"], needed=True)
    assert all(table.empty for table in read_tasks("no such preset"))


def test_what_full_context_is_worth_is_that_of_the_arrays(results):
    record = recorded("smollm2", "06_dose_response")
    nats = dict(zip(record.arrays["readings"], record.arrays["nats"], strict=True))
    first, second = 16_384 // BIN, 32_768 // BIN
    worth = results.worth()
    assert set(worth.line) == {*WAYS, "fair"}
    full = results.largest("full")
    gap = nats[f"{full}/full"][:, first:second].sum(axis=1) - nats[f"{full}/window"][:, first:second].sum(axis=1)
    mean = np.nanmean(gap / (32_768 - 16_384))
    assert worth[worth.line == "full"].nats.iloc[-1] == pytest.approx(mean, abs=1e-5)


def test_the_fair_line_compares_equal_doses(results):
    fair = results.worth().query("line == 'fair'")
    assert len(fair) >= 2
    for row in fair.itertuples():
        assert row.first.startswith("full") and row.second.startswith("control")
        assert row.first.split("-")[2].split("/")[0] == row.second.split("-")[2].split("/")[0]


def test_few_questions_are_shown_and_have_no_interval():
    shares, costs = read_tasks("smollm2")
    few = costs[costs["items"] < 8]
    assert len(few) and few.low.isna().all()
    assert [np.mean(each) for each in few.each] == pytest.approx(few.difference.tolist(), abs=1e-4)
    assert shares.length.eq(0).all()


def test_statements_are_counted_by_fifth_of_the_depth(results):
    found = results.statements()
    assert {"base", "control", "full", "pose"} <= set(found.arm)
    assert (found.groupby(["length", "arm"]).fifth_of_depth.nunique() == 5).all()
    assert (found.right <= found.questions).all()


def test_intervals_are_the_wider_of_two_and_a_lead_exceeds_what_seeds_lie_apart(results):
    rows = results.rows("differences", "far")
    assert (rows.low <= rows.kinds_low).all() and (rows.high >= rows.kinds_high).all()
    several = results.worth(r"\d+").query("line == 'full' and tokens_trained == 1048576")
    assert len(several) == 3
    assert results.apart("full") == pytest.approx(np.ptp(several.nats))
    assert results.apart("short") == 0
    last = results.worth().query("line == 'full'").iloc[-1]
    assert results.ahead(last, "full")
    assert not results.ahead(last.replace(last.nats, -results.apart("full") / 2), "full")


def test_whole_windows_are_compared_where_windows_have_seen_most_of_their_length(results):
    whole, far = (results.worth(whole=part).query("line in ('full', 'fair')") for part in (True, False))
    assert (whole.seen_at_least == 0.875).all()
    assert whole.groupby("line").size().to_dict() == far.groupby("line").size().to_dict()
    assert (whole.nats.to_numpy() > far.nats.to_numpy()).all()  # a part of the gain is what windows have not seen
    assert results.apart("full", whole=True) != results.apart("full")


def test_gains_of_texts_average_to_the_gain(results):
    texts = results.gains_of_texts()
    last = results.worth().query("line == 'full'").iloc[-1]
    assert len(texts) == last.documents
    assert texts.nats.mean() == pytest.approx(last.nats, abs=1e-4)


def test_statements_by_text_sum_to_those_by_depth(results):
    found = results.statements().query("arm == 'full'").groupby("length").right.sum()
    for length, right in found.items():
        by_text = results.found_in_texts(results.largest("full"), length)
        assert len(by_text) == 5
        assert sum(by_text) == right


@pytest.mark.parametrize("weights", ["SmolLM2-135M", "random"])
def test_a_training_run_on_a_gpu_is_stated_where_a_record_has_one(tmp_path, weights):
    rows = pd.DataFrame({"weights": weights, "context": 16_384, "step": range(1, 21), "tokens_per_second": 50_000.0})
    rows = rows.assign(
        tokens=65_536 * rows.step, loss=3 - rows.step / 50, peak_gib=9.8 if weights != "random" else None
    )
    about = {"preset": "gpu", "question": "What fits?", "tables": {"training": rows}, "seeds": {}, "seconds": 1.0}
    told = training_in_words(Record(write_record(tmp_path, "04_one_gpu_budget", **about)))
    assert "20 steps of whole sequences of 16,384 tokens. It reached 50,000 tokens/s" in told
    assert "from 2.97 to 2.61" in told  # means of two steps each
    assert ("a random model" in told, "in 9.8 GiB" in told) == ((True, False) if weights == "random" else (False, True))
    assert training_in_words(recorded("tiny", "04_one_gpu_budget")) == ""


def test_steps_of_two_days_are_a_range_of_ratios_to_the_trainer_of_their_day():
    days = tuple(recorded("gpu", name, needed=True) for name in ("04_one_gpu_budget", "04_trainers"))
    table = speed_and_memory(days, 32_768).set_index("step")
    ratios = []
    for day in days:
        steps = day.table("steps").query("model == 'Llama 2 7B' and context == 32768")
        ours, theirs = steps.plan == "10 layers recomputed", steps.contender == "Trainer + PEFT"
        ratios.append(steps.tokens_per_second[ours].item() / steps.tokens_per_second[theirs].item())
    assert table.speed["ours, 10 recomputed"] == f"{min(ratios):.2f} to {max(ratios):.2f}"
    assert " to " not in table.speed["TRL SFTTrainer"]  # of one day


def test_a_gain_over_nearly_full_windows_is_stated_without_the_text_that_speaks_most_for_it(results):
    """With that text SmolLM2 was ahead by two thousandths of a nat more than seeds lie apart; without it, it is not."""
    table = nearly_full(results).set_index(["line", "texts"])
    whole = results.worth(whole=True).groupby("line").tail(1).set_index("line")
    for line in ("full", "fair"):
        assert table.nats[line, "all"] == pytest.approx(whole.nats[line], abs=1e-5)
        assert table.nats[line, WITHOUT] == pytest.approx(whole.without_one[line], abs=1e-5)
        assert table.documents[line, WITHOUT] == table.documents[line, "all"] - 1
    assert table.ahead["full", "all"] and not table.ahead["full", WITHOUT]
    said = nearly_full_in_words({"smollm2": results})
    assert "from 10.5M tokens on, and without the strongest text (fs.md)" in said
    told = worth_table({"smollm2": results}).set_index("full context").loc["whole sequences, minus its own windows"]
    assert told[WITHOUT].startswith(f"{whole.without_one['full']:+.3f} [")
    assert told["nearly full windows"].startswith(f"**ahead** {whole.nats['full']:+.3f} [")
    assert verdicts({"smollm2": results}).smollm2[1:3].tolist() == ["ahead", "no difference detected"]


def test_few_texts_have_no_interval():
    (qwen,) = read_dose_results(["qwen2.5-coder-1.5b"]).values()
    table = nearly_full(qwen)
    assert (table.low.isna() == (table.documents < FEWEST)).all()
    assert table.low.isna().any()


def test_unpacked_weights_are_reported_far_out_too(results):
    told = unpacked_in_words(results)
    far = results.rows("differences", "far").set_index(["first", "second"])
    full = results.largest("full")
    row = far.loc[f"{full}-16bit/full", f"{full}/full"]
    assert f"far out worse ({measured(row.nats, row.low, row.high, digits=3)})" in told
    nats = dict(zip(results.record.arrays["readings"], results.record.arrays["nats"], strict=True))
    part = nats[f"{full}-16bit/full"] - nats[f"{full}-16bit/window"]
    own = part[:, part.shape[1] // 2 :].sum(axis=1) / (results.record.table("held_out").tokens.max() // 2)
    assert f"full context minus own windows is {np.nanmean(own):+.3f}," in told


def test_unpacked_weights_are_named_as_the_packages_name_them():
    """What is called unpacked was quantised before; only the second quantisation is measured."""
    packaged = json.loads((REPOSITORY / "data" / "packaged_models.json").read_text("utf-8"))
    for name, kind in FILES.items():
        (original,) = (entry["original"].lower() for model, entry in packaged.items() if model.startswith(name))
        assert kind.lower() in original
        assert kind in unpacked([name])


def test_the_title_of_doses_says_against_whom_and_from_which_dose_on_it_gains(results, monkeypatch):
    (qwen,) = read_dose_results(["qwen2.5-coder-1.5b"]).values()
    assert results.pays_from("full") == 3_145_728
    assert results.pays_from("fair") is None
    said = worth_in_words({"smollm2": results, "qwen2.5-coder-1.5b": qwen})
    assert "SmolLM2-135M gains over its own windows from 3.1M tokens on;" in said
    assert said.endswith("neither model is shown to gain over the control.")
    monkeypatch.setattr(type(results), "apart", lambda *_arguments: 0.0)
    assert worth_in_words({"smollm2": results}).endswith("gains over the control from 10.5M tokens on.")
    monkeypatch.setattr(type(results), "apart", lambda *_arguments: 0.045)  # only the last dose exceeds it
    assert results.pays_from("full") == 10_485_760


def test_seeds_are_counted_and_their_distance_is_that_of_their_differences(results):
    arms = results.record.table("arms")
    counts = results.seeds_run().set_index("trained on")
    for way, name in {"full": "whole sequences", "control": "control"}.items():
        seeds = arms[arms.arm.str.startswith(way) & (arms.tokens == 10_485_760)].seed
        assert counts.loc[name, "10,485,760 tokens"] == str(seeds.nunique())
    apart = results.seeds_apart().set_index(["full context", "tokens"])
    assert apart.apart.loc["whole sequences, minus its own windows"].max() == f"{results.apart('full'):.3f}"
    (qwen,) = read_dose_results(["qwen2.5-coder-1.5b"]).values()
    assert qwen.seeds_apart().empty
    said = beside_seeds(results, read_other_texts(results))
    assert f"lie up to {results.apart('fair'):.3f} nat apart" in said
    assert "both sets together the lead over another seed's control is beyond its interval, and smaller" in said


def test_the_title_of_statements_has_the_leads_beyond_their_interval_and_no_other(results):
    asked, doses = results.statements(), {"smollm2": results}
    said = found_in_words(doses, asked)
    right = asked[(asked.arm == "pose") & (asked.length == 16_384)].right.sum()
    assert said.startswith(f"In twice its old window SmolLM2-135M finds 19 of 100, PoSE {right}, RoPE base raised 0,")
    assert said.endswith("No other lead past an old window is beyond its interval. The control was not asked there.")
    said = found_in_words(doses, asked[asked.length == 32_768])
    assert said == "No lead past an old window is beyond its interval. The control was not asked there."
    control = asked[asked.arm == "control"].assign(length=16_384)
    assert not found_in_words(doses, pd.concat([asked, control])).endswith("was not asked there.")
    leads = np.subtract(*(results.found_in_texts(name, 32_768) for name in (results.largest("full"), "yarn-nf4")))
    told = f"- 32,768 tokens, YaRN: {', '.join(f'{one:+d}' for one in leads)}; {leads.mean():+.1f} ["
    assert told in leads_by_text(results, asked)
    again = sum(results.found_in_texts("full16k-s1-10485760", 16_384))
    assert f"whole sequences, seed 1, 41 in 8,192 tokens, {again} in 16,384 tokens" in found_by_seed(results)


def test_the_title_of_the_collapse_says_what_was_measured():
    rows = {"base": 3.0, "rope_base_only": 0.5, "extended": -0.1}
    table = pd.DataFrame([{"arm": arm, "position_low": 8192, "nll": nll} for arm, nll in rows.items()])
    said = collapse_in_words(table, 8192, own=0.04)
    assert said == (
        "A raised RoPE base ends the collapse, and training repairs what that costs. Length does not yet pay."
    )
    said = collapse_in_words(table.assign(nll=[3.0, 2.0, 0.1]), 8192, own=-0.04)
    assert "does not end the collapse" in said and "does not repair" in said and "That length pays is not shown" in said


def test_prices_name_dose_rate_and_passes(results):
    told = prices_in_words(results)
    for row in results.worth("0", place="inside").query("line == 'fair'").itertuples():
        assert f"{row.nats:+.3f} after {row.tokens_trained / 1e6:.1f}M" in told
    assert f"- worse ({measured(row.nats, row.low, row.high, digits=3)}), worse in 21 of 23 texts" in told
    assert "one learning rate for all arms: 0.0005\n- 10.5M tokens are 2.66 passes" in told


def test_what_falls_from_the_unpacked_base_is_stated_beside_the_same_base():
    shares, costs = read_tasks("qwen2.5-coder-1.5b")
    said, (told,) = fallen_in_words(shares), tasks_in_words(shares, costs)
    row = read_tasks("qwen2.5-coder-1.5b", "base_16_bit -> extended")[0].set_index("task").loc["mmlu"]
    after = measured(row.difference, row.low, row.high)
    assert f"in no task; from the unpacked base in mmlu {after} points" in said
    (nf4,) = shares[shares.task == "mmlu"].itertuples()
    before = measured(nf4.difference, nf4.low, nf4.high)
    assert f"- Against the same NF4 base mmlu changes by {before} points. Against the file's unpacked" in told
    assert f"weights it changes by {after} points." in told
    assert base_in_words("smollm2", shares) == "From the unpacked base nothing was asked."
    assert "unpacked" not in fallen_in_words(read_tasks("smollm2")[0])  # was not asked


def test_contrast_moves_at_equal_accuracy():
    table = contrast_beside_accuracy("qwen2.5-coder-1.5b").set_index("minus the base")
    assert table.loc["yarn", "contrast (nats)"].startswith("+0.118 [")
    assert table.loc["yarn", "accuracy (points)"] == "+0.1 [-0.4, +0.6]"
    assert contrast_beside_accuracy("no such preset").empty
