"""A tokenizer with more tokens than the model has: it loads, and text that spells such a token is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

import dqx
from dqx.api import DiffusionLM
from dqx.config.schema import CalibConfig
from dqx.diffusion import greedy_matches, log_likelihood
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.samplers import LLaDASampler
from dqx.diffusion.scorer import Request, Scorer
from dqx.evaluate.harness import DiffusionHarness, HarnessTask
from dqx.evaluate.settings import EvaluationSettings
from dqx.evaluate.spec import TaskSpec
from dqx.models.checkpoint import CheckpointError, inspect
from dqx.models.tokenizer import load_tokenizer

SIZE = 320  # of the model's vocabulary
OUTSIDE = "<|extra_66|>"  # added tokens follow the 258 of the byte tokenizer
GROUPS = ["bits.weight.group_size=32"]
TOLD = rf"holds the token '<\|extra_66\|>' with the id 32\d, but the model's vocabulary has {SIZE} tokens"


def with_added_tokens(folder: Path, count: int = 70) -> Path:
    """The checkpoint with a tokenizer that has tokens for nothing."""
    tokenizer = load_tokenizer(inspect(str(folder)))
    tokenizer.add_tokens([f"<|extra_{i}|>" for i in range(count)], special_tokens=True)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(params=["llada", "dream"])
def lm(tiny_checkpoint: Callable[..., Path], request: pytest.FixtureRequest) -> DiffusionLM:
    return dqx.load(with_added_tokens(tiny_checkpoint(request.param)), device="cpu")


def test_unused_tokens_do_no_harm(tiny_checkpoint: Callable[..., Path], lm: DiffusionLM) -> None:
    assert len(lm.tokenizer) > SIZE
    plain = dqx.load(tiny_checkpoint(lm.config.family), device="cpu")
    inside = "<|extra_3|>"  # a token of its own, for which the model has an embedding
    assert lm.tokens(inside).tolist() == [lm.tokenizer.convert_tokens_to_ids(inside)]
    assert torch.equal(lm.logits("hello"), plain.logits("hello"))
    assert lm.generate("hello", gen_length=8) == plain.generate("hello", gen_length=8)


def instance(kind: str, context: str, second: Any) -> Instance:
    return Instance(kind, {}, (context, second), 0, metadata=("task", 0, 1))


def harness(lm: DiffusionLM) -> DiffusionHarness:
    return DiffusionHarness(
        lm.model, lm.tokenizer, LLaDASampler(), EvaluationSettings(progress=False), HarnessTask(mc_samples=1)
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda lm, text: harness(lm).loglikelihood([instance("loglikelihood", text, " no")]),
        lambda lm, text: harness(lm).loglikelihood([instance("loglikelihood", "Is it?", text)]),
        lambda lm, text: harness(lm).generate_until(
            [instance("generate_until", text, {"until": [], "max_gen_toks": 4, "steps": 4})]
        ),
        lambda lm, text: lm.generate(text, gen_length=8),
        lambda lm, text: lm.generate(text, gen_length=8, chat=True),
        lambda lm, text: lm.log_likelihood("a", text),
        lambda lm, text: lm.logits(text),
        lambda lm, text: lm.quantize("gptq", "w4a16", calib=[text], overrides=GROUPS),
    ],
    ids=["context", "choice", "prompt", "generate", "chat", "log_likelihood", "logits", "quantize"],
)
def test_text_with_such_a_token_is_refused(lm: DiffusionLM, read: Callable[[DiffusionLM, str], Any]) -> None:
    with pytest.raises(ValueError, match=TOLD) as raised:
        read(lm, f"what is {OUTSIDE} here")
    assert f"what is {OUTSIDE} here" in str(raised.value)
    assert "use the tokenizer that belongs to the model" in str(raised.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_texts_with_such_a_token_are_refused(lm: DiffusionLM, tmp_path: Path, suffix: str) -> None:
    text = tmp_path / f"text{suffix}"
    content = "many words " * 50 + OUTSIDE + " and more words" * 50
    text.write_text(content if suffix == ".txt" else json.dumps({"text": content}))
    with pytest.raises(ValueError, match=TOLD):
        lm.calibration(CalibConfig("clean", str(text), samples=2, length=16))
    spec = TaskSpec("text", "text", "text", "nll", text=str(text), mc_samples=1, length=16)
    with pytest.raises(ValueError, match=TOLD):
        lm.evaluate_suite({"t": spec}, limit=1)


def test_a_tokenizer_of_another_model_is_refused_with_its_sizes(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("llada", vocab_size=258, embedding_size=258)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zz"] = 300
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{folder.name}: the tokenizer has 301 tokens, .* only 258"):
        load_tokenizer(inspect(str(folder)))


@pytest.mark.parametrize("ids", [[1, SIZE], [-1, 2]])
def test_ids_that_are_no_tokens_are_told_before_the_model_sees_them(lm: DiffusionLM, ids: list[int]) -> None:
    model, sampler = lm.model, LLaDASampler()
    for call in (
        lambda: sampler.generate(model, torch.tensor([ids]), gen_length=4, steps=4),
        lambda: Engine(model, sampler, gen_length=4, steps=4).generate([Prompt(ids, "a")]),
        lambda: log_likelihood(model, [1], ids, samples=2, seed=0),
        lambda: log_likelihood(model, ids, [1], samples=2, seed=0),
        lambda: greedy_matches(model, ids, [1]),
        lambda: Scorer(model, samples=2, seed=0).score([Request([1], ids)]),
        lambda: lm.tokens(ids),
        lambda: lm.log_likelihood([1], ids),
        lambda: lm.quantize("gptq", "w4a16", calib=[ids], overrides=GROUPS),
    ):
        with pytest.raises(ValueError, match=r"is no token of the model; ids go from 0 to 319"):
            call()
