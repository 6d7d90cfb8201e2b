"""Everything wrong with a task suite that can be known before a weight is read, in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dqx.data.local import data_files
from dqx.data.texts import text_problems
from dqx.diffusion.samplers import Sampler
from dqx.evaluate.catalogue import REPLACED, Leaf, UnknownTaskError, configuration, leaves
from dqx.evaluate.scorers.sandbox import isolation
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import CATEGORIES, KINDS, NLL, TaskSpec, steps_of
from dqx.evaluate.text import text_of

#: Metrics of multiple choice whose answer is the choice with the largest likelihood, as it is or by length.
DECIDED_BY = ("acc", "acc_norm")
#: Numbers that a kind of task cannot do without.
NEEDED = {"likelihood": ("mc_samples",), "generation": ("gen_length",), "text": ("mc_samples", "length")}
OUTPUT_TYPES = {"likelihood": ("multiple_choice", "loglikelihood"), "generation": ("generate_until",)}


def task_problems(
    suite: Mapping[str, TaskSpec],
    *,
    data_root: str | None = None,
    steps: int | None = None,
    sampler: Sampler | None = None,
    limit: int | None = None,
    chat: bool = False,
    likelihood: LikelihoodSettings | None = None,
) -> list[str]:
    """All problems of the suite's settings and of the local data it needs; empty when it can run.

    With `data_root` None the data come from the hub; whether they can be had from there is `hub_problems`' matter.
    """
    problems = []
    if not suite:
        problems.append("task.suite is empty; choose tasks, for example task=nano")
    if limit is not None and limit < 1:
        problems.append(f"task.limit={limit} leaves no documents; give 1 or more, or null for all")
    if data_root is not None and not Path(data_root).expanduser().is_dir():
        problems.append(
            f"data_root={data_root} is no folder; give the folder that holds the dataset copies, or null for the hub"
        )
        data_root = None
    problems += [] if likelihood is None else list(likelihood.problems())
    for name, spec in suite.items():
        problems += _setting_problems(name, spec)
        if spec.kind == "generation" and sampler is not None:
            problems += _schedule_problems(name, spec, steps, sampler)
        if spec.kind != "generation" and sampler is not None:
            problems += sampler.likelihood_problems()
        if spec.kind == "text":
            problems += _text_problems(name, spec, data_root)
            continue
        try:
            members = leaves(spec.harness, chat=chat)
        except UnknownTaskError as error:
            problems.append(f"task.suite.{name}.harness: {error}")
            continue
        problems += _harness_problems(name, spec, members[0])
        if sampler is not None and sampler.stores_final and members[0].raw.get("output_type") == "loglikelihood":
            problems.append(
                f"task.suite.{name} asks whether greedy decoding writes the target, which is defined for models with "
                "full attention (LLaDA's, Dream's); leave it out"
            )
        if likelihood is not None and likelihood.adaptive:
            problems += _adaptive_problems(name, spec, members[0])
        if data_root is not None:
            problems += _data_problems(name, members[:limit], Path(data_root).expanduser())
    return list(dict.fromkeys(problems))


def hub_problems(suite: Mapping[str, TaskSpec], *, limit: int | None = None, chat: bool = False) -> list[str]:
    """Fetch what the suite's lm-eval tasks need from the hub, into its cache, and say what cannot be had.

    Without a network the first dataset that is not in the cache ends the search: each would cost half a minute.
    """
    missing: dict[str, str] = {}  # by dataset
    for name, spec in suite.items():
        if spec.kind == "text":  # `text_windows` fetches it
            continue
        for leaf in leaves(spec.harness, chat=chat)[:limit]:
            if leaf.dataset is None or leaf.dataset in missing:
                continue
            from dqx.evaluate.local_task import build  # with lm-eval and datasets, two seconds: not for bundled tasks

            try:
                build(leaf, spec, data_root=None, steps=None)
            except Exception as error:  # many kinds; the text is what helps
                reason = (str(error).strip() or "no message").splitlines()[0]
                missing[leaf.dataset] = (
                    f"task {name}: {leaf.dataset} cannot be had from the hub ({type(error).__name__}: {reason}); "
                    f"without a network, give data_root=FOLDER with a copy in FOLDER/{leaf.dataset} "
                    f"(made elsewhere: hf download {leaf.dataset} --repo-type dataset --local-dir ...)"
                )
                if isinstance(error, ConnectionError):
                    return list(missing.values())
    return list(missing.values())


def sandbox_problems(suite: Mapping[str, TaskSpec]) -> list[str]:
    """Why programs that the model writes could not be run on this machine, where the suite has some."""
    tasks = [name for name, spec in suite.items() if spec.category == "code"]
    if not tasks:
        return []
    try:
        isolation()
    except (OSError, RuntimeError) as error:
        return [f"task {', '.join(tasks)}: {error}; or leave {'it' if len(tasks) == 1 else 'them'} out"]
    return []


def _setting_problems(name: str, spec: TaskSpec) -> Iterator[str]:
    prefix = f"task.suite.{name}"
    if spec.category not in CATEGORIES:
        yield f"{prefix}.category={spec.category!r} is none of {', '.join(CATEGORIES)}"
    if spec.kind not in KINDS:
        yield f"{prefix}.kind={spec.kind!r} is none of {', '.join(KINDS)}"
    if spec.fewshot < 0:
        yield f"{prefix}.fewshot={spec.fewshot} is negative; 0 means no examples"
    if (spec.kind == "text") != (spec.metric == NLL):
        yield f"{prefix}.metric={spec.metric!r} does not fit kind={spec.kind}; texts, and only they, have metric={NLL}"
    needed = NEEDED.get(spec.kind, ())
    for field in (*needed, "batch_size", "windows"):
        value = getattr(spec, field)
        if value is None:
            if field in needed:
                yield f"{prefix}.{field} is not set; a {spec.kind} task needs it"
        elif value < 1:
            yield f"{prefix}.{field}={value} must be 1 or more"


def _text_problems(name: str, spec: TaskSpec, data_root: str | None) -> list[str]:
    if spec.text is None or not spec.text.strip():
        return [f"task.suite.{name}.text is not set; give a name, a file or a dataset id"]
    return text_problems(spec.text, text_of(name, spec, data_root), data_root)


def _schedule_problems(name: str, spec: TaskSpec, steps: int | None, sampler: Sampler) -> Iterator[str]:
    if not spec.gen_length or spec.gen_length < 1:
        return
    steps = steps_of(spec, steps)
    blocks = sampler.block_length(spec.block_length)
    for problem in sampler.problems(spec.gen_length, blocks, sampler.steps_for(spec.gen_length, steps)):
        yield problem if problem.startswith("sampler.") else f"task.suite.{name}: {problem}"


def _harness_problems(name: str, spec: TaskSpec, leaf: Leaf) -> Iterator[str]:
    prefix = f"task.suite.{name}"
    ours = next((own for theirs, own in REPLACED.items() if leaf.name.startswith(theirs)), None)
    remedy = f"; use {ours}" if ours else ""
    if leaf.raw.get("unsafe_code"):
        yield f"{prefix}.harness={spec.harness} would run programs that the model wrote without a sandbox{remedy}"
        return
    try:
        configuration(leaf)
    except Exception as error:  # a task's own modules may raise anything when imported
        reason = (str(error).strip() or "no message").splitlines()[0]
        yield f"{prefix}.harness={spec.harness} cannot be loaded ({type(error).__name__}: {reason}){remedy}"
        return
    output_type = leaf.raw.get("output_type", "generate_until")
    if spec.kind in OUTPUT_TYPES and output_type not in OUTPUT_TYPES[spec.kind]:
        fitting = next((kind for kind, types in OUTPUT_TYPES.items() if output_type in types), None)
        remedy = f"set kind={fitting}" if fitting else "perplexity tasks cannot be run with a masked diffusion model"
        yield f"{prefix}.kind={spec.kind} does not fit {leaf.name}, whose requests are {output_type}; {remedy}"
    metrics = {m["metric"]: m for m in leaf.raw.get("metric_list") or [{"metric": "acc"}]}
    metric = metrics.get(spec.metric)
    if metric is None:
        yield f"{prefix}.metric={spec.metric!r} is no metric of {leaf.name}, which has {', '.join(metrics)}"
    elif metric.get("aggregation", "mean") != "mean" or not metric.get("higher_is_better", True):
        yield f"{prefix}.metric={spec.metric!r} is no mean over documents that is better when higher; choose another"
    filters = [f["name"] for f in leaf.raw.get("filter_list") or [{"name": "none"}]]
    if spec.filter not in filters:
        yield f"{prefix}.filter={spec.filter!r} is no answer filter of {leaf.name}, which has {', '.join(filters)}"


def _adaptive_problems(name: str, spec: TaskSpec, leaf: Leaf) -> Iterator[str]:
    if spec.kind != "likelihood":
        return
    metrics = [m["metric"] for m in leaf.raw.get("metric_list") or ()]
    choices = leaf.raw.get("output_type") == "multiple_choice" and "acc_mutual_info" not in metrics
    if not choices or spec.metric not in DECIDED_BY:
        yield (
            f"likelihood.adaptive=true stops when a question's answer by {' or '.join(DECIDED_BY)} is decided; "
            f"task.suite.{name} is scored otherwise, so set likelihood.adaptive=false or leave it out"
        )


def _data_problems(name: str, members: list[Leaf], data_root: Path) -> Iterator[str]:
    for dataset in dict.fromkeys(leaf.dataset for leaf in members):
        if dataset is None:
            continue
        folder = data_root / dataset
        if not folder.is_dir():
            yield (
                f"task {name}: {folder} does not exist; copy the dataset there "
                f"(hf download {dataset} --repo-type dataset --local-dir {folder}), or leave the task out"
            )
            continue
        for leaf in members:
            if leaf.dataset == dataset and (problem := _dataset_problem(folder, leaf.raw)):
                yield f"task {name}: {problem}"
                break


def _dataset_problem(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """What is wrong with the local copy in `folder` for one task: configuration, split or damaged files."""
    import pyarrow.parquet

    wanted = raw.get("dataset_name")
    try:
        files = data_files(str(folder), wanted)
    except Exception as error:  # many kinds; the text is what helps
        return f"{folder} cannot be used for configuration {wanted!r}: {str(error).strip().splitlines()[0]}"
    split = raw.get("test_split") or raw.get("validation_split")
    if split not in files:
        there = ", ".join(map(str, files)) or "none"
        return f"{folder} has no split {split!r} for configuration {wanted!r}; it has {there}"
    for path in (path for paths in files.values() for path in paths):
        if path.suffix == ".parquet":
            try:
                pyarrow.parquet.read_metadata(path)
            except Exception as error:
                return f"{path} is no readable Parquet file ({str(error).splitlines()[0]}); copy it again"
    return None
