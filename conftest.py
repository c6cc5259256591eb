"""What nbval leaves out when it compares stored outputs with new ones."""

import pytest


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Tables are compared through the checks beside them, not as HTML; library chatter is not compared."""
    if getattr(collector, "skip_compare", None) is not None:
        collector.skip_compare += ("text/html", "image/svg+xml", "stderr")
