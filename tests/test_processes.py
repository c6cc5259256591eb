"""Training by several processes gives what one gives. As a script, this file is what each of the processes runs."""

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from transformers import TrainingArguments

from conftest import LORA, new_llama
from experiments.bench import HIGHEST, RESIDENT, forget_highest, own_memory
from llama_long_utils.data.packing import join_pieces
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.attention import share_context
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.memory_savings import apply_memory_savings
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import BaseModel, Data, MemorySavings
from llama_long_utils.training.adapter import train_adapter
from llama_long_utils.training.ledger import COMPONENTS, StepShape, ledger
from llama_long_utils.training.planner import GIB, model_shape
from llama_long_utils.training.processes import divide, join_processes, shard_base
from llama_long_utils.training.random_llama import random_llama
from llama_long_utils.training.trainer import StepLog, train

TINY = load_preset("tiny")
SETTINGS = dataclasses.replace(
    TINY.training,
    **{"window": 64, "reach": 64, "steps": 4, "sequences_per_step": 4, "sequences_at_once": 1, "warmup_steps": 0},
    **{"learning_rate": 1e-4, "checkpoint_every": 2, "gradient_clipping": 1e9, "self_quoting_share": 0.0},
    memory_savings=MemorySavings(1, 24, False, "adamw_torch_fused"),
)
WHOLE = [[64]] * 16
PACKED = [[30, 1, 1, 20, 12], [64], [1, 63], [17, 40, 7]] * 4  # documents across chunks of 16, and as long as one token


def sequences(rows):
    generator = torch.Generator().manual_seed(0)
    pieces = ([torch.randint(2, 100, (n,), generator=generator).numpy() for n in row] for row in rows)
    return [join_pieces(row, 64, padding_id=1) for row in pieces]


def new_model():
    return add_lora(new_llama(seed=0, num_attention_heads=4, num_key_value_heads=2), LORA, seed=0)


def trained(folder, rows, context=1, settings=SETTINGS, sharded=False):
    """Losses and gradient norms, gradients of the first step taken, and the weights at the end."""
    model = shard_base(new_model) if sharded else new_model()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    layers = {name: weight for name, weight in model.named_parameters() if name.endswith("proj.base_layer.weight")}
    gradients, check = {}, StepLog.on_pre_optimizer_step

    def keep(self, *arguments, **options):
        check(self, *arguments, **options)
        for name, weight in weights.items():
            gradients.setdefault(name, weight.grad.clone())

    StepLog.on_pre_optimizer_step = keep
    log = train(model, sequences(rows), settings, folder, context_parallel=context)
    StepLog.on_pre_optimizer_step = check
    numbers = [{name: row[name] for name in ("step", "tokens", "loss", "grad_norm")} for row in log]
    return {
        "log": numbers,
        "gradients": gradients,
        "weights": {name: w.detach().clone() for name, w in weights.items()},
        "layers": {name: getattr(w, "_local_tensor", w).numel() for name, w in layers.items()},
    }


def doll(folder):
    """A preset of a random Llama in this folder, with texts of its own."""
    training = dataclasses.replace(SETTINGS, attention="documents", learning_rate=2e-3, gradient_clipping=1.0)
    return dataclasses.replace(
        TINY,
        base=BaseModel(str(folder / "base"), "float32", window=64, rope_base=1e4, head_dim=32),
        extension=dataclasses.replace(TINY.extension, window=512),
        data=Data([str(folder / "texts")], {str(folder / "texts"): 1}, minimum_characters=100, split_seed=0),
        lora=LORA,
        training=training,
    )


def adapter(folder, runs, context=1, sharded=False):
    preset = doll(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(preset), "run_folder", folder / runs)
        return train_adapter(preset, context_parallel=context, sharded_base=sharded)


def make_doll(folder):
    new_llama(seed=0, vocab_size=2048).to(torch.bfloat16).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data" / "tiny-llama" / name, folder / "base")
    (folder / "texts").mkdir()
    for number in range(3):
        text = " ".join(f"Sentence {n * n + number} of it." for n in range(200))
        (folder / "texts" / f"{number}.txt").write_text(text)


def peaks():
    """Measured and predicted peak of a step of two processes that share 2,048 tokens, above what is there before."""
    config, plain = model_shape("tiny"), MemorySavings(0, 0, False, "adamw_torch_fused")
    model = random_llama(config, LORA, "float32", packed=True)
    share = divide(SETTINGS, 2, 2).share(join_processes().process_index)
    share_context(model, share)
    apply_memory_savings(model.train(), plain)
    for length in (1024, 2048):
        before = own_memory(RESIDENT)
        forget_highest()
        ids, places = (share.of(row[None], 1) for row in (torch.arange(length) % 1000, torch.arange(length)))
        loss = next_token_nll(hidden_states(model, ids, places), causal_lm(model).get_output_embeddings(), ids)
        loss.backward()
        model.zero_grad()
    found = ledger(config, LORA, StepShape(1024, "float32", plain, context=2))
    there = sum(found[name] for name in ("weights", "adapters", "optimizer"))
    return own_memory(HIGHEST) - before, (sum(found[name] for name in COMPONENTS) - there) / GIB


def one_of_several(folder):
    """What each process does. The first one keeps what it found."""
    state, found = join_processes(), {}
    if state.num_processes == 2:
        torch.save(peaks(), folder / f"peaks-{state.process_index}.pt")  # first: later, freed memory is used again
        for context in (1, 2):
            for name, rows in (("whole", WHOLE), ("packed", PACKED)):
                found[name, context] = trained(folder / f"{name}-{context}", rows, context)
        found["resumed", "context"] = trained(folder / "resumed", PACKED, context=2)
        for context in (1, 2):
            found["adapter", context, False] = str(adapter(folder, f"runs-{context}", context).folder)
            found["adapter", context, True] = str(adapter(folder, f"runs-sharded-{context}", context, True).folder)
            found["sharded", context] = trained(folder / f"sharded-{context}", PACKED, context, sharded=True)
        found["resumed", "sharded"] = trained(folder / "resumed-sharded", PACKED, sharded=True)
    else:
        found["packed", 2] = trained(folder / "packed-2-2", PACKED, context=2)
    if state.is_main_process:
        torch.save(found, folder / f"{state.num_processes}.pt")
    state.destroy_process_group()


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def launched(folder, count, *launcher, port=0):
    """What `one_of_several` found: of processes that a launcher starts, or of forks, which import but once."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once
    command = [sys.executable, *launcher, __file__, str(folder), str(count), str(port)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / f"{count}.pt")


def fork(rank, folder, count, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    one_of_several(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process gives, by transformers' mask for packed documents."""
    found = {"packed": trained(folder / "packed", PACKED), "whole": trained(folder / "whole", WHOLE)}
    for name in ("resumed", "resumed-sharded"):
        shutil.copytree(folder / "packed" / "checkpoint-2", folder / name / "checkpoint-2")
    make_doll(folder)
    return found


@pytest.fixture(scope="module")
def two(folder, alone):
    return launched(folder, 2, *TORCHRUN)


def assert_same(found, expected):
    for row, other in zip(found["log"], expected["log"], strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    for kind, tolerance in (("gradients", 1e-5), ("weights", 1e-4)):
        for name, value in expected[kind].items():
            assert (found[kind][name] - value).norm() <= tolerance * value.norm(), (kind, name)


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_two_processes_have_the_loss_every_gradient_and_the_weights_of_one(alone, two, rows, context):
    assert len(alone[rows]["gradients"]) == 28 + 5
    assert_same(two[rows, context], alone[rows])


@pytest.mark.parametrize("context", [1, 2])
def test_they_have_them_too_with_half_of_each_frozen_weight_of_the_layers(alone, two, context):
    assert_same(two["sharded", context], alone["packed"])
    whole, shares = alone["packed"]["layers"], two["sharded", context]["layers"]
    assert len(whole) == 2 * 7
    assert shares == {name: count / 2 for name, count in whole.items()}


def test_four_processes_in_two_groups_have_them_too(folder, alone, free_port):
    assert_same(launched(folder, 4, port=free_port)["packed", 2], alone["packed"])


def test_a_checkpoint_goes_on_with_another_number_of_processes(folder, alone, two):
    for more in ("context", "sharded"):
        assert_same({**two["resumed", more], "gradients": {}}, {**alone["packed"], "gradients": {}})
    for before in ("packed-2", "sharded-1"):
        shutil.rmtree(folder / before / "checkpoint-4")
        fewer = trained(folder / before, PACKED)
        assert_same({**fewer, "gradients": {}}, {**alone["packed"], "gradients": {}})


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("context", [1, 2])
def test_the_adapter_of_two_processes_is_the_one_of_one(folder, two, context, sharded):
    assert_same_adapter(Path(two["adapter", context, sharded]), adapter(folder, "runs-alone").folder)


def assert_same_adapter(folder, expected):
    assert folder.parent.name == expected.parent.name
    found, weights = (load_file(one / "adapter_model.safetensors") for one in (folder, expected))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-3 * weight.norm(), name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are counted by Linux")
def test_the_ledger_knows_the_peak_of_each_process_that_shares_a_sequence(folder, two):
    for process in range(2):
        measured, predicted = torch.load(folder / f"peaks-{process}.pt")
        assert measured == pytest.approx(predicted, rel=0.05)


NOTEBOOK = """
import sys
import datasets
import transformers.models.llama.modeling_llama  # once for both
from accelerate import notebook_launcher

def work(folder):
    from pathlib import Path
    from test_processes import adapter  # only here: the launcher refuses to start where bitsandbytes was imported

    adapter(Path(folder), "runs-notebook")

notebook_launcher(work, (sys.argv[1],), num_processes=2, use_port=sys.argv[2])
"""


def test_a_notebook_starts_two_processes(folder, alone, free_port):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command, tests = [sys.executable, "-c", NOTEBOOK, str(folder), str(free_port)], REPOSITORY / "tests"
    done = subprocess.run(command, env=environment, cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob("runs-notebook/training/*/adapter")
    assert_same_adapter(found, adapter(folder, "runs-alone").folder)


def test_of_two_visible_gpus_without_a_launcher_one_trains(folder, alone, monkeypatch, capsys):
    none_visible = vars(TrainingArguments)["_setup_devices"]

    def two_visible(arguments):
        device = none_visible.__get__(arguments)
        arguments._n_gpu = 2  # what transformers would find
        return device

    devices = cached_property(two_visible)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    assert_same(trained(folder / "two visible", WHOLE), alone["whole"])  # with both a batch would be twice as large
    assert "one of 2 GPUs trains; for all: torchrun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("processes", "context", "said"),
    [
        (3, 2, "3 processes do not divide into groups of 2"),
        (3, 1, "sequences_per_step = 4 does not divide among 3"),
        (64, 64, "64 tokens does not divide into 128 equal chunks"),
        (2, 0, "2 processes do not divide into groups of 0"),
    ],
)
def test_what_does_not_divide_is_refused(processes, context, said):
    with pytest.raises(ValueError, match=said):
        divide(SETTINGS, processes, context)


def test_a_process_takes_fewer_sequences_at_once_if_its_share_is_smaller():
    four = dataclasses.replace(SETTINGS, sequences_at_once=4)
    assert [divide(four, count).at_once for count in (1, 2, 4)] == [4, 2, 1]


if __name__ == "__main__":
    gc.freeze()  # each training looks through everything that was imported: half a second
    if "RANK" in os.environ:
        one_of_several(Path(sys.argv[1]))
    else:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        given = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
        multiprocessing.start_processes(fork, given, nprocs=given[1], start_method="fork")
