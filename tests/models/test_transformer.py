"""Logits of both families against the official implementations (tests/golden/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import shift_logits

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_match_official(family):
    golden = load_file(GOLDEN / f"{family}_forward.safetensors")
    model = load_weights(inspect(str(GOLDEN / f"{family}_tiny")))
    ours = model(golden["input_ids"])
    expected = golden["shifted_logits" if family == "dream" else "logits"]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    if family == "dream":
        torch.testing.assert_close(ours, shift_logits(golden["logits"]), atol=1e-4, rtol=0)
    if "hidden_states" in golden:
        for state, expected_state in zip(
            model.hidden_states(golden["input_ids"]), golden["hidden_states"], strict=True
        ):
            torch.testing.assert_close(state, expected_state, atol=1e-4, rtol=0)


def test_dream_padding_matches_official():
    golden = load_file(GOLDEN / "dream_forward.safetensors")
    model = load_weights(inspect(str(GOLDEN / "dream_tiny")))
    mask = golden["padded.attention_mask"]
    ours = model(golden["input_ids"], attention_mask=mask)
    # the first real position of a padded row reads its prediction from padding: not comparable
    real = mask.bool() & torch.cat((mask[:, :1], mask[:, :-1]), 1).bool()
    torch.testing.assert_close(ours[real], shift_logits(golden["padded.logits"])[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_of_some_positions_are_those_of_the_whole_sequence(family, padded):
    model = load_weights(inspect(str(GOLDEN / f"{family}_tiny")))
    ids = torch.randint(0, model.arch.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]]) if padded else None
    where = torch.zeros(3, 9, dtype=torch.bool)
    where[0, [0, 1, 4]] = where[2, [0, 6]] = True  # Dream reads tokens 0 and 1 at one row; row 1 asks for nothing
    with torch.no_grad():
        expected = model(ids, mask)[where]
        torch.testing.assert_close(model.logits_where(ids, where, mask), expected, atol=1e-5, rtol=0)
        assert model.logits_where(ids, torch.zeros_like(where), mask).shape == (0, model.arch.vocab_size)


@pytest.mark.parametrize(("family", "width"), [("llada", 3), ("dream", 4)])
def test_the_last_block_computes_what_is_read(family, width):
    model = load_weights(inspect(str(GOLDEN / f"{family}_tiny")))
    seen = []
    for block in model.blocks:
        block.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        block.k.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    where = torch.zeros(2, 9, dtype=torch.bool)
    where[0, [2, 4]] = where[1, 8] = True
    where[1, 7] = family == "dream"  # columns 6 and 7 predict 7 and 8
    where[1, 5] = family == "dream"
    model.logits_where(torch.arange(18).view(2, 9), where)  # no two tokens are equal
    assert seen == [9] * (2 * len(model.blocks) - 1) + [width]
