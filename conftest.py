"""What nbval leaves out when it compares stored outputs with new ones, and which files come first."""

import pytest


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Tables are compared through the checks beside them, not as HTML; library chatter is not compared."""
    if getattr(collector, "skip_compare", None) is not None:
        collector.skip_compare += ("text/html", "image/svg+xml", "stderr")


# Files that take most time, in this order: begun last, one of them would keep one process at work and the other idle.
LONGEST = ["06_perplexity_by_position", "05_finetune_qlora", "test_processes", "07_long_range_retrieval", "test_ledger"]
LONGEST += ["test_plan", "test_gpu_budget", "test_dose", "04_one_gpu_budget", "test_race", "test_planner"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Within a file the order stays."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
