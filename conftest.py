"""What nbval leaves out when it compares outputs, whose kernels it uses, and which files come first."""

import gc

import pytest
from nbval import kernel

from tools.kernels import forked, start_server, stop_server

SERVER = pytest.StashKey()
gc.disable()  # while tests are imported, nothing of which is garbage: to look for some takes a seventh of the time


def pytest_configure(config: pytest.Config) -> None:
    """Before xdist starts its workers, which find the server in their environment."""
    if config.option.nbval and not hasattr(config, "workerinput"):
        config.stash[SERVER] = start_server()
    kernel.start_new_kernel = forked()(kernel.start_new_kernel)


def pytest_unconfigure(config: pytest.Config) -> None:
    """When the workers have ended."""
    if SERVER in config.stash:
        stop_server(config.stash[SERVER])


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Tables are compared through the checks beside them, not as HTML; library chatter is not compared."""
    if getattr(collector, "skip_compare", None) is not None:
        collector.skip_compare += ("text/html", "image/svg+xml", "stderr")


# Those that take most time, in this order: begun last, one of them would keep one process at work and the other idle.
LONGEST = ["05_finetune_qlora", "06_perplexity_by_position", "10_preference_tuning", "07_long_range_retrieval"]
LONGEST += ["09_instruction_tuning", "test_ledger", "12_pretraining_curriculum", "test_processes", "test_pretraining"]
LONGEST += ["test_run", "11_ablations", "test_race", "test_dose", "test_gpu_budget", "test_preferences", "test_corpus"]
LONGEST += ["test_planner", "08_benchmark_deltas", "test_benchmarks", "test_mixture", "test_notebooks"]
LONGEST += ["test_pretraining_gpu", "test_plan", "03_long_documents", "test_new_preset", "00_overview"]


def pytest_collection_finish() -> None:
    """What was imported is never garbage: to look through it takes half a second, and each training asks for it."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Nor is what a file's tests leave behind, once it was looked through: mostly what they imported."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within a file the order stays."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
