"""What was put into a model is found, and nothing else: layers, sites, channels, tokens."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from bundled.hold import OutlierPlan
from test_activation_parts import states
from test_outliers import ARCH, batches, model

from dqx.config.compose import compose, resolve
from dqx.data.calibration import CalibBatch, calibration_windows
from dqx.diagnostics.activations import findings, measure_activations
from dqx.diffusion.rollout import State
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.plant import outlier_channels, plant_outliers
from dqx.models.tokenizer import load_tokenizer

PROMPT, ANSWER = 48, 16


@cache
def bundled(name):
    """Statistics of a bundled model over its calibration text, and over answers that are written from the left."""
    config = resolve(compose([f"model={name}", "calib.samples=2", "calib.length=128"]))
    checkpoint = inspect(config.model.path)
    net, tokenizer = load_weights(checkpoint, torch.float32), load_tokenizer(checkpoint)
    windows = calibration_windows(config.calib, tokenizer, seed=0, data_root=None)
    mask, shown = checkpoint.arch.mask_token_id, []
    for written in (0, 8):
        ids = windows[:, : PROMPT + ANSWER].clone()
        ids[:, PROMPT + written :] = mask
        shown.append(State(ids, written, PROMPT, 1 - written / ANSWER, mask))
    stats = measure_activations(net, [CalibBatch(windows, torch.zeros(2))], states=shown)
    return windows, tokenizer, shown, stats.with_token_texts(lambda token: str(tokenizer.decode([token])))


@pytest.mark.parametrize("name", ["nano_llada", "nano_dream"])
def test_outliers_of_the_bundled_models_are_those_of_their_model_cards(name):
    windows, tokenizer, _, stats = bundled(name)
    plan = OutlierPlan()
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    at_newlines = (windows == newline).nonzero().tolist()
    units, steady = [unit for unit, *_ in plan.massive_units], [channel for channel, _ in plan.steady]
    for row in stats.rows:
        if (row.site, row.block) in {("mlp_out", block) for block in plan.massive_blocks}:
            assert row.massive_tokens == len(at_newlines) > 4
            assert row.massive_values == len(units) * len(at_newlines)
            assert sorted(t.channel for t in row.massive_channels) == units
            assert row.massive_token_ids == [newline]
            assert all([t.sequence, t.position] in at_newlines for t in row.massive_channels)
            assert all(t.token_id == newline and t.channel == units[0] for t in row.top_tokens[: len(at_newlines)])
        else:
            assert row.massive_values == row.massive_tokens == row.n_massive_channels == 0
            assert row.massive_channels == row.massive_token_ids == []
        if row.site in ("attn_in", "mlp_in"):
            assert row.outlier_channels == 2
            assert [c.channel for c in row.top_channels[:2]] == steady
            assert row.top_channels[1].share > 0.95
        else:  # the last block's MLP has formed some of its own
            assert row.outlier_channels <= (row.block == 2 and row.site == "mlp_out")
    massive = stats.at(0, "mlp_out")
    text = findings(stats)
    assert text[0] == (
        f"Massive values at mlp_out of blocks 0-1, up to {max(massive.abs_max, stats.at(1, 'mlp_out').abs_max):.3g}: "
        f"channels 37, 301; tokens that have any there: '\\n' ({100 * massive.massive_token_share:.2g} %)."
    )
    assert "Outlier channels at attn_in and mlp_in of every block: 41, 170." in text


@pytest.mark.parametrize("name", ["nano_llada", "nano_dream"])
def test_massive_values_of_the_bundled_models_follow_their_tokens_through_the_steps(name):
    _, tokenizer, shown, stats = bundled(name)
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    for part in stats.parts:
        if part.step is None:
            seen = sum(int((state.token_class(part.token_class) & (state.ids == newline)).sum()) for state in shown)
        else:
            seen = next(int((state.ids == newline).sum()) for state in shown if state.step == part.step)
        if part.site == "mlp_out" and part.block in OutlierPlan().massive_blocks:
            assert part.massive_tokens == seen
        else:
            assert part.massive_tokens == 0
    assert any(
        line.startswith("While an answer is written, massive values at mlp_out touch ") for line in findings(stats)
    )


@pytest.mark.parametrize("gain", [16.0, 2048.0])
def test_planted_outliers_are_found(gain):
    """`model.outliers.gain`: channels at three sites of every block, on all tokens; very large ones are massive too."""
    net = model()
    plant_outliers(net, gain, 3)
    stats = measure_activations(net, batches(), states=states())
    planted = {"attn_in": 32, "mlp_in": 32, "mlp_out": 48}
    for row in stats.rows:
        expected = outlier_channels(planted[row.site], 3) if row.site in planted else []
        assert row.outlier_channels == len(expected), (row.block, row.site)
        assert sorted(c.channel for c in row.top_channels[: len(expected)]) == expected
        if gain > 1000 and expected:
            assert {t.channel for t in row.massive_channels} <= set(expected)
            assert row.massive_values
        else:
            assert row.massive_values == 0
    for part in stats.parts:
        if part.site in ("attn_in", "mlp_in") and gain > 1000:
            assert set(outlier_channels(32, 3)) <= set(part.channels)
    text = findings(stats)
    hidden, inner = (", ".join(map(str, outlier_channels(width, 3))) for width in (32, 48))
    assert f"Outlier channels at attn_in and mlp_in of every block: {hidden}." in text
    assert f"Outlier channels at mlp_out of every block: {inner}." in text
    assert ("No massive values." in text) == (gain < 1000)


def test_a_model_without_outliers_has_none():
    stats = measure_activations(model(seed=3), batches(count=4, rows=3, length=16), states=states())
    assert all(row.massive_values == row.relative_values == row.outlier_channels == 0 for row in stats.rows)
    assert all(part.massive_values == part.relative_values == 0 for part in stats.parts)
    assert findings(stats) == ["No massive values.", "No outlier channels."]
    counted = replace(stats, rows=[replace(stats.rows[0], massive_values=3), *stats.rows[1:]])  # as in older records
    assert findings(counted)[0].startswith("Massive values at attn_in of block 0; the record does not say")


def test_values_that_are_not_finite_are_named():
    net = model()
    net.blocks[1].mlp_norm.weight[4] = torch.nan
    assert (
        findings(measure_activations(net, batches(count=1)))[-1]
        == "Values that are not finite at mlp_in and mlp_out of block 1."
    )


def test_findings_of_many_layers_stay_short():
    """Each block with a channel of its own, and one in all of them: the shared one first, then a few, then a count."""
    net = model(arch=replace(ARCH, n_blocks=12))
    for index, block in enumerate(net.blocks):
        block.attn_norm.weight[[1, 10 + index]] = 50.0
    text = findings(measure_activations(net, batches()))
    assert len(text) <= 9
    assert text[1] == "Outlier channels at attn_in of every block: 1."
    assert text[-1] == "Outlier channels besides these: 7."
