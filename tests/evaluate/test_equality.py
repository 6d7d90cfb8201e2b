"""From texts to answers, the fast path against the plain one: one request at a time, all logits, nothing saved.

`test_engine.py` and `test_scoring.py` compare the two on token ids; here lm-eval's requests go through the harness,
with stop strings. Tokens are compared in float64 where models are random: they have confidences so close together that
single precision, which rounds differently in another batch, swaps two of them now and then. Trained models are
compared in the single precision they are evaluated in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from conftest import TinyCheckpoint
from lm_eval.api.instance import Instance

from dqx.diffusion import SeededNoise, log_likelihood
from dqx.diffusion.engine import Answer, Engine, Prompt
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.evaluate.catalogue import leaves
from dqx.evaluate.ending import Ending
from dqx.evaluate.harness import DiffusionHarness, HarnessTask, document_key, encode, encode_pair, end_tokens
from dqx.evaluate.local_task import build
from dqx.evaluate.settings import EvaluationSettings, LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
BATCHES = (1, 2, 3, 7, 16)
N = 17  # documents, so that the largest batch is full
LENGTH, BLOCK = 8, 4


def plain_ids(model, tokenizer, sampler: Sampler, request: Instance, seed: int) -> list[int]:
    """The whole answer to one request, by the sampler's own loop."""
    context, settings = request.args
    out = sampler.generate(
        model,
        torch.tensor([encode(tokenizer, context) or [model.arch.eos_token_id]]),
        gen_length=settings["max_gen_toks"],
        block_length=sampler.block_length(settings["block_length"]),
        steps=settings["steps"],
        noise=SeededNoise(seed, [document_key(request)]),
    )
    return out.ids[0].tolist()


class Recorded(Engine):
    """An engine that keeps the answers it writes, by document."""

    answers: ClassVar[dict[object, Answer]] = {}

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for i, answer in super().stream(prompts):
            self.answers[prompts[i].document] = answer
            yield i, answer


def assert_equal_answers(
    monkeypatch, model, tokenizer, sampler: Sampler, requests: Sequence[Instance], plain, seed: int, sizes
) -> list[str]:
    """In batches of these sizes, each with another order of the documents. Returns the texts."""
    monkeypatch.setattr("dqx.evaluate.harness.engine_for", lambda sampler: Recorded)
    until = requests[0].args[1]["until"]
    ending = Ending(tokenizer, end_tokens(model, tokenizer), until)
    expected = [ending.text(ids) for ids in plain]
    for size in sizes:
        order = random.Random(size).sample(range(len(requests)), len(requests))
        harness = DiffusionHarness(
            model, tokenizer, sampler, EvaluationSettings(seed=seed, progress=False), HarnessTask(batch_size=size)
        )
        assert harness.generate_until([requests[i] for i in order]) == [expected[i] for i in order]
        for request, ids, text in zip(requests, plain, expected, strict=True):
            found = Recorded.answers.pop(document_key(request)).ids
            assert found == ids[: len(found)]
            assert len(found) == len(ids) or ending.settled(found)  # to the end of the stop string, or the end token
            assert ending.text(found) == text
    return expected


@torch.no_grad()
def write_plainly(model) -> None:
    """Make a random model write printable characters, and with clear preferences."""
    model.head.weight *= 30
    model.head.weight[94:] = 0


def short_answers(texts: Sequence[str], until: Sequence[str]) -> list[Instance]:
    settings = {"until": list(until), "max_gen_toks": LENGTH, "block_length": BLOCK, "steps": LENGTH}
    return [Instance("generate_until", {}, (text, settings), 0, ("task", i, 1)) for i, text in enumerate(texts)]


@pytest.mark.parametrize(("seed", "sizes"), [(0, (1, 3, 16)), (5, (2, 7))])
@pytest.mark.parametrize(
    "sampler",
    [
        LLaDASampler(),
        LLaDASampler(temperature=0.8),
        LLaDASampler(cfg_scale=1.5),
        LLaDASampler(temperature=0.8, cfg_scale=1.5),
        DreamSampler(),
        DreamSampler(temperature=0.8),
    ],
    ids=str,
)
def test_answers_are_the_plain_ones_to_the_end_of_their_stop_string(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, sampler: Sampler, seed: int, sizes: Sequence[int]
) -> None:
    """Ragged prompts, one of them empty; stop strings of one and two tokens, in and across blocks."""
    checkpoint = inspect(str(tiny_checkpoint("llada" if isinstance(sampler, LLaDASampler) else "dream", seed=seed)))
    model, tokenizer = load_weights(checkpoint, dtype=torch.float64), load_tokenizer(checkpoint)
    write_plainly(model)
    texts = ["x" * 2 * (i % 7) + str(i) * (i > 0) for i in range(N)]
    plain = [plain_ids(model, tokenizer, sampler, request, seed) for request in short_answers(texts, [])]
    written = [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]
    pieces = {text[i : i + n] for text in written for n in (1, 2) for i in range(2, 6)}
    until: list[str] = []
    for piece in sorted(pieces, key=lambda piece: (sum(piece in text for text in written), -len(piece), piece)):
        if sum(any(string in text for string in until) for text in written) < N // 3:
            until.append(piece)
    requests = short_answers(texts, until)
    found = assert_equal_answers(monkeypatch, model, tokenizer, sampler, requests, plain, seed, sizes)
    assert N // 3 <= sum(short != whole for short, whole in zip(found, written, strict=True)) < N


# the bundled models


def requests_of(task: str, n: int) -> list[Instance]:
    (entry,) = yaml.safe_load((ROOT / "conf" / "task" / f"{task}.yaml").read_text())["suite"].values()
    (leaf,) = leaves(entry["harness"])
    built = build(leaf, TaskSpec(**entry), data_root=None, steps=None)
    built.build_all_requests(limit=n, rank=0, world_size=1)
    return built.instances


@pytest.fixture(scope="module", params=["nano_llada", "nano_dream"])
def bundled(request: pytest.FixtureRequest):
    checkpoint = inspect(str(ROOT / "dqx" / "assets" / request.param))
    return load_weights(checkpoint, dtype=torch.float32), load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    ("task", "temperature", "n", "sizes"),
    [
        ("nano_sums", 0.0, 7, (2, 7)),
        ("nano_sums", 0.7, 7, (3,)),
        pytest.param("nano_code", 0.0, 7, (3,), marks=pytest.mark.slow),
        pytest.param("nano_sums", 0.7, 64, BATCHES, marks=pytest.mark.slow),
        pytest.param("nano_code", 0.7, 32, BATCHES, marks=pytest.mark.slow),
    ],
)
def test_bundled_models_write_the_same(
    bundled, monkeypatch: pytest.MonkeyPatch, task: str, temperature: float, n: int, sizes: Sequence[int]
) -> None:
    model, tokenizer = bundled
    sampler = (DreamSampler if model.arch.logit_shift else LLaDASampler)(temperature=temperature)
    requests = requests_of(task, n)
    plain = [plain_ids(model, tokenizer, sampler, request, seed=3) for request in requests]
    found = assert_equal_answers(monkeypatch, model, tokenizer, sampler, requests, plain, 3, sizes)
    assert len(set(found)) > n // 2


@pytest.mark.parametrize("seed", [0, 5])
def test_bundled_models_score_the_same(bundled, seed: int) -> None:
    """Within 1e-5 of each likelihood, in batches of 1, 2, 3, 7 and 16 of the longest request."""
    model, tokenizer = bundled
    requests = requests_of("nano_facts", 5)
    expected, longest = [], 0
    for request in requests:
        ids = encode_pair(tokenizer, *request.args, model.arch.eos_token_id)
        longest = max(longest, sum(map(len, ids)))
        prefix, target = map(torch.tensor, ids)
        key = (*document_key(request), request.idx)
        expected.append(log_likelihood(model, prefix, target, samples=8, seed=seed, key=key).value)
    for rows in BATCHES:
        order = random.Random(rows).sample(range(len(requests)), len(requests))
        settings = LikelihoodSettings(batch_tokens=rows * longest)
        harness = DiffusionHarness(
            model,
            tokenizer,
            LLaDASampler(),
            EvaluationSettings(seed=seed, likelihood=settings, progress=False),
            HarnessTask(mc_samples=8),
        )
        values = [value for value, _ in harness.loglikelihood([requests[i] for i in order])]
        assert values == pytest.approx([expected[i] for i in order], rel=1e-5)
