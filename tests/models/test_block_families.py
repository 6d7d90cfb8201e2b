"""The families with block-wise attention against recorded outputs of their official code (tests/golden3)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from goldens import GOLDEN3, golden
from torch import Tensor
from transformers import Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from dqx.models.architecture import CAUSAL, FULL, Attention, Yarn
from dqx.models.checkpoint import inspect, load_weights, save
from dqx.models.hub_config import CheckpointError
from dqx.models.layout import Layout, copies
from dqx.models.rope import rope_tables
from dqx.models.transformer import MaskedDiffusionTransformer

#: Our family, the name of its golden set, and the mask token where the checkpoint does not name it.
SETS = {"sdar": ("sdar", 151), "nemotron": ("nemotron", None), "fast_dllm": ("fastdllm2", 150)}
LOGITS = {"atol": 1e-4, "rtol": 0}


def model_of(family: str) -> MaskedDiffusionTransformer:
    name, mask = SETS[family]
    return load_weights(inspect(str(GOLDEN3 / f"{name}_tiny"), mask_token_id=mask)).eval()


def raw(model: MaskedDiffusionTransformer, ids: Tensor, attention: Attention) -> tuple[list[Tensor], Tensor]:
    """Hidden states, and logits where they are computed."""
    states = list(model.hidden_states(ids, layout=Layout.of(ids, None, attention)))
    return states, model.head(states[-1])


FORWARDS = [
    ("sdar", "block4", Attention(4), "input_ids"),
    ("sdar", "block8", Attention(8), "input_ids"),
    ("sdar", "full", FULL, "input_ids"),
    ("sdar", "causal", CAUSAL, "input_ids"),
    ("nemotron", "causal", CAUSAL, "input_ids"),
    ("nemotron", "bidirectional", FULL, "masked_ids"),
    ("fast_dllm", "block8", Attention(8), "input_ids"),
    ("fast_dllm", "block32", Attention(32), "input_ids"),
]


@pytest.mark.parametrize(("family", "case", "attention", "tokens"), FORWARDS)
def test_forward(family, case, attention, tokens):
    model, data = model_of(family), golden(f"{SETS[family][0]}_forward", GOLDEN3)
    states, logits = raw(model, data[tokens].long(), attention)
    torch.testing.assert_close(logits, data[f"{case}.logits"], **LOGITS)
    if f"{case}.hidden_states" in data:
        torch.testing.assert_close(torch.stack(states), data[f"{case}.hidden_states"], **LOGITS)


def test_a_forward_has_the_attention_and_the_shift_of_its_family():
    for family, case in (("sdar", "block4"), ("nemotron", "causal"), ("fast_dllm", "block32")):
        model, data = model_of(family), golden(f"{SETS[family][0]}_forward", GOLDEN3)
        logits = data[f"{case}.logits"]
        if model.arch.logit_shift:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
        torch.testing.assert_close(model(data["input_ids"].long()), logits, **LOGITS)


def passes(family: str) -> tuple[MaskedDiffusionTransformer, list[tuple], dict[str, Tensor], str]:
    """The recorded plan of a family: (from, to, attention of the new tokens, stored, tokens) of each call."""
    name = SETS[family][0]
    plan = json.loads((GOLDEN3 / f"{name}_forward.json").read_text())
    model, data = model_of(family), golden(f"{name}_forward", GOLDEN3)
    if family == "nemotron":
        kinds = {"causal": CAUSAL, "bidirectional": FULL}
        return model, [(a, b, kinds[k], s, t) for a, b, k, s, t in plan["passes.plan"]], data, "passes"
    block = Attention(4 if family == "sdar" else 8)
    return model, [(a, b, block, s, "input_ids") for a, b, s in plan["kv.plan"]], data, "kv"


@pytest.mark.parametrize("family", SETS)
def test_stored_keys_and_values(family):
    model, plan, data, key = passes(family)
    store, logits = model.empty_store(1, 96), []
    for start, stop, attention, stored, tokens in plan:
        ids = data[tokens][:1, start:stop].long()
        feed = store.feed(torch.ones(ids.shape, dtype=torch.bool), [attention], [stored])
        logits.append(model.head_rows(ids, torch.ones(ids.shape, dtype=torch.bool), feed))
        feed.commit()
    torch.testing.assert_close(torch.cat(logits)[None], data[f"{key}.logits"], **LOGITS)
    kept = store.store[:, :, 0, :, : store.lengths[0]]
    torch.testing.assert_close(kept[:, 0], data[f"{key}.keys"], **LOGITS)
    torch.testing.assert_close(kept[:, 1], data[f"{key}.values"], **LOGITS)


@pytest.mark.parametrize("family", SETS)
def test_rows_of_different_lengths_share_a_forward(family):
    """One row is ahead of the other, one is stored and the other looked at, with another attention: as one by one."""
    model = model_of(family)
    ids = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    joined, alone = model.empty_store(2, 24), [model.empty_store(1, 16) for _ in range(2)]
    plans = [[(0, 8, CAUSAL, True), (8, 12, FULL, False)], [(0, 4, FULL, True), (4, 12, Attention(4), True)]]
    for (a, b, first, keep), (c, d, second, keep_second) in zip(*plans, strict=True):
        width = max(b - a, d - c)
        real = torch.arange(width) < torch.tensor([[b - a], [d - c]])
        padded = torch.stack([F_pad(ids[0, a:b], width), F_pad(ids[1, c:d], width)])
        feed = joined.feed(real, [first, second], [keep, keep_second])
        together = model.head_rows(padded, real, feed)
        feed.commit()
        one_by_one = []
        for row, (start, stop, attention, stored) in enumerate(((a, b, first, keep), (c, d, second, keep_second))):
            mine = ids[row : row + 1, start:stop]
            feed = alone[row].feed(torch.ones(mine.shape, dtype=torch.bool), [attention], [stored])
            one_by_one.append(model.head_rows(mine, torch.ones(mine.shape, dtype=torch.bool), feed))
            feed.commit()
        torch.testing.assert_close(together, torch.cat(one_by_one), atol=2e-5, rtol=0)
    assert joined.lengths == [8, 12] == [store.lengths[0] for store in alone]
    feed = joined.feed(torch.ones(1, 4, dtype=torch.bool), [FULL], [False], rows=[1])
    own = alone[1].feed(torch.ones(1, 4, dtype=torch.bool), [FULL], [False])
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    one_row = [model.head_rows(ids[1:, 12:], everywhere, one) for one in (feed, own)]
    torch.testing.assert_close(*one_row, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="the store holds 16 tokens of a row; 17 were asked"):
        alone[1].feed(torch.ones(1, 5, dtype=torch.bool), [FULL], [True])


def F_pad(ids: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, width - len(ids)))


@pytest.mark.parametrize("stored", [CAUSAL, Attention(4)])
def test_one_forward_of_a_text_and_its_copies_is_what_the_sampler_computes(stored):
    model = model_of("sdar")
    g = torch.Generator().manual_seed(1)
    text = torch.randint(0, 90, (12,), generator=g)
    noisy = [text.masked_fill(torch.rand(12, generator=g) < 0.5, 151) for _ in range(2)]
    layout = copies(12, 4, stored, 2)
    together = model.head(list(model.hidden_states(torch.cat([text, *noisy])[None], layout=layout))[-1])[0]
    store = model.empty_store(1, 12)
    for start in range(0, 12, 4):
        for i, (tokens, attention) in enumerate([(noisy[0], FULL), (noisy[1], FULL), (text, stored)]):
            ids = tokens[None, start : start + 4]
            everywhere = torch.ones(ids.shape, dtype=torch.bool)
            feed = store.feed(everywhere, [attention], [i == 2])
            logits = model.head_rows(ids, everywhere, feed)
            feed.commit()
            at = (i + 1) % 3 * 12 + start
            torch.testing.assert_close(logits, together[at : at + 4], atol=2e-5, rtol=0)


def test_padding_moves_no_block():
    model = model_of("sdar")
    ids = torch.randint(0, 90, (1, 11), generator=torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(ids, (3, 0), value=2)
    real = torch.ones_like(padded).index_fill(1, torch.arange(3), 0)
    torch.testing.assert_close(model(padded, real)[:, 3:], model(ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("family", "config", "native"), [
    ("sdar", Qwen3Config, Qwen3Model), ("fast_dllm", Qwen2Config, Qwen2Model)
])  # fmt: skip
def test_transformers_has_the_same_body(family, config, native):
    """A second oracle: transformers' own class with an explicit mask of blocks."""
    model = model_of(family)
    folder = GOLDEN3 / f"{SETS[family][0]}_tiny"
    values = json.loads((folder / "config.json").read_text())
    for key in ("auto_map", "architectures", "model_type", "torch_dtype"):
        values.pop(key)
    body = native(config(**values, attn_implementation="sdpa")).eval()
    from safetensors.torch import load_file

    tensors = {k.removeprefix("model."): t for k, t in load_file(folder / "model.safetensors").items() if "model." in k}
    body.load_state_dict(tensors)
    ids = torch.randint(0, 90, (1, 14), generator=torch.Generator().manual_seed(3))
    layout = Layout.of(ids, None, Attention(4))
    with torch.no_grad():
        wanted = body(input_ids=ids, attention_mask=layout.mask, position_ids=layout.positions).last_hidden_state
    ours = list(model.hidden_states(ids, layout=layout))[-1]
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("yarn", [Yarn(16.0, 16384), Yarn(4.0, 64, beta_fast=4.0), Yarn(0.25, 4096)])
def test_yarn_is_that_of_transformers(yarn):
    arch = replace(model_of("nemotron").arch, yarn=yarn, rope_theta=1e6, head_dim=128)
    config = Qwen3Config(head_dim=128, max_position_embeddings=int(yarn.original_length * 16))
    config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": yarn.factor, "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow, "original_max_position_embeddings": yarn.original_length,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = torch.tensor(arch.yarn.frequencies(1e6, 128))
    torch.testing.assert_close(ours, frequencies, rtol=1e-5, atol=0)
    assert factor == yarn.attention_factor == 1.0
    positions = torch.tensor([[0, yarn.original_length, 2 * yarn.original_length]])
    scale = rope_tables(replace(arch, yarn=replace(yarn, query_scale=0.1)), positions, torch.float32).query_scale
    torch.testing.assert_close(scale[0, 0, :, 0], 1 + 0.1 * torch.log1p(torch.tensor([0.0, 1.0, 2.0])))


def test_recorded_frequencies():
    data, arch = golden("nemotron_forward", GOLDEN3), model_of("nemotron").arch
    assert arch.yarn is not None
    torch.testing.assert_close(
        torch.tensor(arch.yarn.frequencies(arch.rope_theta, arch.head_size)), data["inv_freq"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("family", SETS)
def test_saved_and_loaded_again(family, tmp_path):
    from dqx.models.family import family_of

    model = model_of(family)
    save(model, family_of(family).config(model.arch), tmp_path)
    again = inspect(str(tmp_path))
    assert again.arch == model.arch
    ids = torch.arange(9)[None]
    assert torch.equal(load_weights(again)(ids), model(ids))


@pytest.mark.parametrize(("family", "changed", "told"), [
    ("sdar", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("sdar", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("sdar", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ("sdar", {"head_dim": 15}, "heads of 15 channels cannot be rotated in pairs"),
    ("sdar", {"block_size": -4}, "block_length=-4 is not a whole number"),
    ("sdar", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ("nemotron", {"dlm_paradigm": "autoregressive"}, "dlm_paradigm='autoregressive' is not supported"),
    ("nemotron", {"sliding_window": 512}, "sliding_window=512 is not supported"),
    ("nemotron", {"mlp_bias": True}, "mlp_bias=True is not supported"),
    ("nemotron", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0}},
     "'original_max_position_embeddings' is missing"),
    ("fast_dllm", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("fast_dllm", {"invented": 1}, "invented=1 is not understood"),
])  # fmt: skip
def test_what_is_not_computed_is_refused(family, changed, told, tmp_path):
    folder = GOLDEN3 / f"{SETS[family][0]}_tiny"
    config = json.loads((folder / "config.json").read_text()) | {"mask_token_id": 151} | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(Path(folder / "model.safetensors").resolve())
    with pytest.raises(CheckpointError, match=r"config\.json") as problem:
        inspect(str(tmp_path))
    assert told in str(problem.value)
