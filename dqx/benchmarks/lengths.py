"""How long prompts and answers of the real tasks are, so that evaluation can be timed without their data.

    python -m dqx.benchmarks.lengths --data-root PATH      writes lengths.json anew, from copies of the datasets

The documents are a seeded sample of each task's split; of MMLU, some of each subject. Prompts are those that lm-eval
builds with the study's number of examples. An answer that is generated is taken to be as long as the reference (of
HumanEval, the canonical solution) with the stop string behind it. Tokens are counted by the rule of
`count_sizes.py`. On the multiple-choice tasks it is within 5 % of a common BPE of 100,000 tokens; it finds
about a tenth more in HumanEval, and, as that BPE packs three digits to a token, 15 % more in GSM8K's prompts and 25 %
more in its answers.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from dqx.benchmarks.common import options
from dqx.benchmarks.count_sizes import by_rule
from dqx.config import compose
from dqx.evaluate.catalogue import leaves
from dqx.evaluate.local_task import build
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.tasks import in_turn

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


def measure(spec: TaskSpec, data_root: str) -> list[Lengths]:
    """A seeded sample of the documents of a task."""
    members = [build(leaf, spec, data_root=data_root, steps=None) for leaf in leaves(spec.harness)]
    sizes = [len(task.eval_docs) for task in members]
    sampled: list[Lengths] = []
    for task, size, count in zip(members, sizes, in_turn(sizes, SAMPLE), strict=True):
        task.build_all_requests(samples=random.Random(task.task_name).sample(range(size), count))
        documents: dict[int, Lengths] = {}
        for request in task.instances:
            context, continuation = request.args[:2]
            if spec.kind == "generation":
                continuation = f"{task.doc_to_target(request.doc)}\n\n{continuation['until'][0].strip()}"
            before = documents[request.doc_id].targets if request.doc_id in documents else ()
            documents[request.doc_id] = Lengths(by_rule(context), (*before, by_rule(continuation)))
        sampled += documents.values()
    return sampled


def main(argv: list[str] | None = None) -> None:
    parser = options("lengths", __doc__, figures=False)
    parser.add_argument("--data-root", required=True, help="folder with copies of the datasets in the hub's layout")
    parser.add_argument("--out", type=Path, default=FILE, help="the file to write (lengths.json beside this module)")
    args = parser.parse_args(argv)
    lines = []
    for name, spec in compose.suite(TASKS).items():
        rows = [[document.prompt, list(document.targets)] for document in measure(spec, args.data_root)]
        lines.append(f'"{name}": {json.dumps(rows, separators=(",", ":"))}')
    args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
