"""The quantized side is measured where activation quantizers read: behind scalings, rotations and online transforms."""

import pytest
import torch
from test_methods_identities import bits_of, built, fresh, run, sequences
from tiny import SITES

from dqx.data.calibration import CalibBatch
from dqx.diagnostics.activations import measure_activations
from dqx.models.plant import plant_outliers


class Heard:
    """An activation quantizer that notes what it is given."""

    def __init__(self, quantizer):
        self.quantizer, self.inputs = quantizer, []

    def __call__(self, x, bits):
        self.inputs.append(x.detach().clone())
        return self.quantizer(x, bits)


def shown():
    ids = sequences(2)
    return [CalibBatch(ids, torch.zeros(len(ids)))]


@pytest.mark.parametrize("name", ["rtn", "smoothquant", "quarot", "duquant"])
def test_what_the_quantizers_read_is_measured(name):
    model = fresh("dream")
    plant_outliers(model, 32.0, 4)
    before = measure_activations(model, shown())
    run(model, built(name, "dream"), bits_of(name, "dream", "w4a4"))
    heard = {}
    for index, block in enumerate(model.blocks):
        for site, roles in SITES.items():
            for role in roles:
                linear = getattr(block, role)
                linear.activation = heard[index, site, role] = Heard(linear.activation)
    after = measure_activations(model, shown())
    for (index, site, _), quantizer in heard.items():
        (x,) = quantizer.inputs  # one forward
        row = after.at(index, site)
        assert torch.equal(after.maps[f"{index}/{site}/channel_max"], x.abs().flatten(0, 1).amax(0))
        assert row.abs_max == x.abs().max()
        assert row.median == pytest.approx(float(x.abs().median()), rel=0.005)
    assert before.at(1, "mlp_out").outlier_channels == before.at(1, "attn_in").outlier_channels == 4
    if name == "rtn":
        assert after.at(1, "mlp_out").outlier_channels == 4
    else:  # the transform has done its work
        assert not any(row.outlier_channels for row in after.rows if row.site in ("attn_in", "mlp_in"))
    if name in ("quarot", "duquant"):  # the rotation before down runs online
        assert after.at(1, "mlp_out").outlier_channels == 0
        assert after.at(1, "mlp_out").max_over_median < 0.5 * before.at(1, "mlp_out").max_over_median
