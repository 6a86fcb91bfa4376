"""Evaluates the tasks in tasks/ with EleutherAI's lm-evaluation-harness, as `lm_eval --model local-completions` does,
and prints scores and samples as JSON. A program of its own, because the harness and `datasets` read their environment
when they are imported.

    PYTHONPATH=.venv/clients python -m tests.clients.harness COMPLETIONS_URL MODEL TOKENIZER_FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"


class Evaluation(NamedTuple):
    """One run of the harness."""

    arguments: dict[str, Any]
    """How it sends its requests: each way has its own code in the harness and its own form of `prompt`."""
    tasks: list[str]


EVALUATIONS = {
    "token arrays, four requests at a time": Evaluation(
        {"num_concurrent": 4}, ["multiple_choice", "last_word", "full_context", "whole_text", "continuation"]
    ),
    "arrays of token arrays": Evaluation({"batch_size": 8}, ["last_word"]),
    "arrays of strings": Evaluation({"batch_size": 8, "tokenized_requests": False}, ["last_word", "continuation"]),
}


def evaluate(url: str, model: str, tokenizer: str) -> dict[str, Any]:
    os.chdir(TASKS)  # the tasks name their data by relative paths
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    outcome = {}
    for name, evaluation in EVALUATIONS.items():
        result = simple_evaluate(
            model="local-completions",
            model_args={"model": model, "base_url": url, "tokenizer": tokenizer, **evaluation.arguments},
            tasks=[f"millstream_{task}" for task in evaluation.tasks],
            task_manager=manager,
            bootstrap_iters=0,
        )
        outcome[name] = {"results": result["results"], "samples": result["samples"]}
    return outcome


if __name__ == "__main__":
    json.dump(evaluate(*sys.argv[1:]), sys.stdout)
