"""From a task's name to lm-eval task objects with the study's settings, on hub data or on a local copy.

lm-eval's own YAML is used wherever it works; `lm_eval_tasks/` holds the rest. Only the folders that a task needs
are read, because lm-eval's full index takes eight seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api import task as lm_eval_task
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from dqx.data.local import load_local
from dqx.evaluate.spec import TaskSpec

OWN_FOLDER = Path(__file__).parent / "lm_eval_tasks"
LM_EVAL_FOLDER = Path(lm_eval.__file__).parent / "tasks"

#: Folders of lm-eval's that hold the study's tasks; any other task is searched for.
FOLDERS = {
    "winogrande": "winogrande",
    "piqa": "piqa",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "gsm8k": "gsm8k",
}

#: Harness tasks whose prompt is another one for chat models.
CHAT_VERSIONS = {"dqx_humaneval": "dqx_humaneval_chat", "dqx_mbpp": "dqx_mbpp_chat"}

#: Tasks of lm-eval's that cannot run here (beginning of their names), and ours in their place.
REPLACED = {"humaneval": "dqx_humaneval", "mbpp": "dqx_mbpp", "minerva_math": "dqx_math"}

#: lm-eval's seed for drawing few-shot examples: the examples do not change with the run's seed.
FEWSHOT_SEED = 1234

#: `dataset_path` values that name a file format and not a dataset.
FORMATS = ("json", "parquet", "csv", "text", "arrow")


class UnknownTaskError(ValueError):
    """A harness task that neither dqx nor lm-eval has."""


@dataclass(frozen=True)
class Leaf:
    """One lm-eval task: its name, the YAML it comes from, and its fields before functions are resolved."""

    name: str
    path: Path
    raw: Mapping[str, Any]

    @property
    def own(self) -> bool:
        return self.path.parent == OWN_FOLDER

    @property
    def dataset(self) -> str | None:
        """Hub id of the dataset; None for documents that come with dqx or from files."""
        path = self.raw.get("dataset_path")
        return None if self.raw.get("custom_dataset") or path in FORMATS else path


@functools.cache
def _index(*folders: Path) -> Mapping[str, Any]:
    with quiet():
        return TaskManager(include_defaults=False, include_path=[OWN_FOLDER, *folders]).task_index


def leaves(harness: str, *, chat: bool = False) -> list[Leaf]:
    """The lm-eval tasks that a name stands for: one, or all members of a group or tag.

    Raises UnknownTaskError.
    """
    if chat:
        harness = CHAT_VERSIONS.get(harness, harness)
    if harness in _index():
        return list(_members(harness, _index()))
    folders = _folders(harness)
    if folders and harness in _index(*folders):
        with contextlib.suppress(UnknownTaskError):
            return list(_members(harness, _index(*folders)))
        return list(_members(harness, _index(LM_EVAL_FOLDER)))  # a group with members from elsewhere
    close = difflib.get_close_matches(harness, familiar_names(), 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UnknownTaskError(f"{harness!r} is no task of lm-eval {lm_eval.__version__} nor of dqx{hint}")


def _folders(name: str) -> list[Path]:
    """lm-eval's folders with YAML files in which a line gives `name` to a task, group, tag or member."""
    if name in FOLDERS:
        return [LM_EVAL_FOLDER / FOLDERS[name]]
    quoted = re.escape(name.encode())
    line = re.compile(rb"(?m)^\s*(?:-|[\"']?(?:task|group|tag)[\"']?\s*:)\s*[\"']?" + quoted + rb"[\"']?\s*$")
    return sorted({path.parent for path in LM_EVAL_FOLDER.rglob("*.yaml") if line.search(path.read_bytes())})


def familiar_names() -> list[str]:
    """Names to suggest: the study's and dqx's own tasks, and the names of lm-eval's task folders."""
    folders = [path.name for path in LM_EVAL_FOLDER.iterdir() if path.is_dir() and not path.name.startswith("_")]
    return sorted({*FOLDERS, *_index(), *folders})


def _members(name: str, index: Mapping[str, Any]) -> Iterator[Leaf]:
    entry = index[name]
    if entry.yaml_path is None:  # a tag
        for member in sorted(entry.tags):
            yield from _members(member, index)
    elif "group" in entry.cfg:
        members = entry.cfg["task"]
        for member in [members] if isinstance(members, str) else members:
            if not isinstance(member, str) or member not in index:
                raise UnknownTaskError(
                    f"the lm-eval group {name!r} defines members in place, which dqx cannot redirect"
                )
            yield from _members(member, index)
    else:
        yield Leaf(name, entry.yaml_path, entry.cfg)


class LocalTask(ConfigurableTask):
    """lm-eval's task, except that a split the data does not have is no error unless documents come from it."""

    notes: tuple[str, ...] = ()

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if callable(self.config.custom_dataset):
            self.dataset = self.config.custom_dataset(**(self.config.metadata or {}), **(dataset_kwargs or {}))
        elif Path(str(self.DATASET_PATH)).is_absolute():
            self.dataset = load_local(str(self.DATASET_PATH), self.DATASET_NAME, **(dataset_kwargs or {}))
        else:
            super().download(dataset_kwargs, **kwargs)
        for field in ("training_split", "validation_split", "test_split"):
            split = getattr(self.config, field)
            if split is not None and split not in self.dataset:
                setattr(self.config, field, None)
                if field == "training_split" and self.config.num_fewshot and not self.fewshot_cfg.split:
                    self.notes += (
                        f"{self.config.task}: the data has no split {split!r}; examples come from another one",
                    )

    @property
    def eval_docs(self) -> Any:
        return super().eval_docs if self.__dict__.get("task_docs") is None else self.task_docs

    def build_all_requests(self, **kwargs: Any) -> None:
        with quiet():
            super().build_all_requests(**kwargs)


def configuration(leaf: Leaf) -> dict[str, Any]:
    """The task's fields with its functions. Raises whatever the import of the modules that hold them raises."""
    config = deepcopy(load_yaml(leaf.path))
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}


def build(leaf: Leaf, spec: TaskSpec, *, data_root: str | None, steps: int | None) -> LocalTask:
    """The lm-eval task with the settings of `spec`; reads its documents from `data_root`, or from the hub."""
    config = configuration(leaf)
    config["num_fewshot"] = spec.fewshot
    config["repeats"] = 1
    if data_root is not None and leaf.dataset is not None:
        config["dataset_path"] = str(Path(data_root).expanduser().resolve() / leaf.dataset)
    if spec.kind == "generation":
        config["generation_kwargs"] = {
            "until": (config.get("generation_kwargs") or {}).get("until", []),
            "max_gen_toks": spec.gen_length,
            "block_length": spec.block_length,
            "steps": spec.steps if steps is None else steps,
        }
    with quiet():
        task = LocalTask(config=config)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' progress bars and hints: 57 tasks would print hundreds of lines."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    logger, tqdm = logging.getLogger("lm_eval"), lm_eval_task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    lm_eval_task.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = tqdm
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
