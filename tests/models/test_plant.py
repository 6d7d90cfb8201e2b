"""Planted outliers: the function stays, the activations change."""

from pathlib import Path

import pytest
import torch

from dqx.data.calibration import CalibBatch
from dqx.diagnostics.activations import measure_activations
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.plant import outlier_channels, plant_outliers

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("gain", [64.0, 100.0])
def test_logits_stay(family, gain):
    checkpoint = inspect(str(GOLDEN / f"{family}_tiny"))
    model = load_weights(checkpoint, torch.float64)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(ids)
    plant_outliers(model, gain, 4)
    torch.testing.assert_close(model(ids), before, atol=1e-10, rtol=0)


def test_outliers_appear_where_they_were_planted():
    checkpoint = inspect(str(GOLDEN / "llada_tiny"))
    model = load_weights(checkpoint)
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    batches = [CalibBatch(ids, torch.zeros(2))]
    plain = measure_activations(model, batches)
    plant_outliers(model, 64.0, 4)
    planted = measure_activations(model, batches)
    for site, width in (("attn_in", 64), ("mlp_in", 64), ("mlp_out", 192)):
        for block in range(3):
            row = planted.at(block, site)
            top = {channel.channel for channel in row.top_channels[:4]}
            assert top == set(outlier_channels(width, 4)), (site, block)
            assert row.abs_max > 10 * plain.at(block, site).abs_max
    assert planted.at(0, "attn_out").abs_max == pytest.approx(plain.at(0, "attn_out").abs_max, rel=1e-4)
