"""Preference tuning through TRL: what its trainers would do in silence, named by the trap, and what ours do."""

import dataclasses
import logging
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, RewardConfig, RewardTrainer, RLOOConfig

from conftest import LORA, RAISED, new_llama, small_preset
from experiments.preference import costs_of_seeds, in_few_steps, wins_by_step
from experiments.preference_controls import TEXT, TOKENS, with_text
from experiments.preference_figures import (
    NEW,
    at_equal_length,
    at_the_end,
    costs_on_new_seeds,
    near,
    record_with_controls,
    what_costs_what,
)
from experiments.preference_fresh import SLUG
from experiments.preference_tasks import changes_of_stages
from experiments.race_results import student_reach, wider
from llama_long_utils.evaluation.generation import likelihoods
from llama_long_utils.evaluation.statistics import mean_interval
from llama_long_utils.model.adapters import AdapterCard, add_lora, load_adapter, read_card, save_adapter
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.loss import hidden_states, next_token_nll
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.plan import PLAIN
from llama_long_utils.presets import load_preset
from llama_long_utils.records import recorded
from llama_long_utils.stages import Preference, PreferenceStage
from llama_long_utils.training import comparisons, preferences
from llama_long_utils.training import trainer as trainer_module
from llama_long_utils.training.comparisons import Asked, Comparison, compare, load_reward_model, rewards, sample_answers
from llama_long_utils.training.ledger import StepShape, ledger
from llama_long_utils.training.planner import GIB, USABLE, leanest, model_shape, predict

TOKENIZER = load_tokenizer(REPOSITORY / "data" / "tiny-llama")
EOS = TOKENIZER.eos_token_id
NOWHERE = tempfile.mkdtemp()  # for trainers that only look
STAGE = PreferenceStage(
    steps=2, rows_per_step=4, rows_at_once=4, learning_rate=1e-3, warmup_steps=0, checkpoint_every=1, beta=0.1
)
NUMBERS = Preference(tokens=24, answer_tokens=8, questions=4, answers=2, errors=0.0, reward=STAGE, rl=STAGE, dpo=STAGE)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def preset(request, tmp_path_factory):
    """A small Llama under RAISED; `start` is the folder of its instruction-tuned adapter."""
    folder = tmp_path_factory.mktemp("base")
    new_llama(seed=0, vocab_size=len(TOKENIZER), bos_token_id=0, eos_token_id=1).to(torch.bfloat16).save_pretrained(
        folder
    )
    TOKENIZER.save_pretrained(folder)
    preset = small_preset(folder, dtype=request.param)
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(preset), "run_folder", property(lambda _self: home))
        yield dataclasses.replace(preset, lora=LORA, preference=NUMBERS)


@pytest.fixture(scope="module")
def start(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "adapter"
    base = Path(preset.base.source)
    model = add_lora(load_base(base, RAISED, dtype=preset.base.dtype), LORA, seed=0)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight) if "lora_B" in name else 1e-3 * torch.randn_like(weight)
    save_adapter(model, AdapterCard(str(base), weights_sha256(base), RAISED, {}, {}, {}), folder)
    return folder


def random_rows(count, seed=0, tokens=24):
    generator = np.random.default_rng(seed)
    return [[0, *generator.integers(2, 2048, tokens - 1).tolist()] for _ in range(count)]


def pairs(count=6, tokens=24):
    answers = random_rows(2 * count, seed=1, tokens=7)
    prompts = random_rows(count, tokens=tokens)
    return [Comparison(prompt, [*answers[2 * n][1:], EOS], answers[2 * n + 1][1:]) for n, prompt in enumerate(prompts)]


def any_reward(_prompts, answers):
    return [float(sum(answer) % 97) for answer in answers]


def weights(folder, preset):
    model = load_adapter(
        load_base(Path(preset.base.source), RAISED, dtype=preset.base.dtype), folder, Path(preset.base.source)
    )
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if ".default." in name}


def test_the_reference_is_the_instruction_tuned_model_and_kl_starts_at_zero(preset, start):
    trained = preferences.optimise_policy(preset, random_rows(4), any_reward, start, name="any")
    assert abs(trained.log[0]["kl"]) < 1e-5
    assert {"reward", "kl", "length"} <= set(trained.log[0])
    model = load_adapter(
        load_base(Path(preset.base.source), RAISED, dtype=preset.base.dtype), start, Path(preset.base.source)
    )
    rows = torch.tensor(random_rows(4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=preset.base.dtype == "bfloat16"):
        own = model(rows).logits.float().log_softmax(-1)
        with model.disable_adapter():  # what TRL takes for a reference if the adapter is new
            base = model(rows).logits.float().log_softmax(-1)
    assert (own.exp() * (own - base)).sum(-1).mean() > 1e-3


def test_dpo_begins_at_log_2(preset, start):
    trained = preferences.train_dpo(preset, pairs(), start)
    assert trained.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert trained.log[1]["loss"] != trained.log[0]["loss"]


def test_controls_count_a_text_beside_the_pairs_or_the_chosen_answers_only(preset, start):
    base, rows = Path(preset.base.source), pairs()
    model = load_adapter(load_base(base, RAISED, dtype=preset.base.dtype), start, base)
    text = torch.tensor(random_rows(1, tokens=TOKENS)[0])
    with torch.no_grad():
        nll = next_token_nll(hidden_states(model, text[None]), model.get_output_embeddings(), text[None]) / (TOKENS - 1)
    trained = preferences.train_dpo(preset, rows, start, trainer=with_text([text] * STAGE.steps), name="text")
    assert trained.log[0]["loss"] == pytest.approx(math.log(2) + TEXT * nll.item(), rel=1e-3)
    numbers = dataclasses.replace(NUMBERS, dpo=dataclasses.replace(STAGE, rows_per_step=6, rows_at_once=6))
    trained = preferences.train_dpo(preset, rows, start, losses=["sft"], settings=numbers, name="imitation")
    answers = [likelihoods(model, [(one.prompt, one.chosen)])[0][0] for one in rows]
    expected = -sum(answers) / sum(len(one.chosen) for one in rows)
    assert trained.log[0]["loss"] == pytest.approx(expected, rel=1e-3 if preset.base.dtype == "float32" else 2e-2)


def test_long_pairs_are_trained_on_whole_though_trl_drops_what_has_more_than_1024_tokens(preset, start):
    long = pairs(2, tokens=1100)
    rows = [{"prompt": "a" * 1500, "chosen": "b", "rejected": "c"}] * 2
    config = DPOConfig(NOWHERE, report_to=[], use_cpu=True, bf16=False)
    plain = DPOTrainer(
        policy(preset, start), None, config, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER
    )
    assert len(plain.train_dataset) == 0
    numbers = dataclasses.replace(NUMBERS, tokens=1100)
    for train, per_pair in ((preferences.train_dpo, 7 + 6), (preferences.train_reward_model, 2 * 1100 + 7 + 6)):
        trained = train(preset, long, start, settings=numbers)
        assert trained.label_tokens == trained.settings.steps * STAGE.rows_per_step * per_pair
    with pytest.raises(ValueError, match="a row has 1,107 tokens"):
        preferences.train_dpo(preset, long, start)


def policy(preset, start):
    base = Path(preset.base.source)
    return load_adapter(load_base(base, RAISED, dtype=preset.base.dtype), start, base, trainable=True)


def dpo_trainer(model, **options):
    rows = [{"prompt": "to be", "chosen": "or not", "rejected": "again"}] * 2
    config = DPOConfig(NOWHERE, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    return DPOTrainer(model, None, config, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER, **options)


def test_norms_and_lora_stay_as_they_were_in_fp32_though_trl_casts_them_to_bf16(preset, start):
    model = policy(preset, start)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("norm" in name for name in before)
    with preferences.reference_kept(model):
        trainer = dpo_trainer(model)
        assert {weight.dtype for name, weight in model.named_parameters() if name in before} == {torch.bfloat16}
    after = dict(model.named_parameters())
    for name, weight in before.items():
        assert torch.equal(after[name], weight)
        assert torch.equal(after[name.replace(".default.", ".ref.")], weight)
    preferences.check_preference(trainer, RAISED)
    with pytest.raises(ValueError, match="not a copy of the policy"):  # which is rounded, its reference is not
        preferences.check_preference(dpo_trainer(policy(preset, start)), RAISED)
    for name in before:
        for adapter in (".default.", ".ref."):
            after[name.replace(".default.", adapter)].data = before[name].to(torch.bfloat16)
    with pytest.raises(ValueError, match="not fp32"):
        preferences.check_preference(trainer, RAISED)


def test_a_reference_that_full_finetuning_loads_by_its_path_has_another_rope_and_is_refused(preset):
    whole = load_base(Path(preset.base.source), RAISED, dtype=preset.base.dtype, quantized=False)
    trainer = dpo_trainer(whole)
    check_rope(trainer.model, RAISED)
    assert trainer.ref_model.config.rope_parameters["rope_theta"] == 1e4  # the policy has 5e5, and nothing said so
    with pytest.raises(ValueError, match="does not rotate as asked"):
        preferences.check_preference(trainer, RAISED)


def test_a_policy_has_a_kl_penalty_though_grpo_has_none_by_default():
    assert GRPOConfig(NOWHERE, use_cpu=True, bf16=False).beta == 0
    with pytest.raises(ValueError, match="greater than 0"):
        dataclasses.replace(STAGE, beta=0.0)


def test_answers_end_where_the_preset_says_and_long_prompts_are_refused_not_cut(preset, start):
    assert RLOOConfig(NOWHERE, use_cpu=True, bf16=False).max_completion_length == 512
    trained = preferences.optimise_policy(preset, random_rows(4), any_reward, start, name="any")
    assert all(row["length"] <= NUMBERS.answer_tokens for row in trained.log)
    with pytest.raises(ValueError, match="a row has 99 tokens"):
        preferences.optimise_policy(preset, random_rows(4, tokens=99), any_reward, start, name="any")


def test_the_adapter_is_named_default_without_which_trl_stops_and_is_saved_without_its_copy(preset, start):
    model = policy(preset, start)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("sft", model.peft_config["default"])
    model.set_adapter("sft")
    model.delete_adapter("default")
    with pytest.raises(KeyError, match="default"):
        dpo_trainer(model)
    trained = preferences.train_dpo(preset, pairs(), start)
    assert not (trained.folder / "ref").exists()
    assert read_card(trained.folder).training["stage"] == "dpo"
    before, after = weights(start, preset), weights(trained.folder, preset)
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_a_reward_model_trains_where_trl_mixes_fp32_and_bf16(preset, start):
    plain = load_reward_model(preset, start, trainable=True)
    rows = Dataset.from_list([{"chosen_ids": [0, 5, 1], "rejected_ids": [0, 6, 1]}] * 8)
    config = RewardConfig(NOWHERE, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1)
    trainer = RewardTrainer(plain, config, train_dataset=rows, processing_class=TOKENIZER)
    with pytest.raises(RuntimeError, match=r"dtype|same type"):
        trainer.train()
    numbers = dataclasses.replace(NUMBERS, reward=dataclasses.replace(STAGE, steps=12, learning_rate=3e-3))
    trained = preferences.train_reward_model(preset, pairs(), start, settings=numbers)
    assert np.mean([row["loss"] for row in trained.log[-2:]]) < np.mean([row["loss"] for row in trained.log[:2]])
    model = load_reward_model(preset, trained.folder)
    check_rope(model, RAISED)
    better, worse = (
        rewards(model, [[*one.prompt, *getattr(one, side)] for one in pairs()]) for side in ("chosen", "rejected")
    )
    assert np.mean(np.array(better) > worse) >= 5 / 6


def test_a_reward_model_is_no_language_model(preset, start, tmp_path):
    trained = preferences.train_reward_model(preset, pairs(), start, name="no-language-model")
    with pytest.raises(ValueError, match="is a reward model's, which rates answers and writes none"):
        load_arm(preset, "extended", adapter=trained.folder)


def test_only_sampled_answers_may_be_rewarded_alike(preset, start, monkeypatch):
    """Elsewhere gradients that are all zero are a fault, and stop the training."""
    seen = []
    monkeypatch.setattr(trainer_module, "check_lora_gradients", lambda _model, rewarded: seen.append(rewarded) or True)
    preferences.train_reward_model(preset, pairs(), start, name="looked-at")
    preferences.optimise_policy(preset, random_rows(4), any_reward, start, name="looked-at")
    assert seen == [False, True]


def test_a_run_is_the_same_whenever_its_checkpoints_come(preset, start):
    trained = preferences.train_dpo(preset, pairs(), start, name="often")
    often = dataclasses.replace(NUMBERS, dpo=dataclasses.replace(STAGE, checkpoint_every=2))
    assert preferences.train_dpo(preset, pairs(), start, name="often", settings=often).folder == trained.folder


def test_a_reward_model_computes_in_the_base_dtype_where_embeddings_are_trained(preset, tmp_path):
    base = Path(preset.base.source)
    lora = dataclasses.replace(LORA, train_embeddings=True)
    model = add_lora(load_base(base, RAISED, dtype=preset.base.dtype), lora, seed=0)
    save_adapter(model, AdapterCard(str(base), weights_sha256(base), RAISED, {}, {}, {}), tmp_path / "adapter")
    loaded = load_reward_model(preset, tmp_path / "adapter", trainable=True)
    found = loaded(input_ids=torch.tensor([[0, 5, 6, 1]])).logits
    assert np.isclose(found.item(), rewards(loaded, [[0, 5, 6, 1]])[0])
    found.sum().backward()
    copy = loaded.get_input_embeddings().modules_to_save.default.weight
    assert copy.dtype == torch.float32 and copy.grad.any()


def test_a_new_head_is_not_reported_but_other_weights_that_are_missing_are_refused(preset, start, tmp_path, capfd):
    handler = logging.StreamHandler()  # on the standard error of this test
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("transformers"), "handlers", [handler])
        patch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)  # whatever was imported before
        load_reward_model(preset, start)
        assert "LOAD REPORT" not in capfd.readouterr().err
        shutil.copytree(preset.base.source, tmp_path / "base")
        weights = load_file(file := tmp_path / "base" / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, file, {"format": "pt"})
        options = {"dtype": preset.base.dtype, "reward": True}
        with pytest.raises(ValueError, match=r"no weights for model\.norm\.weight"):
            load_base(tmp_path / "base", RAISED, **options)
        load_base(tmp_path / "base", RAISED, dtype=preset.base.dtype)
        assert "LOAD REPORT" in capfd.readouterr().err  # as it was before


def test_a_reward_model_sees_whether_a_text_has_ended_though_padding_is_eos(preset, start):
    model = load_reward_model(preset, start)
    row = random_rows(1)[0]
    open_, ended = rewards(model, [row, [*row, EOS]])
    assert open_ != ended
    model.config.pad_token_id = EOS  # what TRL sets for a tokenizer without a padding token
    compute = torch.autocast("cpu", torch.bfloat16, enabled=preset.base.dtype == "bfloat16")
    with torch.no_grad(), compute:
        blind = model(torch.tensor([[*row, EOS]])).logits.item()
        model.config.pad_token_id = TOKENIZER.bos_token_id
        sees = model(torch.tensor([[*row, EOS]])).logits.item()
    assert blind == pytest.approx(open_, rel=1e-2)
    assert sees == pytest.approx(ended, rel=1e-2)


def test_a_reward_model_is_padded_by_what_ends_no_text(preset, start, monkeypatch):
    """Also where a tokenizer's padding, BOS and EOS are one token, as Qwen2.5's."""
    tokenizer, given = load_tokenizer(locate_base(preset)), []
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    monkeypatch.setattr(preferences, "load_tokenizer", lambda _base: tokenizer)

    def stop(**options):
        given.append(tokenizer.convert_tokens_to_ids(options["pad_token"]))
        raise InterruptedError

    monkeypatch.setattr(preferences, "RewardConfig", stop)
    ends = {number for one in pairs() for number in (one.chosen[-1], one.rejected[-1])}
    with pytest.raises(InterruptedError):
        preferences.train_reward_model(preset, pairs(), start, settings=NUMBERS)
    assert given[0] not in {tokenizer.eos_token_id, *ends}


class Stop(TrainerCallback):
    def on_step_end(self, _arguments, state, _control, **_options):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["reward", "rl", "dpo"])
def test_an_interrupted_run_continues_to_the_same_weights(preset, start, stage, monkeypatch, tmp_path):
    numbers = dataclasses.replace(NUMBERS, **{stage: dataclasses.replace(STAGE, steps=3)})

    def train(**options):
        match stage:
            case "reward":
                return preferences.train_reward_model(preset, pairs(), start, settings=numbers, **options)
            case "rl":
                prompts = random_rows(4)
                return preferences.optimise_policy(
                    preset, prompts, any_reward, start, settings=numbers, name="x", **options
                )
            case "dpo":
                return preferences.train_dpo(preset, pairs(), start, settings=numbers, **options)

    logs, found = [], []
    for interrupted in (False, True):
        monkeypatch.setattr(type(preset), "run_folder", property(lambda _self, part=str(interrupted): tmp_path / part))
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train(callbacks=[Stop()])
        trained = train()
        logs.append([(row["loss"], row.get("kl")) for row in trained.log])
        found.append((trained.folder / "adapter_model.safetensors").read_bytes())
    assert logs[0] == logs[1]
    assert found[0] == found[1]


def test_answers_that_were_sampled_before_a_stop_are_not_sampled_again(preset, start, monkeypatch, tmp_path, capsys):
    sampled, runs = [], tmp_path / "stopped"

    def collected(stop_at=0):
        def answer(_model, _tokenizer, prompts, _settings, *, seed, at_once):
            if len(sampled) == stop_at - 1:
                raise KeyboardInterrupt
            sampled.append(len(prompts))
            return [[seed % 2000, number, EOS] for number in range(len(prompts))]

        monkeypatch.setattr(comparisons, "sample_answers", answer)
        monkeypatch.setattr(type(preset), "run_folder", property(lambda _self: runs))
        numbers = dataclasses.replace(NUMBERS, tokens=96, questions=40)
        return preferences.collect(dataclasses.replace(preset, preference=numbers), start)

    with pytest.raises(KeyboardInterrupt):
        collected(stop_at=3)
    assert (
        capsys.readouterr().out == "80 answers, sampled where none is kept: 2 to each of 40 questions, 32 at a time\n"
    )
    assert sampled == [32, 32]
    resumed = collected()
    assert sampled == [32, 32, 16]
    runs = tmp_path / "straight"
    assert collected() == resumed
    assert sampled == [32, 32, 16] * 2


def test_a_step_that_does_not_fit_is_refused_before_anything_is_loaded():
    small = dataclasses.replace(load_preset("tiny"), memory_gib=0.02)
    for stage in ("reward", "rl", "dpo"):
        with pytest.raises(ValueError, match=rf"stage '{stage}'.*lower preference\.{stage}\.rows_at_once"):
            preferences.plan_preference(small, stage, small.preference)
    numbers = load_preset("tiny").preference
    pairs_, answers = (preferences.plan_preference(load_preset("tiny"), stage, numbers)[0] for stage in ("dpo", "rl"))
    assert (pairs_.window, pairs_.sequences_at_once) == (
        numbers.tokens + numbers.answer_tokens,
        numbers.dpo.rows_at_once,
    )
    assert answers.sequences_at_once == numbers.rl.rows_at_once


def test_a_step_is_planned_with_both_sequences_of_a_comparison_and_a_reference():
    tiny = load_preset("tiny")
    config, window = model_shape(tiny.base.source), tiny.preference.tokens + tiny.preference.answer_tokens
    sequences = 2 * tiny.preference.dpo.rows_at_once
    shape = StepShape(window, "float32", PLAIN, sequences=sequences, accumulated=True, gpu=True)
    shape = dataclasses.replace(shape, memory_savings=leanest(config, window, PLAIN))
    needed = predict(config, tiny.lora, shape).device_gib / USABLE * (1 + 1e-6)
    reference = ledger(config, tiny.lora, shape)["adapters"] / GIB

    def fits(stage, gib):
        try:
            preferences.plan_preference(dataclasses.replace(tiny, memory_gib=gib), stage, tiny.preference)
        except ValueError:
            return False
        return True

    assert fits("reward", needed) and not fits("reward", 0.999 * needed)
    assert fits("dpo", needed + reference) and not fits("dpo", needed + 0.99 * reference)


def test_the_best_and_the_worst_answer_are_compared_and_some_pairs_are_turned_round():
    question = Asked([0, 2], [5, 6, 7, EOS])
    answers = [[5, 6, 9, EOS], [5, 6, 7, EOS], [8, 9]]
    assert compare([question], [answers], NUMBERS) == [Comparison([0, 2], answers[1], answers[2])]
    assert len(compare([question] * 2, [answers, [[8], [9]]], NUMBERS)) == 1
    with pytest.raises(ValueError, match="of 1 questions are equally right: raise"):
        compare([question], [[[8], [9]]], NUMBERS)
    many = compare([question] * 2000, [answers] * 2000, dataclasses.replace(NUMBERS, errors=0.1))
    assert 0.08 < np.mean([one.chosen == answers[2] for one in many]) < 0.12


def test_gold_is_one_for_the_answer_only_and_less_for_one_that_does_not_stop():
    question = Asked([0], [5, 6, 7, EOS])
    assert question.gold([5, 6, 7, EOS]) == 1
    assert question.gold([5, 6, 7]) < 1
    assert question.gold([5, 6, 7, 5, 6, 7, 8, 9]) < question.gold([5, 6, 7, 8, EOS]) < 1
    assert question.gold([8, 9]) == 0


def test_answers_do_not_depend_on_their_batch_and_leave_random_numbers_alone(preset, start):
    model, prompts = policy(preset, start), [*random_rows(3), random_rows(1, seed=2, tokens=9)[0]]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    together = sample_answers(model, TOKENIZER, prompts, NUMBERS, temperature=0.0)
    assert torch.rand(1) == expected
    if preset.base.dtype == "float32":
        alone = [sample_answers(model, TOKENIZER, [one], NUMBERS, temperature=0.0)[0] for one in prompts]
        assert together == alone
    assert all(EOS not in answer[:-1] for answer in together)
    drawn = [sample_answers(model, TOKENIZER, prompts, NUMBERS, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_share_preferred_by_step_counts_half_of_the_ties():
    rows = [("sft", 0, 0, 0.5), ("sft", 0, 1, 0.5), ("dpo", 4, 0, 0.6), ("dpo", 4, 1, 0.5), ("dpo", 8, 0, 0.4)]
    rows += [("dpo", 8, 1, 0.5), ("imitation", 8, 0, 0.9)]
    table = pd.DataFrame(rows, columns=["arm", "step", "question", "gold"]).assign(seed=0, decoding="greedy")
    found = wins_by_step(table)
    assert found[found.seed == 0].set_index("step").preferred.to_dict() == {4: 0.75, 8: 0.25}
    assert found[found.seed.isna()].set_index(["arm", "step"]).preferred.to_dict() == {
        ("dpo", 4): 0.75,
        ("dpo", 8): 0.25,
    }


def test_what_all_seeds_cost_has_the_wider_of_two_intervals():
    before = [np.zeros((1, 4)) for _ in range(8)]
    same, more = ([one + 0.1 * number * step for number, one in enumerate(before)] for step in (1, 3))
    read = {("sft", 0): before, ("dpo", 0): same, ("dpo", 1): same, ("rl", 0): same, ("rl", 1): more}
    table = costs_of_seeds(read).set_index("arm")
    assert {*table.seeds} == {2} and {*table.documents} == {8}
    np.testing.assert_allclose(table.nll, [0.35, 0.7])
    over_documents = mean_interval(np.arange(8) / 10)
    np.testing.assert_allclose(table.loc["dpo", ["low", "high"]].astype(float), over_documents)
    reach = student_reach(np.array([0.35, 1.05]))
    np.testing.assert_allclose(table.loc["rl", ["low", "high"]].astype(float), [0.7 - reach, 0.7 + reach])


def test_one_seed_has_the_interval_over_questions_and_several_may_have_a_wider_one():
    assert wider(0.4, 0.6, pd.Series([0.5])) == (0.4, 0.6)
    low, high = wider(0.4, 0.6, pd.Series([0.1, 0.9]))
    assert low < 0.4 and high > 0.6


def test_answers_are_named_at_equal_length_where_an_interval_is_clear_of_one_half():
    table = pd.DataFrame({"arm": ["rl", "dpo"], "decoding": "greedy", "low_cut": [0.3, 0.6], "high_cut": [0.4, 0.7]})
    assert (
        at_equal_length(table)
        == "DPO's greedy answers are still preferred, and RL's greedy ones are worse than no training"
    )
    assert at_equal_length(table.assign(low_cut=0.4, high_cut=0.6)) == "none is shown to be preferred"


def test_a_cost_near_the_limit_has_the_digits_that_tell_them_apart():
    assert [near(value, 0.02) for value in (0.0197, 0.0204, 0.0259)] == ["0.0197", "0.0204", "0.026"]


def test_each_arm_has_an_interval_of_its_cost_and_new_seeds_have_those_of_both_kinds_of_documents():
    record, fresh = record_with_controls("tiny", "10_preference_tuning"), recorded("tiny", SLUG)
    curves, nll = record.table("curves"), record.table("nll")
    last = curves[curves.step == curves.groupby("arm").step.transform("max")]
    ends = last.groupby(["decoding", "arm"])[["words_right", "kl"]].mean()
    table = what_costs_what(ends, record.table("wins"), record.table("changes"), nll[nll.whole], fresh)
    assert (table.low_cost < table.cost).all()
    assert (table.cost < table.high_cost).all()
    again = table[table.index.str.endswith(NEW)]
    read = fresh.table("nll")
    for arm, row in again.iterrows():
        own = read[(read.arm == arm.removesuffix(NEW)) & ~read.unread & read.seed.notna()]
        assert row.ends_study == [*own.high]
        assert row.at_most_study == own.high.max()
    told = costs_on_new_seeds(table, 0.02).set_index(["arm", "documents"])
    assert len(told) == 2 * len(again)
    for arm, row in again.iterrows():
        shown = told.loc[(arm.replace("text 0.7, rate 4e-4", "retuned dpo with text"), "unread")]
        assert shown["seeds above"] == f"{sum(high > 0.02 for high in row.ends)} of {len(row.ends)}"
        assert shown["highest end"] == near(row.at_most, 0.02)


def test_means_at_the_end_are_a_table_of_named_columns_without_controls():
    columns = ["gold", "words_right", "proxy_scaled", "proxy", "kl", "length", "ended"]
    arms = pd.MultiIndex.from_product([["greedy"], ["sft", "rl", "tight rl"]], names=["decoding", "arm"])
    table = at_the_end(pd.DataFrame(7.6, arms, columns))
    assert [*table] == ["decoding", "arm", "gold", "right words", "proxy (sd)", "kl", "length", "ended"]
    assert [*table.arm] == ["sft", "rl"] and [*table.length] == [8, 8]


def test_each_stage_is_compared_with_the_one_before_by_the_same_items():
    rows = [(f"item {number}", "extended", 0, 0.0) for number in range(8)]
    rows += [(f"item {number}", "sft", 0, number / 10) for number in range(8)]
    rows += [
        (f"item {number}", "dpo", seed, number / 10 + step)
        for number in range(8)
        for seed, step in ((0, 0.1), (1, 0.5))
    ]
    answers = pd.DataFrame(rows, columns=["item", "arm", "seed", "value"]).sample(frac=1, random_state=0)
    table = changes_of_stages(answers.assign(task="hellaswag", measure="contrast")).set_index("arm")
    assert {*table["items"]} == {8} and table.seeds.to_dict() == {"sft": 1, "dpo": 2}
    assert table.since.to_dict() == {"sft": "extended", "dpo": "sft"}
    np.testing.assert_allclose(table.difference[["sft", "dpo"]], [0.35, 0.3])
    np.testing.assert_allclose(table.loc["sft", ["low", "high"]].astype(float), mean_interval(np.arange(8) / 10))
    reach = student_reach(np.array([0.1, 0.5]))
    np.testing.assert_allclose(table.loc["dpo", ["low", "high"]].astype(float), [0.3 - reach, 0.3 + reach])


def test_half_the_steps_of_a_quick_look_reach_their_learning_rate():
    tiny = load_preset("tiny")
    looked = in_few_steps(tiny).preference
    assert (looked.rl.steps, looked.rl.warmup_steps) == (6, 2) and looked.reward == tiny.preference.reward
    slow = dataclasses.replace(tiny.preference.rl, warmup_steps=11)
    slow = dataclasses.replace(tiny, preference=dataclasses.replace(tiny.preference, rl=slow))
    assert in_few_steps(slow).preference.rl.warmup_steps == 5
