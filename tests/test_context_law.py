"""The loss behind shorter and longer contexts: targets, cuts, and fits of losses whose law is known."""

import numpy as np
import pytest

from experiments import context_law
from experiments.context_law import ContextLoss, Target, betas, contexts, nats_of
from experiments.power_law import power_law
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.presets import load_preset
from llama_long_utils.records import recorded

CONTEXTS = np.array([64, 128, 256, 512, 1024, 2048, 4096, 7424], float)


def losses(beta: float, *, noise: float = 0.05, tokens: int = 256) -> ContextLoss:
    """Twenty texts of five kinds whose loss follows the law, each at a level of its own."""
    generator = np.random.default_rng(0)
    steps = np.arange(tokens)
    true = power_law(CONTEXTS[:, None] + 1 + steps, np.log(25.0), beta, 1.5).mean(axis=1)
    levels = generator.normal(0, 0.3, (20, 1)) + generator.normal(0, noise, (20, len(CONTEXTS)))
    return ContextLoss(CONTEXTS, (true + levels) * tokens, np.full(20, float(tokens)), tuple("abcde" * 4))


def test_the_law_is_found_again_though_a_target_has_many_tokens():
    part = losses(0.45, noise=0.0)
    ((log_alpha, beta, _),) = part.fits("power law", 1e9, part.drawn()[:1])
    assert beta == pytest.approx(0.45, abs=1e-3)
    assert np.exp(log_alpha) == pytest.approx(25, rel=0.01)


def test_a_prediction_from_short_contexts_tells_the_right_law_from_the_wrong_one():
    table = losses(0.45, noise=0.01).predictions(2048).set_index(["law", "context"])
    right, wrong = table.loc[("power law", 7424)], table.loc[("line in log c", 7424)]
    assert right.low < 0 < right.high
    assert abs(right.value) < 0.02 and wrong.high < -0.05
    assert table.loc[(context_law.CLOSER, 7424)].high < 0


def test_records_hold_what_is_fitted_to_them(monkeypatch):
    monkeypatch.setattr(context_law, "SAMPLES", 2)  # the values of the texts themselves need no more
    for preset in context_law.ARMS:
        record = recorded(preset, context_law.SLUG)
        again = context_law.with_fits(preset, record.table("contexts"))
        for name in ("predictions", "betas"):
            np.testing.assert_allclose(record.table(name).value, again[name].value, rtol=1e-3, atol=1e-4)


def test_an_interval_asks_that_kinds_agree():
    """Of a mean the jackknife is Student's t over kinds; a bootstrap of two kinds alone would be much narrower."""
    part = ContextLoss(np.array([64.0, 128.0]), np.array([[0.0, 1.0], [0.0, 3.0]]), np.ones(2), ("a", "b"))
    found = context_law._interval(part.drawn()[:, 1])
    assert found["value"] == pytest.approx(2)
    assert found["high"] - found["value"] == pytest.approx(12.706, abs=1e-3)  # of one degree of freedom
    assert found["value"] - found["low"] == pytest.approx(12.706, abs=1e-3)


def test_the_larger_exponent_is_reported_on_the_same_texts():
    table = betas({"small": losses(0.3, noise=0.01), "large": losses(0.6, noise=0.01)}, 2048).set_index("model")
    assert table.loc["large minus small"].low > 0
    assert table.loc["small"].low < 0.3 < table.loc["small"].high


def test_contexts_leave_room_for_a_target_in_any_tokenizer():
    assert contexts(context_law.ARMS["tiny"][1]) == [64, 128, 256, 512, 1024, 2048, 4096 - 3 * context_law.TARGET]
    assert contexts(2048) == [64, 128, 256, 512, 1024, 2048]


@pytest.mark.parametrize(("preset", "up_to"), [("tiny", 1024), ("smollm2", 2048), ("qwen2.5-coder-1.5b", 512)])
def test_a_law_is_fitted_to_a_quarter_of_the_window(preset, up_to):
    longest = context_law.ARMS[preset][1]
    assert context_law.fitted_up_to(longest) == up_to
    assert set(recorded(preset, context_law.SLUG).table("predictions").fitted_up_to) == {up_to}


def test_a_target_is_scored_behind_the_last_tokens_of_what_stands_before_it():
    preset = load_preset("tiny")
    tokenizer, model = load_tokenizer(preset.base.source), load_arm(preset, "base")
    head = "The state of the Union is strong, and we have work to do. " * 20
    target = Target("speeches", "one", head, "We shall not fail.")
    found = nats_of(model, tokenizer, target, [16, 64])
    ids = tokenizer(head, add_special_tokens=False)["input_ids"][-64:]
    own = tokenizer(target.text, add_special_tokens=False)["input_ids"]
    whole = TokenizedDocument("speeches", "one", np.array([tokenizer.bos_token_id, *ids, *own]))
    assert found["tokens"] == len(own)
    assert found["bytes"] == len(target.text)
    assert found["nats"][1] == pytest.approx(float(token_nll(model, whole)[-len(own) :].sum()), rel=1e-4)
    assert found["nats"][0] != pytest.approx(found["nats"][1], rel=1e-4)
    with pytest.raises(ValueError, match="tokens before a target"):
        nats_of(model, tokenizer, target, [4096])


def test_a_preset_without_an_arm_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="llama2-7b"):
        context_law.measure(load_preset("llama2-7b"), tmp_path)
