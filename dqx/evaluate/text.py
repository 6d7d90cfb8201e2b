"""Negative log-likelihood per token of a text: the diffusion counterpart of the perplexity that papers report.

The text, without blank rows, is cut from its start into windows of as many tokens, without overlap or remainder. Each
follows the model's end token, as a prompt without context does; its likelihood is the Monte-Carlo bound of
`dqx/diffusion/likelihood.py` for all of its tokens. Masks are a function of (seed, text, window, draw): windows of full
precision and of every quantized model pair. A bound, and by another factorisation: the numbers compare with each other
and not with those of autoregressive models. Models that write block by block have a bound of each block
(`dqx/diffusion/factorization.py`), and the exact autoregressive likelihood with the autoregressive sampler. The
exponential of a difference is the ratio of two perplexities.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dqx.common.digest import digest
from dqx.data.texts import TextSource, find_text, token_stream
from dqx.diffusion.batches import Request
from dqx.diffusion.samplers import Sampler
from dqx.diffusion.scorer import Scorer
from dqx.evaluate.journal import Journal
from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.evaluate.session import Document, EvaluationSession, score
from dqx.evaluate.settings import EvaluationSettings
from dqx.evaluate.spec import NLL, TaskSpec
from dqx.models.transformer import MaskedDiffusionTransformer


def text_of(name: str, spec: TaskSpec, data_root: str | None = None) -> TextSource:
    """Where the text of a task lies."""
    assert spec.text is not None
    return find_text(
        spec.text,
        config=spec.config,
        split=spec.split,
        field=spec.field,
        data_root=data_root,
        where=f"task.suite.{name}",
    )


def text_windows(
    name: str, spec: TaskSpec, tokenizer: Any, *, limit: int | None = None, data_root: str | None = None
) -> Tensor:
    """The first `limit` (and at most `spec.windows`) windows of a task's text, [N, spec.length].

    Raises ValueError for a text of fewer tokens than a window, OSError where it cannot be had.
    """
    assert spec.length is not None
    text = text_of(name, spec, data_root)
    ids = token_stream(text, tokenizer)
    counts = [len(ids) // spec.length, *(n for n in (limit, spec.windows) if n is not None)]
    if not counts[0]:
        raise ValueError(
            f"task.suite.{name}.length={spec.length} is more than the {len(ids)} tokens of {text.path}; choose less"
        )
    return torch.tensor(ids[: min(counts) * spec.length]).view(-1, spec.length)


def evaluate_text(
    model: MaskedDiffusionTransformer,
    tokenizer: Any,
    name: str,
    spec: TaskSpec,
    settings: EvaluationSettings,
    journal: Journal | None = None,
    sampler: Sampler | None = None,
) -> TaskResult:
    """Nats per token, with a row for each window.

    Of the `sampler` nothing counts but how the likelihood is a sum over blocks; guidance plays no part.
    """
    started = time.perf_counter()
    windows = text_windows(name, spec, tokenizer, limit=settings.limit, data_root=settings.data_root)
    start = torch.tensor([model.arch.eos_token_id])
    label = Path(text_of(name, spec).path).name
    requests = [Request(start, window, (label, i)) for i, window in enumerate(windows)]
    assert spec.mc_samples is not None
    scorer = Scorer(
        model,
        samples=spec.mc_samples,
        seed=settings.seed,
        batch_tokens=settings.likelihood.batch_tokens,
        factorization=None if sampler is None else sampler.factorization(),
    )
    documents = [Document(f"{name}/{i}", [i], digest(window.tolist())) for i, window in enumerate(windows)]
    session = EvaluationSession(documents, [scorer.work(request) for request in requests], journal)
    score(scorer, requests, session, label=name, shown=settings.progress)
    values = [float(nats) for nats in session.gather()]
    rows = [
        DocumentRow(f"{name}/{i}", -value / windows.shape[1], log_likelihoods=[value]) for i, value in enumerate(values)
    ]
    return TaskResult(
        name=name,
        category=spec.category,
        metric=NLL,
        value=fmean(row.score for row in rows),
        n=len(rows),
        documents=rows,
        seconds=time.perf_counter() - started + session.past.spent["nanoseconds"] / 1e9,
        n_forwards=session.spent["n_forwards"],
        n_tokens=session.spent["n_tokens"],
        notes=session.notes,
    )
