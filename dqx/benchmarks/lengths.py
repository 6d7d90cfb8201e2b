"""How long prompts and answers of the real tasks are, so that evaluation can be timed without their data.

The documents are a seeded sample of each task's split; of MMLU, some of each subject. Prompts are those that lm-eval
builds with the study's number of examples. An answer that is generated is taken to be as long as the reference (of
HumanEval, the canonical solution) with the stop string behind it. Tokens are counted by the rule of
`dqx/study/estimate/sizes.py` (`tests/bundled/lengths.py` wrote the file). On the multiple-choice tasks it is within 5 %
of a common BPE of 100,000 tokens; it finds about a tenth more in HumanEval, and, as that BPE packs three digits to a
token, 15 % more in GSM8K's prompts and 25 % more in its answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
TASKS = ("gsm8k", "humaneval", "mmlu", "arc_easy", "arc_challenge", "hellaswag")
SAMPLE = 1024  # documents of a task, at most


@dataclass(frozen=True)
class Lengths:
    """Tokens of one document's prompt, and of each of its choices; or of its answer up to the end of the stop."""

    prompt: int
    targets: tuple[int, ...]


def read(task: str) -> list[Lengths]:
    """The documents of a task in the order of their targets' tokens."""
    rows: dict[str, list[tuple[int, list[int]]]] = json.loads(FILE.read_text())
    documents = [Lengths(prompt, tuple(targets)) for prompt, targets in rows[task]]
    return sorted(documents, key=lambda d: (sum(d.targets), d.prompt))


def spread(documents: list[Lengths], count: int) -> list[Lengths]:
    """`count` documents evenly spaced in their order: the middle ones of as many equal parts."""
    return [documents[(2 * i + 1) * len(documents) // (2 * count)] for i in range(count)]
