"""lm-eval's task objects with the study's settings, on hub data or on a local copy."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api import task as lm_eval_task
from lm_eval.api.task import ConfigurableTask

from dqx.data.local import load_local
from dqx.evaluate.catalogue import Leaf, configuration
from dqx.evaluate.spec import TaskSpec

#: lm-eval's seed for drawing few-shot examples: the examples do not change with the run's seed.
FEWSHOT_SEED = 1234


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
