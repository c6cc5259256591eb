import json
import math

import numpy as np
import pandas as pd
import pytest

from experiments.real_models import read_dose_results, read_other_texts
from llama_long_utils.paths import REPOSITORY, RESULTS
from llama_long_utils.records import Record, read_arrays, read_published, read_record, recorded, write_record
from tools.store import results, store_record

WINS = {"arm", "decoding", "seed", "questions", "win", "tie", "loss", "preferred", "low", "high"}
WINS |= {"preferred_cut", "low_cut", "high_cut"}
COLUMNS = {
    "03_corpus": {
        "corpus": {"files", "documents", "bytes"},
        "reading": {
            *("run", "workers", "sequences", "digest", "continued_from", "peak_gib", "seconds"),
            *("first_sequence_seconds", "labels", "worker_seconds", "labels_per_worker_second"),
        },
        "training": {"first_step_seconds", "peak_gib"},
    },
    "04_one_gpu_budget": {
        "ledger": {"model", "context", "plan", "component", "predicted_gib"},
        "ledger_check": {"model", "layers", "context", "dtype", "plan", "predicted_gib", "measured_gib"},
        "longest_context": {"model", "device_gib", "plan", "tokens"},
        "plans": {"model", "device_gib", "context", "plan", "predicted_gib", "host_gib"},
        "step_times": {"context", "products", "attention", "memory", "measured"},
        "profile": {"operator", "seconds"},
        "seven_billion": {"quantity", "predicted", "measured"},
        "machine": {"quantity", "value"},
    },
    "04_training_step": {
        "bench": {
            *("contender", "plan", "context", "round", "tokens_per_core_second", "peak_gib_above_weights"),
            *("allocated_gib", "fraction_of_matmul_peak", "loss"),
        },
        "machine": {"quantity", "value"},
    },
    "gpu/04_one_gpu_budget": {
        "checks": {"check", "quantity", "value"},
        "attention": {
            *("query_heads", "key_value_heads", "context", "kernel", "node", "forward_tflops", "backward_tflops"),
            "peak_bytes_per_token",
        },
        "steps": {
            *("model", "context", "cap_gib", "contender", "plan", "predicted_gib", "without_workspace_gib", "host_gib"),
            *("allocated_gib", "reserved_gib", "seconds", "tokens_per_second", "share_of_bf16_peak"),
        },
        "longest": {"model", "cap_gib", "context", "allocated_gib", "reserved_gib", "tokens_per_second"},
    },
    "05_finetune_qlora": {
        "training": {"step", "tokens", "loss", "learning_rate", "tokens_per_second", "peak_gib"},
        "merging": {"quantity", "value", "low", "high"},
    },
    "06_perplexity_by_position": {
        "nll_by_position": {
            *("arm", "position_low", "position_high", "nll", "low", "high", "documents", "tokens", "stretches")
        },
        "control": {"arm", "position_low", "position_high", "nll", "low", "high", "documents", "tokens"},
        "comparison": {"quantity", "nats", "low", "high"},
        "context_worth": {"quantity", "nats", "low", "high"},
        "copying": {"arm", "place", "tokens_between", "nats", "low", "high"},
        "power_law": {"arm", "alpha", "beta", "gamma", "rmse"},
        "definitions": {"arm", "definition", "perplexity", "low", "high", "units"},
    },
    "06_dose_response": {
        "arms": {
            *("arm", "window", "reach", "rope_base", "quoting", "seed", "tokens", "passes", "seconds"),
            *("tokens_per_second", "peak_gib"),
        },
        "nll_by_position": {
            *("arm", "tokens_trained", "weights", "read", "position_low", "position_high", "nll", "low", "high"),
            *("documents", "tokens"),
        },
        "full_minus_windows": {
            *("arm", "tokens_trained", "weights", "position_low", "position_high", "nats", "low", "high"),
            *("kinds_low", "kinds_high", "documents", "kinds", "below_zero", "without_one"),
        },
        "whole_windows": {
            *("arm", "tokens_trained", "weights", "second", "position_low", "position_high", "seen_at_least"),
            *("nats", "low", "high", "kinds_low", "kinds_high", "documents", "kinds", "below_zero", "without_one"),
        },
        "gain_by_dose": {
            *("arm", "tokens_before", "tokens_after", "position_low", "position_high", "nats", "low", "high"),
            *("kinds_low", "kinds_high", "documents", "kinds", "below_zero", "without_one"),
        },
        "differences": {
            *("first", "second", "tokens_trained", "position_low", "position_high", "nats", "low", "high"),
            *("kinds_low", "kinds_high", "documents", "kinds", "below_zero", "without_one"),
        },
        "retrieval": {
            *("arm", "tokens_trained", "weights", "task", "length", "fifth_of_depth", "questions", "exact", "low"),
            *("high", "gain"),
        },
        "held_out": {
            *("kind", "source", "document_tokens", "first", "tokens", "sha256_of_ids", "sha256_of_text"),
            *("share_in_training", "repeats_itself"),
        },
        "left_out": {"arm", "dose", "seconds_needed"},
    },
    "06_loss_by_context": {
        "contexts": {"kind", "document", "tokens", "bytes", "context", "nats"},
        "predictions": {"law", "context", "value", "low", "high", "fitted_up_to"},
        "betas": {"model", "value", "low", "high"},
    },
    "08_benchmark_deltas": {
        "deltas": {
            *("task", "length", "pair", "metric", "items", "before", "after", "difference", "low", "high"),
            *("discordant", "p"),
        },
        "scores": {"task", "length", "arm", "metric", "items", "value", "low", "high"},
    },
    "07_long_range_retrieval": {
        "scores": {"arm", "task", "length", "depth", "items", "probability", "exact", "rouge_l"},
        "effective_length": {"arm", "task", "threshold", "tokens"},
        "mistakes": {"arm", "task", "setting", "length", "items", "answer", "other", "anything_else"},
    },
    "smollm2/07_long_range_retrieval": {  # of an earlier notebook 7, which scored by ROUGE-L and probability
        "scores": {
            *("arm", "task", "length", "depth", "items", "log_probability", "probability", "probability_low"),
            *("probability_high", "all_likeliest", "exact", "rouge_l", "rouge_l_low", "rouge_l_high"),
        },
        "effective_length": {"arm", "task", "measure", "threshold", "tokens", "low", "high", "items"},
        "agreement": {"arm", "task", "items", "all_likeliest", "exact", "same_verdict", "rank_correlation"},
        "mistakes": {"arm", "task", "setting", "length", "items", "answer", "other", "anything_else"},
    },
    "09_instruction_tuning": {
        "answers": {"arm", "seed", "length", "questions", "exact", "words", "log_probability"},
        "nll_by_position": {"arm", "seed", "position_low", "position_high", "nll"},
        "runs": {"arm", "seed", "labels"},
    },
    "09_on_hotpotqa": {
        "answers": {"arm", "seed", "length", "questions", "f1", "exact", "log_probability", "ended"},
        "runs": {"arm", "seed", "labels", "questions", "different", "training", "asking"},
        "floors": {"answer", "questions", "f1", "exact"},
    },
    "09_self_instruct": {
        "quality": {"outcome", "pairs", "words_found"},
        "pairs": {"document", "place", "chunk", "kind", "sentence", "question", "answer", "again", "dropped", "found"},
    },
    "10_preference_tuning": {
        "curves": {"arm", "seed", "step", "decoding", "gold", "proxy", "kl", "length", "repeated", "ended", "exact"}
        | {"words", "words_right", "proxy_scaled"},
        "wins": WINS,
        "changes": {"arm", "decoding", "measure", "since", "before", "after", "difference", "low", "high"},
        "reward_model": {"seed", "comparisons", "held_out", "right", "low", "high"}
        | {"rank_ended", "rank_length", "rank_gold", "rank_words"},
        "log": {"arm", "seed", "step", "loss", "reward", "kl", "accuracy", "margin", "length", "entropy"},
        "shown": {
            "question",
            "prompt",
            "answer",
            "dpo",
            "dpo, 0.125",
            "dpo, 0.25",
            "rl",
            "rl, 0.125",
            "rl, 0.25",
            "sft",
            "gold_dpo",
            "gold_dpo, 0.125",
            "gold_dpo, 0.25",
            "gold_rl",
            "gold_rl, 0.125",
            "gold_rl, 0.25",
            "gold_sft",
        },
        "nll": {"position_low", "position_high", "nll", "low", "high", "documents", "arm", "seed", "whole"},
        "retrieval": {"arm", "seed", "task", "length", "probability", "exact", "rouge_l"},
        "retrieval_change": {"arm", "seed", "questions", "before", "after", "difference", "low", "high"},
    },
    "10_fresh_seeds": {
        "choice_wins": WINS,
        "choice_answers": {"arm", "test", "seed", "decoding", "gold", "length", "ended", "words_right"},
        "choice_nll": {"arm", "unread", "seed", "nll", "low", "high", "documents"},
        "wins": WINS,
        "answers": {"arm", "test", "seed", "decoding", "gold", "length", "ended", "words_right"},
        "nll": {"arm", "unread", "seed", "nll", "low", "high", "documents"},
    },
    "11_ablations": {
        "nll_by_position": {"method", "training", "seed", "position_low", "position_high", "value"},
        "first_sentence_retrieval": {"method", "training", "seed", "length", "value"},
        "cost": {"method", "training", "seed", "tokens", "seconds"},
    },
    "11_longer_race_at_another_rate": {
        "nll_by_position": {"method", "training", "seed", "position_low", "position_high", "value"},
        "first_sentence_retrieval": {"method", "training", "seed", "length", "value"},
        "cost": {"method", "training", "seed", "tokens", "seconds"},
    },
    "11_longer_race": {
        "nll_by_position": {"method", "training", "seed", "position_low", "position_high", "value"},
        "first_sentence_retrieval": {"method", "training", "seed", "length", "value"},
        "cost": {"method", "training", "seed", "tokens", "seconds"},
    },
    "12_switch_of_a_copying_model": {
        "cells": {
            *("size", "arm", "seed", "parameters", "tokens", "short_steps", "long_steps", "flops", "flops_counted"),
            "seconds",
        },
        "copying": {"size", "arm", "seed", "distance_low", "distance_high", "value"},
    },
    "12_data_mix_of_a_copying_model": {
        "cells": {
            *("size", "arm", "seed", "parameters", "tokens", "short_steps", "long_steps", "flops", "flops_counted"),
            "seconds",
        },
        "copying": {"size", "arm", "seed", "distance_low", "distance_high", "value"},
        "copying_short": {"size", "arm", "seed", "distance_low", "distance_high", "value"},
    },
    "12_pretraining_curriculum": {
        "cells": {
            *("size", "arm", "seed", "parameters", "tokens", "short_steps", "long_steps", "flops", "flops_counted"),
            "seconds",
        },
        "context_loss": {"model", "seed", "parameters", "context", "value"},
        "power_law": {
            *("model", "seed", "parameters", "alpha", "beta", "gamma", "rmse", "beta_low", "beta_high", "saved"),
            *("saved_low", "saved_high"),
        },
        "context_saved": {"model", "document", "tokens", "nats", "seed"},
    },
    "11_quoting_share": {"scores": {"share", "measure", "value", "low", "high"}},
    "11_longrope_search": {"factors": {"pair", "factor"}, "search": {"round", "nll"}},
    "11_rope_base_search": {
        "search": {"rope_base", "arm", "position_low", "position_high", "nll", "low", "high", "documents", "tokens"},
    },
    "11_training_choice": {
        "cost": {"training", "window", "steps", "seed", "tokens", "seconds"},
        "nll_by_position": {"arm", "position_low", "position_high", "nll", "low", "high", "documents", "tokens"},
        "difference": {"training", "position_low", "position_high", "nll", "low", "high", "documents"},
    },
}
COLUMNS["12_curriculum_of_a_larger_model"] = COLUMNS["12_pretraining_curriculum"]
COLUMNS["12_curriculum_on_a_gpu"] = {
    **COLUMNS["12_pretraining_curriculum"],
    "cells": COLUMNS["12_pretraining_curriculum"]["cells"] | {"learning_rate"},
    "pilots": {"arm", "factor", "learning_rate", "steps", "loss", "seconds"},
    "choice": {"long", "short", "steps", "long_seconds", "short_seconds"},
    "speed": {"arm", "milliseconds", "tokens", "fastest", "peak_gib"},
    "contexts": {"seed", "document", "context", "nats", "tokens"},
    "as_trained": {"size", "seed", "document", "nats", "tokens"},
}
COLUMNS["12_curriculum_of_4m"] = COLUMNS["12_curriculum_on_a_gpu"]
COLUMNS["12_sparse_attention"] = {
    "cells": COLUMNS["12_pretraining_curriculum"]["cells"],
    "as_trained": COLUMNS["12_curriculum_on_a_gpu"]["as_trained"],
}
COLUMNS["12_curriculum_of_more_tokens"] = COLUMNS["12_pretraining_curriculum"]
COLUMNS["12_sparse_attention_on_short"] = COLUMNS["12_sparse_attention"]
TABLE = pd.DataFrame({"step": [1, 2], "loss": [3.123456789, 2.5], "tokens_per_second": [10.0, 11.0]})


def write(folder, table=TABLE, **arrays):
    options = {"preset": "tiny", "question": "?", "seeds": {"training": 0}, "seconds": 1.0}
    return write_record(folder, "05_finetune_qlora", tables={"training": table}, arrays=arrays, **options)


def committed():
    return sorted(RESULTS.glob("*/*.json"))


def columns_of(path):
    """The record's name in COLUMNS: with its folder, if the folder's record has tables of its own."""
    own = f"{path.parent.name}/{path.stem}"
    return own if own in COLUMNS else path.stem


COLUMNS["smollm2/09_instruction_tuning"] = COLUMNS["09_on_hotpotqa"]  # SQuAD

# A real model, without controls and pass keys, and with the share preferred at each step.
COLUMNS["smollm2/10_preference_tuning"] = {
    **{name: COLUMNS["10_preference_tuning"][name] for name in ("curves", "wins", "changes", "reward_model", "log")},
    "nll": COLUMNS["10_preference_tuning"]["nll"],
    "nll_of_seeds": {"arm", "nll", "low", "high", "documents", "seeds"},
    "wins_by_step": {"arm", "seed", "step", "decoding", "preferred", "low", "high"},
    "stages": {"task", "measure", "arm", "since", "items", "seeds"} | {"before", "after", "difference", "low", "high"},
    "shown": {"question", "prompt", "answer", "dpo", "rl", "sft", "gold_dpo", "gold_rl", "gold_sft"},
}

COLUMNS["06_dose_second_texts"] = {
    name: COLUMNS["06_dose_response"][name]
    for name in ("nll_by_position", "full_minus_windows", "whole_windows", "differences")
}
COLUMNS["06_dose_second_texts"]["held_out"] = COLUMNS["06_dose_response"]["held_out"] | {"share_in_other_texts"}

COLUMNS["gpu/04_trainers"] = {
    name: columns for name, columns in COLUMNS["gpu/04_one_gpu_budget"].items() if name != "longest"
}

# One dose of each arm: nothing to compare a dose with.
COLUMNS["qwen2.5-coder-1.5b/06_dose_response"] = {
    name: columns for name, columns in COLUMNS["06_dose_response"].items() if name != "gain_by_dose"
}


@pytest.mark.parametrize("path", committed(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_records_follow_the_schema(path):
    record = read_record(path)
    assert record["preset"] == path.parent.name
    assert {name: set(rows[0]) for name, rows in record["tables"].items()} == COLUMNS[columns_of(path)]
    assert record["provenance"]["commit"] != "unknown"


def test_delivered_records_are_there():
    assert {columns_of(path) for path in committed()} == set(COLUMNS)


def test_bucket_edges_hold_the_agreed_ones():
    table = Record(RESULTS / "tiny" / "06_perplexity_by_position.json").table("nll_by_position")
    assert {256, 512, 1024, 2048, 4096} <= {*table.position_low, *table.position_high}
    assert set(table.arm) == {"base", "rope_base_only", "yarn", "extended"}


def test_arrays_beside_the_record_need_no_pickle_and_give_its_means():
    path = RESULTS / "tiny" / "06_perplexity_by_position.json"
    table = Record(path).table("nll_by_position").set_index(["arm", "position_low"])
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        mean = arrays["nll_extended"][:, 2047:4095].astype(float).mean()
        assert len(arrays["documents"]) == len(arrays["nll_extended"])
        assert len(set(arrays["documents"])) >= 12
    assert mean == pytest.approx(table.loc[("extended", 2048), "nll"], abs=1e-3)


def test_the_dose_record_follows_from_its_arrays():
    """What a reader computes from the npz with plain numpy, in one bucket, document by document."""
    path = RESULTS / "smollm2" / "06_dose_response.json"
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        nats = dict(zip(arrays["readings"].tolist(), arrays["nats"].astype(float), strict=True))
    table = Record(path).table("full_minus_windows").set_index(["arm", "tokens_trained", "weights", "position_low"])
    row = table.loc[("full16k-s0", 10_485_760, "nf4", 16_384)].set_index("position_high").loc[32_768]
    name = "full16k-s0-10485760"
    change = (nats[f"{name}/full"] - nats[f"{name}/window"])[:, 128:].sum(axis=1) / 16_384
    change = change[np.isfinite(change)]  # NaN: a text of 16,384 tokens
    assert len(change) == row.documents == 20
    assert row.nats == pytest.approx(change.mean(), abs=1e-6)
    assert row.without_one == pytest.approx((change.sum() - change.min()) / 19, abs=1e-6)
    assert row.below_zero == (change < 0).sum()
    assert row.low < row.nats < row.high < 0
    assert np.abs(nats[f"{name}/full"] - nats[f"{name}/window"])[:, :64].max() < 0.5  # the same first window, in bf16


def test_the_second_set_of_texts_shares_nothing_with_the_first_and_follows_from_its_arrays():
    path = RESULTS / "smollm2" / "06_dose_second_texts.json"
    texts, first = (
        Record(path).table("held_out"),
        Record(RESULTS / "smollm2" / "06_dose_response.json").table("held_out"),
    )
    assert len(texts) + len(first) >= 45
    assert not {*texts.kind} & {*first.kind}
    assert texts[["share_in_training", "share_in_other_texts"]].max(axis=None) < 0.05
    assert (texts.tokens >= 32_768).sum() >= 20
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        nats = dict(zip(arrays["readings"].tolist(), arrays["nats"].astype(float), strict=True))
    change = nats["full16k-s0-10485760/full"] - nats["full16k-s0-10485760/window"]
    change = change[:, 128:].sum(axis=1)[texts.tokens >= 32_768] / 16_384
    row = Record(path).table("full_minus_windows").set_index(["position_low", "position_high"]).loc[(16_384, 32_768)]
    assert row.nats == pytest.approx(change.mean(), abs=1e-6)
    assert row.below_zero == (change < 0).sum()
    both = []
    for slug in ("06_dose_response", "06_dose_second_texts"):  # against the control that read both sets
        with np.load(path.with_name(f"{slug}.npz"), allow_pickle=False) as arrays:
            nats = dict(zip(arrays["readings"].tolist(), arrays["nats"].astype(float), strict=True))
        change = nats["full16k-s0-10485760/full"] - nats["control8k-s1-10485760/window"]
        both += [row for row in change[:, 128:].sum(axis=1) / 16_384 if np.isfinite(row)]
    found = read_other_texts(read_dose_results(["smollm2"])["smollm2"]).compare().set_index(["quantity", "texts"])
    row = found.loc[("far out, minus another seed's control in windows", "both")]
    assert (row.documents, row.below_zero) == (len(both), (np.array(both) < 0).sum())
    assert row.nats == pytest.approx(np.mean(both), abs=1e-6)


def test_every_peak_on_a_gpu_is_within_3_percent_of_the_predicted_one_and_under_its_cap():
    steps = Record(RESULTS / "gpu" / "04_one_gpu_budget.json").table("steps")
    ours = steps[steps.contender == "ours"]
    assert len(ours) == 11
    assert ((ours.predicted_gib / ours.allocated_gib - 1).abs() < 0.03).all()
    assert (ours.allocated_gib <= ours.reserved_gib).all()
    capped = ours[ours.cap_gib.notna()]
    assert len(capped) == 5
    assert (capped.reserved_gib < capped.cap_gib).all()
    again = Record(RESULTS / "gpu" / "04_trainers.json").table("steps").query("contender == 'ours'")
    assert ((again.predicted_gib / again.allocated_gib - 1).abs() < 0.015).all()


def test_round_trip(tmp_path):
    path = write(tmp_path)
    assert Record(path).table("training").loss.tolist() == [3.12346, 2.5]
    assert [file.name for file in tmp_path.iterdir()] == ["05_finetune_qlora.json"]
    text = path.read_text()
    assert '  "training": [\n   {"step": 1, "loss": 3.12346, "tokens_per_second": 10.0},\n   {"step": 2, ' in text
    assert '\n   "torch": ' in text  # what is no row has a line for each entry


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: record.pop("question"), "the keys must be"),
        (lambda record: record.update(schema=2), "schema = 1"),
        (lambda record: record["provenance"].pop("date"), "provenance needs"),
        (lambda record: record["tables"]["training"][0].pop("loss"), "all with the same columns"),
        (lambda record: record["tables"].update(empty=[]), "'empty' must have rows"),
    ],
)
def test_bad_record_is_one_clear_error(tmp_path, damage, message):
    path = write(tmp_path)
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_record(path)


def test_half_written_and_missing_records(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="is missing or corrupt"):
        read_record(path)
    with pytest.raises(ValueError, match=r"nothing.json is missing or corrupt .*run its notebook or experiment again"):
        read_record(tmp_path / "nothing.json")


def test_a_record_that_is_needed_says_so_when_it_is_read():
    assert recorded("tiny", "no_such_record") is None
    with pytest.raises(
        ValueError, match=r"no_such_record.json is missing or corrupt .* bring a stored one back with git"
    ):
        recorded("tiny", "no_such_record", needed=True).table("cells")


@pytest.mark.parametrize("values", [[1.0, math.inf], [-math.inf, 1.0], [math.nan, math.nan]])
def test_nothing_is_written_of_results_that_are_none(tmp_path, values):
    before = write(tmp_path).read_bytes()
    broken = pd.DataFrame({"step": [1, 2], "loss": values})
    with pytest.raises(ValueError, match="table 'training' of 05_finetune_qlora holds infinite numbers or only NaN"):
        write(tmp_path, broken, loss=np.array(values))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    path = write(tmp_path, TABLE.assign(loss=[1.0, math.nan]), loss=np.array([3.0]))
    assert read_arrays(path.with_suffix(".npz"))["loss"] == 3.0
    assert Record(path).table("training").loss.isna().tolist() == [False, True]


def test_without_git_a_record_says_that_its_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_record(write(tmp_path))["provenance"]["commit"] == "unknown"


@pytest.mark.parametrize("content", ["null", "[]", "3"])
def test_a_record_that_is_no_table_is_one_clear_error(tmp_path, content):
    path = write(tmp_path)
    path.write_text(content)
    with pytest.raises(ValueError, match="the keys must be"):
        read_record(path)


def test_storing_the_same_results_twice_changes_nothing(tmp_path):
    first = write(tmp_path / "run")
    store_record(first, tmp_path / "stored")
    before = (tmp_path / "stored" / first.name).read_bytes()
    write(tmp_path / "run", TABLE.assign(tokens_per_second=[99.0, 98.0]))  # slower machine, same results
    store_record(first, tmp_path / "stored")
    assert (tmp_path / "stored" / first.name).read_bytes() == before
    write(tmp_path / "run", TABLE.assign(loss=[1.0, 0.5]))
    store_record(first, tmp_path / "stored")
    assert results(tmp_path / "stored" / first.name)["training"][0]["loss"] == 1.0


def test_published_numbers_name_their_source():
    for path in (REPOSITORY / "data" / "published").glob("*.json"):
        assert json.loads(path.read_text())["source"]


def test_digitised_retrieval_curves_have_a_score_at_every_length_and_share_a_model():
    figures = {name: read_published("llama2_long")[name] for name in ("figure_5b", "figure_7", "figure_9b")}
    for figure in figures.values():
        assert "digitised" in figure["how"]
        assert figure["length"] == sorted(set(figure["length"]))
        for scores in figure["rouge_l"].values():
            assert len(scores) == len(figure["length"])
            assert all(0 <= score <= 100 for score in scores)
    # The paper's RoPE ablation was trained on the mix with more long texts: one model, drawn in two figures.
    assert figures["figure_7"]["rouge_l"]["llama2_mix_more_long"] == figures["figure_5b"]["rouge_l"]["abf"]


def test_bounds_that_nobody_has_are_numbers_when_read_again(tmp_path):
    table = pd.DataFrame({"nll": [1.5, 2.5], "low": [math.nan] * 2, "high": [math.nan] * 2})
    options = {"preset": "tiny", "question": "?", "seeds": {"split": 0}, "seconds": 1.0}
    path = write_record(tmp_path, "11_few", tables={"search": table}, **options)
    pd.testing.assert_frame_equal(Record(path).table("search"), table)


def test_every_number_is_kept_and_an_infinite_one_refused(tmp_path):
    options = {"preset": "tiny", "question": "?", "seeds": {}, "seconds": 1.0}
    table = pd.DataFrame({"small": [1.23456789e-12, 0.5], "count": [10_485_760, None], "mixed": ["a", 2.0]})
    read = Record(write_record(tmp_path, "11_few", tables={"table": table}, **options)).table("table")
    assert read["small"].tolist() == [1.23457e-12, 0.5]
    assert read["count"][0] == 10_485_760
    assert np.isnan(read["count"][1])
    (tmp_path / "11_few.json").unlink()
    for infinite in (np.inf, -np.inf):
        with pytest.raises(ValueError, match="inf"):
            write_record(tmp_path, "11_few", tables={"table": table.assign(mixed=["a", infinite])}, **options)
    assert not any(tmp_path.iterdir())
