"""What one entry of a task suite says: which lm-eval task or text, and the study's settings for it.

Nothing heavy is imported here: configs are checked and listed without torch or lm-eval. The class is not frozen because
OmegaConf makes a frozen schema read-only, and then no override could reach it.
"""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES = ("general", "math", "code", "text")
KINDS = ("likelihood", "generation", "text")
NLL = "nll"  # the metric that is better when lower: nats per token of a text
#: What answers take; a metric of deltas beside those of the tasks.
FORWARDS = "forwards per token"
LOWER_IS_BETTER = (NLL, FORWARDS)


@dataclass
class TaskSpec:
    """One task with its settings. Steps, lengths and draws are what the study used unless a config says otherwise."""

    harness: str  # lm-eval task or group, or one of dqx/evaluate/lm_eval_tasks; `text` for a text
    category: str  # general, math, code or text
    kind: str  # likelihood (multiple choice), generation, or text (nats per token)
    metric: str  # lm-eval's name of the metric that is reported; nll for a text
    filter: str = "none"  # lm-eval's name of the answer filter; "none" where a task has no filters
    fewshot: int = 0  # examples in the prompt
    mc_samples: int | None = None  # likelihood, text: Monte-Carlo draws per answer choice or window
    gen_length: int | None = None  # generation: tokens
    block_length: int | None = None  # generation: tokens per semi-autoregressive block
    steps: int | None = None  # generation: denoising steps over the whole answer
    text: str | None = None  # text: a name (wikitext2, nano), a local .txt/.jsonl/.parquet file, or a dataset id
    config: str | None = None  # of a dataset id: its configuration, split and text field
    split: str | None = None
    field: str = "text"
    length: int | None = None  # text: tokens per window
    windows: int | None = None  # text: at most so many windows, from its start; None: all
    batch_size: int | None = None  # generation: answers written at a time; None: as many as fit. Changes speed only


def steps_of(spec: TaskSpec, steps: int | None) -> int | None:
    """The number of denoising steps a generation task runs: the run's own setting, else the task's; else None."""
    if spec.kind != "generation":
        return None
    return spec.steps if steps is None else steps
