"""Predictions against full precision: known values, and exact agreement where nothing changed."""

import math

import pytest
import torch

from dqx.api import load
from dqx.checks import problems
from dqx.config import compose, resolve
from dqx.fidelity import RATIOS, Predictions, compare, first_step, predict, windows


def test_known_values():
    p, q = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0.9, 0.1, 0.0]])
    states = torch.tensor([[[9, 9], [9, 9]], [[1, 9], [9, 1]], [[1, 2], [2, 1]]])
    other = torch.tensor([[[9, 9], [9, 9]], [[1, 9], [1, 9]], [[1, 3], [1, 2]]])
    found = compare(Predictions(p.log(), [0.5], states), Predictions(q.log(), [0.5], other))
    (row,) = found["by_mask_ratio"]
    assert row["divergence"] == pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1), rel=1e-5)
    assert (row["mask_ratio"], row["positions"], row["agreement"]) == (0.5, 1, 1.0)
    assert found["answers"] == {
        "documents": 2,
        "tokens": 2,
        "steps": 2,
        "agreement": 0.25,
        "first_diverging_step": [2, 1],
    }
    assert first_step([False, False]) is None


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_unchanged_model_agrees_exactly_and_a_changed_one_does_not(tiny_checkpoint, family):
    lm = load(str(tiny_checkpoint(family)), dtype="float32")
    tokens = windows(lm.tokenizer, 2, 32)
    assert tokens.shape == (2, 32)
    before = predict(lm.model, lm.sampler, tokens, gen_length=4)
    same = compare(before, predict(lm.model, lm.sampler, tokens, gen_length=4))
    assert [row["mask_ratio"] for row in same["by_mask_ratio"]] == list(RATIOS)
    assert [row["positions"] for row in same["by_mask_ratio"]] == [6, 16, 16, 16, 16]
    assert all(row["divergence"] == 0 and row["agreement"] == 1 for row in same["by_mask_ratio"])
    assert same["answers"]["agreement"] == 1
    assert same["answers"]["first_diverging_step"] == [None, None]
    with torch.no_grad():
        for block in lm.model.blocks:
            block.up.weight.mul_(-1)
    other = compare(before, predict(lm.model, lm.sampler, tokens, gen_length=4))
    assert all(row["divergence"] > 0 for row in other["by_mask_ratio"])
    assert other["answers"]["agreement"] < 1
    assert all(1 <= step <= 4 for step in other["answers"]["first_diverging_step"] if step)


def test_settings_are_judged():
    def found(*overrides):
        return problems(resolve(compose(["method=rtn", "task=nano_facts", "outliers.samples=0", *overrides])))

    assert found() == found("fidelity.samples=0", "fidelity.gen_length=9999") == []
    assert found("fidelity.length=3") == ["fidelity.length=3 must be 16 or more"]
    (problem,) = found("fidelity.gen_length=5000")
    assert "take 5064 positions, more than the model's 4096" in problem


def test_more_windows_than_text_are_refused(tiny_checkpoint):
    lm = load(str(tiny_checkpoint("llada")), dtype="float32")
    with pytest.raises(ValueError, match=r"more than the bundled text's \d+ tokens"):
        windows(lm.tokenizer, 10**6, 32)
