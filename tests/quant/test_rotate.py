"""Rotations: the official rotated model under its saved matrices, identities, and what they are for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqx.config.compose import build, select
from dqx.formats.bits import ActivationBits, BitsConfig, KVBits, RoleBits, WeightBits
from dqx.models.checkpoint import inspect, load_weights, tensor_names
from dqx.models.family import family_of
from dqx.models.plant import plant_outliers
from dqx.quant.activation import PerToken
from dqx.quant.clip import WeightMSE
from dqx.quant.kv import KeysValues
from dqx.quant.loop import quantize
from dqx.quant.method import Method
from dqx.quant.protocols import Context, ModelChange
from dqx.quant.rounding.rtn import RTN
from dqx.quant.transforms import rotate
from dqx.quant.transforms.online import HeadRotation, OnlineDown, rotate_down, rotate_heads
from dqx.quant.transforms.rotate import (
    FoldNorms,
    ResidualRotation,
    fold_block,
    fold_final_norm,
    make_rotation,
    random_orthogonal,
    residual_rotation,
    subtract_embedding_mean,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FOLD = ModelChange(fold_final_norm, fold_block)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "quarot.safetensors")


def fresh(family="llada", dtype=torch.float64):
    return load_weights(inspect(str(GOLDEN / f"{family}_tiny")), dtype)


def rotated(golden, matrix="hadamard", mean=False, dtype=torch.float32):
    """The official rotation of `llada_tiny`, with its random matrix and its core of order 12."""
    model = fresh(dtype=dtype)
    FOLD.apply(model)
    if mean:
        subtract_embedding_mean(model)
    q_DD = golden[f"Q_{matrix}"]
    residual_rotation(lambda x: x @ q_DD).apply(model)
    for block in model.blocks:
        rotate_heads(block)
        rotate_down(block, matrix_KK=golden["had_matrix_mlp"])
    return model


def logits(model, ids):
    """One sequence at a time, as the official ones were computed."""
    return torch.cat([model(row) for row in ids.split(1)])


@pytest.mark.parametrize(
    ("case", "matrix", "mean"),
    [
        ("hadamard_clean", "hadamard", False),
        ("random_clean", "random", False),
        ("hadamard_reference", "hadamard", True),
    ],
)
def test_rotated_logits_equal_official(golden, case, matrix, mean):
    ours = logits(rotated(golden, matrix, mean), golden["input_ids"])
    torch.testing.assert_close(ours, golden[f"logits_rotated.{case}"], atol=1e-4, rtol=0)
    exact = logits(fresh(), golden["input_ids"])
    wide = logits(rotated(golden, matrix, mean, torch.float64), golden["input_ids"])
    if mean:
        assert (wide - exact).abs().max() > 4
    else:
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=0)
        torch.testing.assert_close(wide, exact, atol=1e-11, rtol=0)


def test_rotated_weights_equal_official(golden):
    model = rotated(golden)
    official = load_file(GOLDEN / "quarot_rotated_weights.safetensors")
    names = tensor_names(model.arch)
    ours = {names[name]: p for name, p in model.named_parameters() if names[name] in official}
    assert len(ours) == len(official) == 12
    for name, weight in official.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)


CASES = json.loads((GOLDEN / "quarot.json").read_text())["cases"]


def quantized(golden, case):
    """The official case: the model is rotated with the saved matrices, the rest is a method and bits."""
    published = case["variant"] == "reference"
    model = rotated(golden, mean=published)
    method = Method(
        name="quarot",
        clip=WeightMSE() if case["w_clip"] else None,
        rounding=RTN(exact_absmax=True),
        activation=PerToken(),
        kv=KeysValues(keys=None if published else "head" if "k_groupsize" in case else "token", rotate=True),
        quantizes="weights_and_activations",
    )
    bits = BitsConfig(
        weight=WeightBits(case["w"], -1, symmetric=not case.get("w_asym", False)),
        activation=ActivationBits(case["a"], symmetric=not case.get("a_asym", False)),
        kv=KVBits(case["v"]),
        overrides={"down": RoleBits(weight=16)} if published else {},
    )
    quantize(model, method, bits, progress=False)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['name']}.{c['variant']}")
def test_quantized_logits_equal_official(golden, case):
    ours = logits(quantized(golden, case), golden["input_ids"])
    error = (ours - golden[f"logits_quant.{case['name']}.{case['variant']}"]).square().mean()
    assert error < 1e-6 * case["mse_vs_original"]


@pytest.mark.parametrize("name", ["w4a4kv4_sym", "w4a4kv4_asym", "w4_noclip_only"])
def test_codes_and_scales_equal_official(golden, name):
    (case,) = (c for c in CASES if (c["name"], c["variant"]) == (name, "clean"))
    official = load_file(GOLDEN / "quarot_weights_and_block.safetensors")
    model = quantized(golden, case)
    seen = 0
    names = family_of("llada").block_names
    for index, block in enumerate(model.blocks):
        for role, linear in block.linears().items():
            their = f"{name}.{index}.{names[role]}"
            torch.testing.assert_close(linear.scale, official[f"wscale.{their}"], rtol=1e-5, atol=0)
            zero_point = official.get(f"wzero.{their}", torch.zeros(()))
            if "w_asym" in case:
                assert torch.equal(linear.zero_point, zero_point)
            if f"wcodes.{their}" in official:
                centre = 0 if "w_asym" in case else 8
                assert torch.equal(linear.codes().long() - centre, official[f"wcodes.{their}"].long())
                seen += 1
    assert seen == 7


def test_tensors_inside_a_block_equal_official(golden):
    (case,) = (c for c in CASES if (c["name"], c["variant"]) == ("w4a4kv4_sym", "clean"))
    model = quantized(golden, case)
    block = model.blocks[0]
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    block.inputs["attn_out"].register_forward_pre_hook(lambda module, args: seen.__setitem__("attn_out_in", args[0]))
    block.inputs["mlp_out"].register_forward_pre_hook(lambda module, args: seen.__setitem__("ff_out_in", args[0]))
    for name, role in (("q_proj", "q"), ("attn_out", "o"), ("ff_out", "down")):
        linear = getattr(block, role)
        linear.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(
                f"{name}_in_quantized", module.quantize_input(args[0])
            )
        )
    for part in ("q", "k", "v"):
        block.heads[part].register_forward_hook(keep(f"{part}_out"))
    block.register_forward_pre_hook(lambda module, args: seen.__setitem__("block_in", args[0]))
    block.register_forward_hook(keep("block_out"))
    model(golden["input_ids"][:1])
    seen["v_out"] = seen["v_out"].transpose(1, 2).flatten(2)
    official = load_file(GOLDEN / "quarot_weights_and_block.safetensors")
    names = {"_".join(k.split(".")[1:]) for k in official if k.startswith("block0_w4a4kv4_sym.")}
    names = {name.removeprefix("block0_w4a4kv4_sym_") for name in names} - {"q_in", "k_in"}
    assert names <= set(seen)
    for name in names:
        torch.testing.assert_close(seen[name], official[f"block0_w4a4kv4_sym.{name}"], atol=2e-5, rtol=0)


FULL = {"fold": FoldNorms(), "rotate": ResidualRotation(), "heads": HeadRotation(), "down": OnlineDown()}
COMBINATIONS = {
    "all": FULL,
    "fold": {"fold": FoldNorms()},
    "residual": {"fold": FoldNorms(), "rotate": ResidualRotation()},
    "residual_no_signs": {"fold": FoldNorms(), "rotate": ResidualRotation(kind="hadamard")},
    "residual_orthogonal": {"fold": FoldNorms(), "rotate": ResidualRotation(kind="orthogonal")},
    "residual_tiles": {"fold": FoldNorms(), "rotate": ResidualRotation(tile=16)},
    "orthogonal_tiles": {"fold": FoldNorms(), "rotate": ResidualRotation(kind="orthogonal", tile=8)},
    "heads": {"heads": HeadRotation()},
    "heads_offline": {"heads": HeadRotation(online=False)},
    "down": {"down": OnlineDown()},
    "down_tiles": {"down": OnlineDown(tile=4)},
}


def apply(model, transforms, seed=0):
    method = Method(name="rotations", transforms=transforms)
    context = Context(model.arch, BitsConfig().resolve(model.arch).usual, method, seed)
    for name, transform in transforms.items():
        transform.prepare(context.at(name=name), model.device).apply(model)
    return model


def liven(model, seed=0):
    """Random gains and biases, which a fresh checkpoint has not."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.copy_(torch.randn(p.shape, generator=g) + ("norm" in name))
    return model


IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gain", [1.0, 64.0], ids=["plain", "outliers"])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_function_stays(family, gain, name):
    """Dream has biases on q, k, v and four query heads to a value head."""
    model = fresh(family)
    before = model(IDS)
    plant_outliers(model, gain, 4)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    apply(model, COMBINATIONS[name])
    assert any(not torch.equal(p, weights[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(model(IDS), before, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llada", {"weight_tying": True}),
        ("llada", {"n_kv_heads": 1}),
        ("llada", {"include_qkv_bias": True}),
        ("dream", {"tie_word_embeddings": True}),
        # a core of order 28 for residual stream and heads, of order 148 before down: Dream-7B's widths, scaled down
        ("dream", {"hidden_size": 112, "intermediate_size": 148, "num_attention_heads": 28, "num_key_value_heads": 4}),
    ],
    ids=str,
)
def test_function_stays_in_other_shapes(tiny_checkpoint, family, config):
    model = liven(load_weights(inspect(str(tiny_checkpoint(family, **config))), torch.float64))
    before = model(IDS)
    apply(model, FULL)
    torch.testing.assert_close(model(IDS), before, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_method_changes_nothing_at_16_bits(family):
    model = fresh(family)
    before = model(IDS)
    plant_outliers(model, 64.0, 4)
    quantize(model, build(select(method="quarot", bits="w4a4").method), BitsConfig(), progress=False)
    torch.testing.assert_close(model(IDS), before, atol=1e-10, rtol=0)


def test_the_published_variants_are_settings():
    """Embedding mean subtracted, keys left alone, weights of down left alone with plain rounding."""
    chosen = select(method="quarot_as_published", bits="w4a4", overrides=["method.rounding=rtn"])
    method = build(chosen.method)
    assert method.transforms["fold"] == FoldNorms(subtract_embedding_mean=True)
    assert method.kv == KeysValues(keys=None, rotate=True)
    assert method.rounding == RTN(exact_absmax=True)
    model = fresh()
    bits = replace(chosen.bits, overrides={"down": RoleBits(weight=16)})
    report = quantize(model, method, bits, progress=False)
    assert {row.role for row in report.linears if row.bits == 16} == {"down"}
    assert {row.activation_bits for row in report.linears} == {4}


def test_writers_biases_are_rotated_too():
    """No checkpoint of either family has biases on o and down, but a correction may."""
    model = fresh()
    for block in model.blocks:
        for writer in (block.o, block.down):
            writer.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64, dtype=torch.float64), requires_grad=False)
    before = model(IDS)
    apply(model, FULL)
    torch.testing.assert_close(model(IDS), before, atol=1e-10, rtol=0)


def test_tied_head_is_untied(tiny_checkpoint):
    model = load_weights(inspect(str(tiny_checkpoint("llada", weight_tying=True))), torch.float64)
    assert model.head.weight is model.embed.weight
    with pytest.raises(ValueError, match="shares the embedding's tensor; fold norms first"):
        residual_rotation(lambda x: x).apply(model)
    FOLD.apply(model)
    assert model.head.weight is not model.embed.weight


def test_subtracting_the_embedding_mean_changes_the_function():
    model = fresh()
    before = model(IDS)
    apply(model, {"fold": FoldNorms(subtract_embedding_mean=True)})
    assert model.embed.weight.mean(-1).abs().max() < 1e-15
    assert (model(IDS) - before).abs().max() > 1


def test_rotation_needs_folded_norms():
    with pytest.raises(ValueError, match=r"a norm has a gain or a bias, .* fold norms first"):
        residual_rotation(lambda x: x).apply(fresh())


def test_rotation_depends_on_the_seed_only():
    def embedding(seed):
        return apply(fresh(), COMBINATIONS["residual"], seed).embed.weight

    assert torch.equal(embedding(0), embedding(0))
    assert not torch.allclose(embedding(0), embedding(1))


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("kind", rotate.KINDS)
def test_rotations_are_orthogonal_and_stay_inside_tiles(kind, tile):
    q_DD = make_rotation(kind, 64, tile, torch.Generator().manual_seed(0))(torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(q_DD @ q_DD.T, torch.eye(64, dtype=torch.float64), atol=1e-12, rtol=0)
    size = tile or 64
    blocks = torch.block_diag(*(torch.ones(size, size) for _ in range(64 // size)))
    assert bool((q_DD[blocks == 0] == 0).all())
    if "hadamard" in kind:
        torch.testing.assert_close(q_DD.abs(), blocks.double() * size**-0.5, atol=1e-12, rtol=0)


def test_random_orthogonal_matrices_are_uniform():
    """Uniform means: no direction is preferred, so entries average zero with variance 1/n."""
    q = random_orthogonal(4000, 3, torch.Generator().manual_seed(0))
    assert q.mean(0).abs().max() < 0.04
    torch.testing.assert_close(q.square().mean(0), torch.full((3, 3), 1 / 3, dtype=q.dtype), atol=0.02, rtol=0)


def test_chunks_are_only_about_memory(monkeypatch):
    whole = apply(fresh(), FULL)
    monkeypatch.setattr(rotate, "CHUNK_VALUES", 200)
    pieces = apply(fresh(), FULL)
    for (name, a), (_, b) in zip(whole.named_parameters(), pieces.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0, msg=name)


def test_outlier_channels_are_spread():
    """What rotations are for: the largest value of a linear's input, relative to its root mean square, gets small."""

    def peaks(model):
        found = {}
        for name in ("q", "down"):
            getattr(model.blocks[0], name).register_forward_pre_hook(
                lambda module, args, name=name: found.__setitem__(
                    name, (args[0].abs().amax(-1) / args[0].square().mean(-1).sqrt()).mean().item()
                )
            )
        model(IDS)
        return found

    def with_outliers():
        model = fresh()
        model.embed.weight[:, 5] *= 50
        for block in model.blocks:
            block.up.weight[7] *= 50
        return model

    plain, better = peaks(with_outliers()), peaks(apply(with_outliers(), FULL))
    assert plain["q"] > 6  # sqrt(64) = 8 if there were nothing else
    assert plain["down"] > 6
    assert better["q"] < 2
    assert better["down"] < 3


def test_problems_say_what_to_write():
    def problems(transforms, **changes):
        arch = inspect(str(GOLDEN / "dream_tiny")).arch
        shape = replace(arch, **changes)
        setting = Context(shape, BitsConfig().resolve(shape).usual, Method(name="m", transforms=transforms))
        return [p for name, part in transforms.items() for p in part.problems(f"method.transforms.{name}", setting)]

    assert problems(FULL) == []
    assert problems(FULL, hidden_size=3584, mlp_size=18944, n_heads=28, n_kv_heads=4) == []
    assert problems(FULL, hidden_size=4096, mlp_size=12288, n_heads=32, n_kv_heads=32) == []
    for transforms in (dict(reversed(FULL.items())), {"rotate": ResidualRotation()}):
        (problem,) = problems(transforms)
        assert "put fold_norms before it (+method.transforms.fold=fold_norms" in problem
    (problem,) = problems({"fold": FoldNorms(), "rotate": ResidualRotation(kind="givens")})
    assert "rotate.kind=givens is unknown; write random_hadamard, hadamard or orthogonal" in problem
    for kind in ("random_hadamard", "orthogonal"):
        (problem,) = problems({"fold": FoldNorms(), "rotate": ResidualRotation(kind=kind, tile=48)})
        assert "rotate.tile=48 does not divide 64" in problem
    (problem,) = problems({"down": OnlineDown()}, mlp_size=52)
    assert "method.transforms.down.tile=null: the inputs of down" in problem
    assert "tiles of 4, 2 do work" in problem
    assert problems({"down": OnlineDown(tile=4)}, mlp_size=52) == []
    (problem,) = problems({"heads": HeadRotation()}, n_heads=6, hidden_size=96)
    assert "6 heads" in problem
    assert "write method.transforms.heads.online=false" in problem
    assert problems({"heads": HeadRotation(online=False)}, n_heads=6, hidden_size=96) == []
    (problem,) = problems({"heads": HeadRotation(online=False)}, n_heads=2, hidden_size=12)
    assert "the width of a head" in problem
    assert "~method.transforms.heads" in problem
