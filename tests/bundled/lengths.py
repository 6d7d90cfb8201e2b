"""Count the lengths of benchmark documents anew, for the benchmark of evaluation (`dqx/benchmarks/lengths.py`).

PYTHONPATH=tests python -m bundled.lengths --data-root PATH      writes lengths.json, from copies of the datasets
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from bundled.sizes import by_rule
from dqx.benchmarks.lengths import FILE, SAMPLE, TASKS, Lengths
from dqx.config import compose
from dqx.evaluate.catalogue import leaves
from dqx.evaluate.local_task import build
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.tasks import in_turn


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
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
