"""Count the sizes of benchmarks anew, which estimates of a run's work read.

    PYTHONPATH=tests python -m bundled.sizes DATA_ROOT [TASK ...]     the lines of the table in
                                                                      dqx/study/estimate/sizes.py, in some minutes

Prompts and answers are those that lm-eval builds from copies of the datasets in DATA_ROOT (the hub's layout); for
tasks that come with dqx they are counted with the bundled tokenizer, for others by the `RULE`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

from lm_eval.api.instance import Instance

from dqx.config.compose import suite
from dqx.evaluate.catalogue import leaves
from dqx.evaluate.local_task import LocalTask, build
from dqx.evaluate.spec import TaskSpec
from dqx.models.checkpoint import inspect
from dqx.models.tokenizer import load_tokenizer
from dqx.study.estimate.sizes import BenchmarkSize

#: What counts as one token: up to nine letters, a digit, a mark, a line break with the indentation after it.
RULE = re.compile(r"[^\W\d_]{1,9}|\d|\n\s*|[^\w\s]|_")

APART = 16  # answers of up to so many tokens are kept apart
BOUNDS = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # longer ones are put together up to each of these
SAMPLE = 300  # of as many documents, with examples, the length of an example is taken
Count = Callable[[str], int]


def by_rule(text: str) -> int:
    """Tokens of a text by the rule."""
    return len(RULE.findall(text))


def bundled() -> Count:
    """Tokens of a text in the bundled tokenizer."""
    tokenizer = load_tokenizer(inspect("pkg://dqx/assets/nano_llada"))
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def measured(spec: TaskSpec, count: Count, data_root: str | None) -> BenchmarkSize:
    """The sizes of one task."""
    requests = list(_requests(replace(spec, fewshot=0), None, data_root))
    shots = spec.fewshot or 1

    def prompt_length(fewshot: int) -> float:
        sample = _requests(replace(spec, fewshot=fewshot), SAMPLE, data_root)
        return fmean(count(str(request.args[0])) for _, request in sample)

    try:
        example = (prompt_length(shots) - prompt_length(0)) / shots
    except ValueError:  # there are no examples
        example = 0.0
    answers: Counter[int] = Counter()
    prompts: Counter[int] = Counter()
    seen: set[tuple[str, int | None, str, int]] = set()
    for task, request in requests:
        length = _answer(task, request, spec, count)
        prompt = (task.task_name, request.doc_id, str(request.args[0]), length)
        answers[length] += 1
        prompts[length] += prompt not in seen
        seen.add(prompt)
    return BenchmarkSize(
        documents=len({(task.task_name, request.doc_id) for task, request in requests}),
        question=round(fmean(count(str(request.args[0])) for _, request in requests)),
        example=round(example),
        answers=binned(answers, prompts),
    )


def _requests(spec: TaskSpec, limit: int | None, data_root: str | None) -> Iterator[tuple[LocalTask, Instance]]:
    """The requests of about the first `limit` documents, in equal shares from the members of a group."""
    members = leaves(spec.harness)
    for leaf in members:
        task = build(leaf, spec, data_root=data_root, steps=None)
        n = len(task.eval_docs) if limit is None else min(len(task.eval_docs), limit // len(members) + 1)
        task.build_all_requests(samples=list(range(n)), rank=0, world_size=1)
        yield from ((task, request) for request in task.instances)


def _answer(task: LocalTask, request: Instance, spec: TaskSpec, count: Count) -> int:
    """Tokens of a choice, or of the answer written in the data and of the one that ends it."""
    if spec.kind == "likelihood":
        context, choice = request.args[:2]
        return count(context + choice) - count(context)
    gold = request.doc.get("solution") or task.doc_to_target(request.doc)
    return count(gold if isinstance(gold, str) else gold[0]) + 1


def binned(answers: Counter[int], prompts: Counter[int]) -> dict[int, tuple[int, int]]:
    """Numbers by length; of long ones between two bounds, by their rounded mean length."""
    by_length: dict[int, tuple[int, int]] = {}
    edges = [*range(APART + 1), *BOUNDS, max(answers)]
    for low, high in pairwise(edges):
        inside = [length for length in answers if low < length <= high]
        if inside:
            n = sum(answers[length] for length in inside)
            mean = round(sum(length * answers[length] for length in inside) / n)
            by_length[mean] = (n, sum(prompts[length] for length in inside))
    return by_length


def main() -> None:
    """Print one line of the table for each task."""
    data_root, *names = sys.argv[1:]
    for spec in suite(names or ["qdlm", "nano"]).values():
        own = spec.harness.startswith("nano_")
        print(f'    "{spec.harness}": {measured(spec, bundled() if own else by_rule, data_root)},', flush=True)


if __name__ == "__main__":
    main()
