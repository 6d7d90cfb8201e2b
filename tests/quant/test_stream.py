"""Statistics of a single block, without the model around it."""

from __future__ import annotations

import pytest
import torch
from goldens import tiny

from dqx.quant import block_statistics

IDS = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_statistics_of_one_block():
    model = tiny("dream")
    block, x = model.blocks[0], model.embed(IDS)
    found = block_statistics(block, x, ["absmax", "hessian"])
    normed = block.attn_norm(x).flatten(0, 1)
    torch.testing.assert_close(found["attn_in"]["absmax"], normed.abs().amax(0))
    torch.testing.assert_close(found["attn_in"]["hessian"], normed.T @ normed / 72)
    assert found["mlp_out"]["absmax"].shape == (model.arch.mlp_size,)
    by_sequence = block_statistics(block, list(x.split(1)), {"mlp_in": ["tokens"]})
    assert list(by_sequence) == ["mlp_in"]
    assert by_sequence["mlp_in"]["tokens"].shape == (72, model.arch.hidden_size)
    with pytest.raises(ValueError, match=r"absmx is no statistic; did you mean absmax"):
        block_statistics(block, x, ["absmx"])
    with pytest.raises(ValueError, match="compares two models"):
        block_statistics(block, x, ["cross"])
