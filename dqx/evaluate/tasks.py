"""Run a suite of tasks through lm-eval: prompts, filters and metrics are lm-eval's, the model is ours.

Texts, which lm-eval has no counterpart for, are measured by `dqx/evaluate/text.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from dqx.common.problems import raise_if
from dqx.common.processes import processes
from dqx.diffusion.samplers import Sampler
from dqx.evaluate.catalogue import leaves
from dqx.evaluate.harness import Answered, DiffusionHarness, HarnessTask
from dqx.evaluate.journal import Journal
from dqx.evaluate.problems import task_problems
from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.evaluate.scorers.sandbox import isolation
from dqx.evaluate.settings import EvaluationSettings
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.text import evaluate_text
from dqx.models.transformer import MaskedDiffusionTransformer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from dqx.evaluate.local_task import LocalTask

EMPTY = 1e-300  # length of a choice without text: it is never chosen, as in lm-eval
#: What a choice's likelihood is divided by, for the metrics that do so.
LENGTHS: dict[str, Callable[[str], float]] = {
    "acc_norm": lambda choice: len(choice) or EMPTY,
    "acc_bytes": lambda choice: len(choice.encode()) or EMPTY,
}

__all__ = ["evaluate", "task_problems"]


def evaluate(
    model: MaskedDiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    suite: Mapping[str, TaskSpec],
    *,
    sampler: Sampler,
    settings: EvaluationSettings | None = None,
    journal: Journal | None = None,
) -> dict[str, TaskResult]:
    """One result per task of `suite`, by its name there, with one row per document.

    With a `journal` (of a suite of one task), documents that are found there are not computed again, and finished ones
    are kept in it. A document's result depends on neither the other documents nor the other tasks, but for the rounding
    of likelihoods.

    Several processes (`dqx.common.processes`) share the documents, the main one scores, and all get the same results.
    Raises ConfigProblems with `task_problems` of the suite.
    """
    settings = settings or EvaluationSettings()
    raise_if(
        task_problems(
            suite,
            data_root=settings.data_root,
            steps=settings.steps,
            sampler=sampler,
            limit=settings.limit,
            chat=settings.chat,
            likelihood=settings.likelihood,
        )
    )
    results = {}
    for name, spec in suite.items():
        result: TaskResult | None
        if spec.kind == "text":
            result = evaluate_text(model, tokenizer, name, spec, settings, journal, sampler)
        else:
            started = time.perf_counter()
            chosen = _documents(spec, settings)
            task = HarnessTask(
                label=name,
                mc_samples=spec.mc_samples or 1,
                batch_size=spec.batch_size,
                greedy=any(task.OUTPUT_TYPE == "loglikelihood" for task in chosen),
                scale=choice_scale(chosen, spec.metric),
            )
            harness = DiffusionHarness(model, tokenizer, sampler, settings, task, journal)
            result = _scored(name, spec, harness, chosen, started)
        results[name] = processes().broadcast(result)
    return results


def _scored(
    name: str, spec: TaskSpec, harness: DiffusionHarness, chosen: Mapping[LocalTask, int], started: float
) -> TaskResult | None:
    """The result of a task of lm-eval's; None in all processes but the main one."""
    try:
        samples = _run(harness, chosen)
    except Answered:
        return None
    rows = [
        _row(task, sample, spec, harness)
        for task in chosen
        for sample in samples[task.task_name]
        if sample["filter"] == spec.filter
    ]
    return TaskResult(
        name=name,
        category=spec.category,
        metric=spec.metric if spec.filter == "none" else f"{spec.metric},{spec.filter}",
        value=sum(row.score for row in rows) / len(rows),
        n=len(rows),
        documents=rows,
        seconds=time.perf_counter() - started + harness.earlier,
        n_forwards=harness.n_forwards,
        n_tokens=harness.n_tokens,
        tokens=harness.generated,
        n_saved=harness.n_saved,
        notes=_notes(chosen, rows, spec, harness.sampler) + harness.notes,
    )


def _documents(spec: TaskSpec, settings: EvaluationSettings) -> dict[LocalTask, int]:
    """The lm-eval tasks of an entry, each with the number of its first documents to run."""
    from dqx.evaluate.local_task import build  # with lm-eval

    members = leaves(spec.harness, chat=settings.chat)
    # with fewer documents than members, the last members are never reached and need not be loaded
    tasks = [
        build(leaf, spec, data_root=settings.data_root, steps=settings.steps) for leaf in members[: settings.limit]
    ]
    sizes = [len(task.eval_docs) for task in tasks]
    counts = sizes if settings.limit is None else in_turn(sizes, settings.limit)
    return {task: count for task, count in zip(tasks, counts, strict=True) if count}


def choice_scale(tasks: Iterable[LocalTask], metric: str) -> Callable[[Instance], float]:
    """What the metric divides the likelihood of a request's choice by before choices are compared."""
    by_name = {task.task_name: task for task in tasks}

    def scale(request: Instance) -> float:
        choice = by_name[request.task_name].doc_to_choice(request.doc)[request.idx]
        return LENGTHS[metric](choice) if metric in LENGTHS else 1.0

    return scale


def chosen(metric: str, likelihoods: Sequence[float], choices: Sequence[str], unconditional: Sequence[float]) -> int:
    """Which choice the metric judges, as lm-eval chooses: the first of those that score highest.

    By likelihood; for some metrics by likelihood per character or byte, or (acc_mutual_info) by how much more likely
    the choice is than without its question, of which `unconditional` has the likelihoods.
    """
    scores = list(likelihoods)
    if metric in LENGTHS:
        scores = [score / LENGTHS[metric](choice) for score, choice in zip(scores, choices, strict=True)]
    elif metric == "acc_mutual_info" and unconditional:
        scores = [score - without for score, without in zip(scores, unconditional, strict=True)]
    return scores.index(max(scores))


def in_turn(sizes: Sequence[int], limit: int) -> list[int]:
    """How many documents each member gives when `limit` are taken one by one in turn, as far as `sizes` allow."""
    counts = [0] * len(sizes)
    while (left := limit - sum(counts)) > 0:
        open_members = [i for i, size in enumerate(sizes) if counts[i] < size][:left]
        if not open_members:
            break
        for i in open_members:
            counts[i] += 1
    return counts


def _run(harness: DiffusionHarness, chosen: Mapping[LocalTask, int]) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's per-document records by task."""
    from lm_eval import evaluator  # with datasets and pandas, a second: not where all results are known

    from dqx.evaluate.local_task import quiet

    with quiet():
        results = evaluator.evaluate(
            lm=harness,
            task_dict={"tasks": {task.task_name: task for task in chosen}},
            samples={task.task_name: range(count) for task, count in chosen.items()},
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=harness.settings.chat,
            fewshot_as_multiturn=harness.settings.chat,
            confirm_run_unsafe_code=True,  # `task_problems` lets only tasks through that use our sandbox
        )
    return results["samples"]


def _row(task: LocalTask, sample: Mapping[str, Any], spec: TaskSpec, harness: DiffusionHarness) -> DocumentRow:
    doc, responses = sample["doc"], sample["resps"]
    likelihoods, answer, target = None, None, str(sample["target"])
    forwards, tokens = harness.took.get((task.task_name, sample["doc_id"]), (None, None))
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [float(response[0][0]) for response in responses]
        choices = task.doc_to_choice(doc)
        likelihoods, unconditional = likelihoods[: len(choices)], likelihoods[len(choices) :]
        gold = task.doc_to_text(doc) if task.multiple_input else sample["target"]
        target = choices[gold] if isinstance(gold, int) else str(gold)
        prediction = choices[chosen(spec.metric, likelihoods, choices, unconditional)]
    elif task.OUTPUT_TYPE == "loglikelihood":
        likelihoods, prediction = [float(responses[0][0][0])], None
    else:
        prediction = responses[0][0]
        answer = str(sample["filtered_resps"][0])
    return DocumentRow(
        doc_id=f"{task.task_name}/{sample['doc_id']}",
        score=float(sample[spec.metric]),
        prediction=prediction,
        target=target,
        log_likelihoods=likelihoods,
        answer=answer,
        truncated=harness.truncated.get((task.task_name, sample["doc_id"]), 0),
        forwards=forwards,
        tokens=tokens,
    )


def _notes(chosen: Mapping[LocalTask, int], rows: Sequence[DocumentRow], spec: TaskSpec, sampler: Sampler) -> list[str]:
    notes = [note for task in chosen for note in task.notes]
    cut = [row.truncated for row in rows if row.truncated]
    if cut:
        notes.append(f"{len(cut)} of {len(rows)} prompts did not fit: up to {max(cut)} tokens cut from the left")
    if spec.kind == "generation":
        notes += sampler.notes(spec.gen_length, spec.block_length)
    if spec.category == "code":
        notes.append(f"programs ran in a sandbox of {', '.join(isolation())}")
    return notes
