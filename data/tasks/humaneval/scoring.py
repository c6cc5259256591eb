"""HumanEval's score: the function that a model completed passes its tests, in a sandbox."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # the harness loads this file by its path

from questions import Doc, Written  # noqa: E402
from sandbox import require_sandbox, run_program  # noqa: E402


class Programs(Written):
    """A task whose answer is a program. It loads only where programs may run: RuntimeError as `require_sandbox`."""

    def __init__(self, config: Doc) -> None:
        require_sandbox(config["metadata"]["allow_execution"])
        super().__init__(config)

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, float]:
        """Whether the program that was written passes."""
        allow_execution = self.config.metadata["allow_execution"]
        return self.config.process_results(doc, results[0], allow_execution=allow_execution)


def score_program(doc: Doc, written: str, *, allow_execution: bool) -> dict[str, float]:
    """Whether the function completed passes its tests."""
    tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    options = {"given": doc["prompt"] + "    pass\n", "allow_execution": allow_execution}
    return {"passed": float(run_program(doc["prompt"] + written, tests, doc["entry_point"], **options).passed)}
