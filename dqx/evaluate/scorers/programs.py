"""Scores of answers that lm-eval cannot score here: programs run in our sandbox, mathematics compared by math_verify.

The functions are named in `lm_eval_tasks/*.yaml`; lm-eval calls them with a document and the model's answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dqx.common.heartbeat import beat
from dqx.evaluate.scorers.math_check import equal_answers
from dqx.evaluate.scorers.sandbox import TIMEOUT, run_program

if TYPE_CHECKING:
    from datasets import Dataset

MBPP_EXAMPLES = (2, 3, 4)  # task ids, as in Austin et al. 2021
MBPP_TIMEOUT = 10.0  # seconds of CPU time: the solution of task 123 takes 2.5, and scores are not to depend on the CPU

Document = Mapping[str, Any]


def _passes(*parts: str, timeout: float = TIMEOUT) -> dict[str, float]:
    beat()
    return {"pass@1": float(run_program("\n".join(parts), timeout=timeout).passed)}


def before_fence(text: str) -> str:
    """The code of an answer that ends its code block and goes on in prose."""
    return text.split("```", 1)[0]


def humaneval(doc: Document, answers: Sequence[str]) -> dict[str, float]:
    """Run the prompt with its completion, then the document's `check` on the function."""
    return _passes(doc["prompt"] + before_fence(answers[0]), doc["test"], f"check({doc['entry_point']})")


def mbpp(doc: Document, answers: Sequence[str]) -> dict[str, float]:
    """Run the program, the document's set-up (one test document has one; lm-eval leaves it out), then its asserts."""
    return _passes(before_fence(answers[0]), doc["test_setup_code"], *doc["test_list"], timeout=MBPP_TIMEOUT)


def mbpp_examples(documents: Dataset) -> Dataset:
    """The three documents of the prompt."""
    return documents.filter(lambda doc: doc["task_id"] in MBPP_EXAMPLES)


def completion(doc: Document, answers: Sequence[str]) -> dict[str, float]:
    """Run the prompt with its completion, then the document's asserts."""
    return _passes(doc["prompt"] + before_fence(answers[0]), doc["test"])


def math(doc: Document, answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer found in the text equals the one in the document's solution."""
    return {"math_verify": float(equal_answers(doc["solution"], answers[0]))}
