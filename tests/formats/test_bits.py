"""What `bits=` means: names, mixed widths, the average bits of what is really stored, and settings that cannot work."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import ROLES, TOY, Batch, ids, toy

from dqx.config.compose import compose, resolve
from dqx.config.schema import CONF_DIR, ConfigProblems, choices
from dqx.formats.bits import DENSE_ROLES, FORMATS, KVBits, RoleBits, label
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.activation import PerToken
from dqx.quant.bits_problems import bits_problems, entry_problems
from dqx.quant.linear import QuantLinear
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN

FP8 = BitsConfig("", WeightBits(8, -1, True, "fp8"), ActivationBits(8, True, "fp8"))
MXFP4 = BitsConfig("", WeightBits(4, 32, True, "mxfp4"), ActivationBits(4, True, "mxfp4"))
NVFP4 = BitsConfig("", WeightBits(4, 16, True, "nvfp4"), ActivationBits(4, True, "nvfp4"))


def w4(group_size: int = 32, *, symmetric: bool = False, **overrides: RoleBits) -> BitsConfig:
    return BitsConfig("", WeightBits(4, group_size, symmetric), ActivationBits(), overrides=overrides)


def composed(*overrides: str) -> BitsConfig:
    return resolve(compose(overrides)).bits


# ---- names and configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "name"),
    [
        (BitsConfig(), "w16a16"),
        (w4(), "w4a16"),
        (BitsConfig("", WeightBits(4), ActivationBits(8)), "w4a8"),
        (BitsConfig("", WeightBits(4), ActivationBits(4), KVBits(16)), "w4a4kv16"),
        (BitsConfig("", kv=KVBits(8, keys=4)), "w16a16kv8k4"),
        (BitsConfig("", kv=KVBits(keys=4, values=2)), "w16a16k4v2"),
        (BitsConfig("", WeightBits(4), ActivationBits(4, group_size=128), KVBits(8)), "w4a4g128kv8"),
        (BitsConfig("", WeightBits(4), ActivationBits(group_size=128)), "w4a16"),
        (FP8, "w8a8_fp8"),
        (BitsConfig("", MXFP4.weight, ActivationBits()), "w4a16_mxfp4"),
        (BitsConfig("", MXFP4.weight, FP8.activation), "w4a8_mxfp4_fp8"),
        (BitsConfig("", WeightBits(4, 128), FP8.activation), "w4a8_int_fp8"),
        (w4(down=RoleBits(weight=8)), "w4a16-down8"),
        (w4(v=RoleBits(8, group_size=64), down=RoleBits(8, 8)), "w4a16-v8g64-down8a8"),
        (BitsConfig("", NVFP4.weight, overrides={"down": RoleBits(8, None, -1, "fp8")}), None),
    ],
)
def test_names_tell_settings_apart(bits, name):
    assert label(bits) == (name or "w4a16_nvfp4-down8g-1_fp8")


def test_every_file_takes_its_name_from_its_contents():
    for choice in choices("bits"):
        assert "\nname: ${bits_name:}\n" in (CONF_DIR / "bits" / f"{choice}.yaml").read_text(), choice


FILES = {
    "fp8": "w8a8_fp8",
    "fp8_w8a16": "w8a16_fp8",
    "mxfp4": "w4a4_mxfp4",
    "mxfp4_w4a16": "w4a16_mxfp4",
    "nvfp4": "w4a4_nvfp4",
    "nvfp4_w4a16": "w4a16_nvfp4",
}


@pytest.mark.parametrize("choice", FILES)
def test_choices_of_formats(choice):
    bits = composed("method=rtn", f"bits={choice}")
    assert bits.name == FILES[choice]
    assert bits_problems(bits, TOY) == []
    assert bits.weight == {"fp8": FP8, "mxfp4": MXFP4, "nvfp4": NVFP4}[choice.split("_")[0]].weight
    wanted = ActivationBits(16) if choice.endswith("a16") else ActivationBits(bits.weight.bits, True, choice)
    assert bits.activation == wanted


def test_mixed_widths_on_the_command_line():
    bits = composed("bits=w4a16", "bits.overrides.down.weight=8", "bits.overrides.v.group_size=64")
    assert bits.name == "w4a16-vg64-down8"
    weight = bits.resolve(TOY).usual.weight
    assert weight["down"] == WeightBits(8, 128)
    assert weight["v"] == WeightBits(4, 64)
    assert weight["q"] == WeightBits(4, 128)
    narrow = composed("bits=w4a4", "bits.overrides.down.activation=8").resolve(TOY).usual
    assert narrow.activation["down"] == ActivationBits(8)
    assert compose(["bits=w4a16", "bits.overrides.down.weight=8", "method=rtn"]).bits.name == "w4a16-down8"


def test_roles_that_other_models_have_on_the_command_line():
    assert TOY.roles == DENSE_ROLES
    bits = composed("bits=w4a16", "bits.overrides.router.weight=8", "bits.overrides.router.group_size=64")
    assert bits.name == "w4a16-router8g64"
    routed = SimpleNamespace(roles=(*TOY.roles, "router"), n_blocks=1)
    assert bits.resolve(routed).usual.weight["router"] == WeightBits(8, 64)
    assert entry_problems(bits, routed) == []
    assert Method("rtn", RTN()).problems(bits, TOY) == [
        "bits.overrides.router is no linear of the model; there are q, k, v, o, gate, up, down"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dwn.weight=8", "bits.overrides.dwn is no linear of the model; did you mean down?"),
        ("dwn=8", "bits.overrides.dwn is no linear of the model; did you mean down?"),
        ("down.wieght=8", "bits.overrides.down.wieght is no setting; did you mean bits.overrides.down.weight?"),
        (
            "down.weight=four",
            "bits.overrides.down.weight=four is no whole number; write one",
        ),
        ("down=8", "bits.overrides.down"),
    ],
)
def test_overrides_that_say_nothing(override, message):
    try:
        problems = entry_problems(composed("bits=w4a16", f"bits.overrides.{override}"), TOY)
    except ConfigProblems as error:
        problems = error.problems
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_widths_of_blocks_on_the_command_line():
    bits = composed(
        "bits=w4a16", "bits.blocks.b0-3.weight=8", "bits.blocks.b0-3.down.weight=16", "bits.blocks.b9.weight=2"
    )
    assert bits.name == "w4a16-b0-3w8-b0-3down16-b9w2"
    blocks = bits.resolve(replace(TOY, n_blocks=10)).blocks
    assert [blocks[i].weight["q"].bits for i in (0, 3, 4, 8, 9)] == [8, 8, 4, 4, 2]
    assert [blocks[i].weight["down"].bits for i in (0, 3, 4, 9)] == [16, 16, 4, 2]
    assert composed("bits=w4a4", "method=rtn", "bits.blocks={b1: {activation: 8}}").name == "w4a4-b1a8"


def test_what_is_said_for_a_role_holds_in_every_block_that_does_not_say_it_for_the_role():
    bits = w4(down=RoleBits(8, group_size=16), v=RoleBits(6))
    bits.blocks = {"b1": {"weight": 3, "group_size": 64, "v": {"weight": 2}}}
    widths = bits.resolve(TOY)
    assert [widths.blocks[1].weight[role] for role in ("q", "v", "down")] == [
        WeightBits(3, 64),
        WeightBits(2, 64),
        WeightBits(8, 16),
    ]
    assert widths.blocks[0] == widths.usual == w4(down=RoleBits(8, group_size=16), v=RoleBits(6)).resolve(TOY).usual


def test_mixed_widths_in_a_file(tmp_path):
    (tmp_path / "bits").mkdir()
    (tmp_path / "bits" / "ours.yaml").write_text(
        "name: ${bits_name:}\nweight: {bits: 3}\noverrides:\n  o: {weight: 4}\n  down: {weight: 8, activation: 8}\n"
    )
    bits = composed(f"hydra.searchpath=[file://{tmp_path}]", "bits=ours")
    assert bits.name == "w3a16-o4-down8a8"
    widths = bits.resolve(TOY).usual
    assert [weight.bits for weight in widths.weight.values()] == [3, 3, 3, 4, 3, 3, 8]
    assert widths.activation["down"] == ActivationBits(8)


def test_the_format_of_one_role():
    bits = composed(
        "bits=nvfp4",
        "bits.overrides.down={format: fp8, weight: 8, activation: 8, group_size: -1}",
    )
    widths = bits.resolve(TOY).usual
    assert widths.weight["down"] == WeightBits(8, -1, True, "fp8")
    assert widths.activation["down"] == ActivationBits(8, True, "fp8")
    assert widths.weight["up"] == WeightBits(4, 16, True, "nvfp4")
    assert bits_problems(bits, TOY) == []
    integers = w4(down=RoleBits(8, 8, -1, "fp8")).resolve(TOY).usual
    assert integers.weight["down"].symmetric
    assert not integers.weight["up"].symmetric


# ---- what is stored ----------------------------------------------------------------------------------------------

MIXED = w4(v=RoleBits(8), gate=RoleBits(3, group_size=16), down=RoleBits(16))
FORMATS_MIXED = BitsConfig("", NVFP4.weight, overrides={"down": RoleBits(8, None, -1, "fp8")})
STORED = {
    "int": w4(),
    "per_row": w4(-1),
    "symmetric": w4(symmetric=True),
    "mixed": MIXED,
    "fp8": FP8,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "formats_mixed": FORMATS_MIXED,
}


def packed(linear: torch.nn.Module, bits: WeightBits) -> list[tuple[torch.Tensor, int]]:
    """The tensors that a checkpoint would hold, each with the bits per number, and the weight made from them alone."""
    if not isinstance(linear, QuantLinear) or linear.scale is None:
        return [(linear.weight, 16)]
    codes, scale, index = linear.codes(), linear.scale, linear.group_index.long()
    assert int(codes.max()) < 2**bits.bits
    if bits.format == "int":
        zeros = linear.zero_point.to(torch.uint8)
        assert torch.equal(zeros, linear.zero_point)
        assert int(zeros.max()) < 2**bits.bits
        weight = scale[:, index] * (codes.float() - zeros[:, index].float())
        parts = [(codes, bits.bits), (scale, 16)]
        if not bits.symmetric:
            parts.append((zeros, bits.bits))
        if (index.diff() < 0).any():
            parts.append((index, 16))
    elif bits.format == "fp8":
        weight = codes.view(torch.float8_e4m3fn).float() * scale[:, index]
        parts = [(codes, 8), (scale, 16)]
    else:
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        elements = torch.cat((e2m1, -e2m1))[codes.long()]
        if bits.format == "mxfp4":
            exponents = (torch.log2(scale) + 127).to(torch.uint8)
            weight = elements * torch.exp2(exponents.float() - 127)[:, index]
            parts = [(codes, 4), (exponents, 8)]
        else:
            tensor_scale = linear.grid.tensor_scale
            relative = (scale / tensor_scale).to(torch.float8_e4m3fn)
            weight = elements * (relative.float() * tensor_scale)[:, index]
            parts = [(codes, 4), (relative, 8), (tensor_scale, 32)]
    assert torch.equal(weight, linear.weight)
    return parts


@pytest.mark.parametrize("rounding", [RTN(), GPTQ(act_order=True)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", STORED)
def test_average_bits_are_those_of_the_stored_tensors(name, rounding):
    model, bits = toy(), STORED[name]
    if name in ("mxfp4", "nvfp4", "formats_mixed") and isinstance(rounding, GPTQ):
        rounding = GPTQ(act_order=True, static_groups=True)
    report = quantize(model, Method("m", rounding, PerToken()), bits, [Batch(ids(2))], progress=False)
    total = weights = 0
    for row in report.linears:
        linear = model.blocks[row.block].linears()[row.role]
        own = bits.resolve(TOY).blocks[row.block].weight[row.role]
        stored = sum(tensor.numel() * width for tensor, width in packed(linear, own))
        assert row.stored_bits == stored, row.name
        assert (row.bits, row.format) == (own.bits, own.format)
        total, weights = total + stored, weights + math.prod(row.shape)
    assert report.average_bits == total / weights
    assert report.to_dict()["average_bits"] == total / weights


def test_average_bits_by_hand():
    """64 x 64 weights and the MLP's, in groups of 32: (16 + 4) / 32 on top of 4 bits."""

    def average(bits: BitsConfig) -> float:
        return quantize(toy(), Method("rtn", RTN()), bits, progress=False).average_bits

    assert average(w4()) == 4 + 20 / 32
    assert average(w4(symmetric=True)) == 4 + 16 / 32
    assert average(BitsConfig("", MXFP4.weight)) == 4 + 8 / 32
    tensors, weights = 7 * 32, sum(math.prod(linear.weight.shape) for linear in toy().blocks[0].linears().values())
    assert average(BitsConfig("", NVFP4.weight)) == pytest.approx(4 + 8 / 16 + tensors / weights, abs=1e-12)
    down = 160 * 64
    assert average(w4(down=RoleBits(8))) == pytest.approx(((weights - down) * 4.625 + down * 8.75) / weights, abs=1e-12)


def test_roles_keep_their_widths():
    model = toy()
    report = quantize(model, Method("rtn", RTN()), MIXED, progress=False)
    block = model.blocks[0]
    assert [row.bits for row in report.linears[:7]] == [4, 4, 8, 4, 3, 4, 16]
    assert not isinstance(block.down, QuantLinear)
    assert block.v.codes().max() > 15
    assert block.gate.codes().max() == 7
    assert block.gate.scale.shape[1] == 4
    assert block.up.scale.shape[1] == 2
    kept = {row.name: row.reason for row in report.kept}
    assert kept["blocks.*.down.weight"] == "bits.overrides.down.weight=16"


@pytest.mark.parametrize("rounding", [RTN(), GPTQ()])
def test_blocks_keep_their_widths(rounding):
    """A block is what it is where all have its widths: with GPTQ as long as those before it agree."""
    bits, wide = w4(), w4(32)
    bits.blocks, wide.weight.bits = {"b1-2": {"weight": 8, "o": {"weight": 16}}}, 8
    models = {name: toy() for name in ("mixed", "narrow", "wide")}
    method, batches = Method("some", rounding), [Batch(ids())]
    report = quantize(models["mixed"], method, bits, batches, progress=False)
    quantize(models["narrow"], method, w4(), batches, progress=False)
    quantize(models["wide"], method, wide, batches, progress=False)
    assert [row.bits for row in report.linears] == [4] * 7 + [8, 8, 8, 16, 8, 8, 8] * 2
    first, second = (models["mixed"].blocks[i] for i in (0, 1))
    for role in ROLES:
        assert torch.equal(getattr(first, role).weight, getattr(models["narrow"].blocks[0], role).weight)
        if rounding == RTN() and role != "o":
            assert torch.equal(getattr(second, role).weight, getattr(models["wide"].blocks[1], role).weight)
    assert not isinstance(second.o, QuantLinear)
    size = sum(math.prod(linear.weight.shape) for linear in toy().blocks[0].linears().values())
    o = math.prod(second.o.weight.shape)
    assert report.average_bits == pytest.approx(
        (4.625 * size + 2 * (8.75 * (size - o) + 16 * o)) / (3 * size), abs=1e-12
    )
    (kept,) = (row for row in report.kept if row.name == "blocks.*.o.weight")
    assert (kept.count, kept.reason) == (2, "bits.blocks.b1-2.o.weight=16")


# ---- what cannot work --------------------------------------------------------------------------------------------


def changed(bits: BitsConfig, *, weight: dict | None = None, activation: dict | None = None, **overrides) -> BitsConfig:
    return BitsConfig(
        "",
        WeightBits(**(vars(bits.weight) | (weight or {}))),
        ActivationBits(**(vars(bits.activation) | (activation or {}))),
        overrides=overrides,
    )


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (changed(w4(), weight={"format": "fp9"}), "bits.weight.format=fp9 is unknown; did you mean fp8?"),
        (changed(w4(), activation={"format": "e4m3"}), "bits.activation.format=e4m3 is unknown; "),
        (changed(w4(), down=RoleBits(format="fp7")), "bits.overrides.down.format=fp7 is unknown; "),
        (changed(w4(), weight={"bits": 9}), "bits.weight.bits=9 is no width dqx has; 2, 3, 4, 5, 6, 7, 8 and 16"),
        (changed(w4(), down=RoleBits(weight=9)), "bits.overrides.down.weight=9 is no width dqx has; "),
        (
            changed(FP8, weight={"bits": 4}),
            "bits.weight.bits=4, but fp8 has 8 bits; write bits.weight.bits=8 or 16 (not quantized)",
        ),
        (
            changed(NVFP4, activation={"bits": 8}),
            "bits.activation.bits=8, but nvfp4 has 4 bits; write bits.activation.bits=4 or 16 (not quantized)",
        ),
        (changed(MXFP4, down=RoleBits(weight=8)), "bits.overrides.down.weight=8, but mxfp4 has 4 bits; "),
        (BitsConfig("", FP8.weight, FP8.activation, KVBits(4)), "bits.kv.bits=4, but fp8 has 8 bits; "),
        (
            changed(FP8, weight={"symmetric": False}),
            "bits.weight.symmetric=false, but fp8 has no zero point; write bits.weight.symmetric=true, or "
            "bits.weight.format=int",
        ),
        (changed(FP8, activation={"symmetric": False}), "bits.activation.symmetric=false, but fp8 has no zero point; "),
        (
            changed(MXFP4, weight={"group_size": 128}),
            "bits.weight.group_size=128, but mxfp4 has a scale per 32 inputs; write bits.weight.group_size=32",
        ),
        (
            changed(NVFP4, weight={"group_size": -1}),
            "bits.weight.group_size=-1, but nvfp4 has a scale per 16 inputs; write bits.weight.group_size=16",
        ),
        (
            changed(NVFP4, down=RoleBits(group_size=32)),
            "bits.overrides.down.group_size=32, but nvfp4 has a scale per 16 inputs; write "
            "bits.overrides.down.group_size=16",
        ),
        (
            changed(NVFP4, down=RoleBits(format="mxfp4")),
            "bits.weight.group_size=16, but mxfp4 has a scale per 32 inputs; write bits.overrides.down.group_size=32",
        ),
        (
            changed(w4(), down=RoleBits(group_size=48)),
            "bits.overrides.down.group_size=48 does not divide 160, the inputs of down (3 blocks); 32, 16 and -1 do",
        ),
        (
            changed(NVFP4, activation={"group_size": 32}),
            "bits.activation.group_size=32, but nvfp4 has a scale per 16 channels; write bits.activation.group_size=-1",
        ),
        (
            changed(w4(), activation={"bits": 4, "group_size": 64}),
            "bits.activation.group_size=64 does not divide 160, the inputs of down; 32 and -1 (one grid per token) do",
        ),
        (changed(w4(), weight={"group_size": 0}), "bits.weight.group_size=0 is no number of inputs; for this model 32"),
    ],
)
def test_problems_say_what_to_write(bits, message):
    (problem,) = bits_problems(bits, TOY)
    assert problem.startswith(message)
    assert problem in Method("rtn", RTN(), PerToken()).problems(bits, TOY)


@pytest.mark.parametrize(
    ("blocks", "messages"),
    [
        ({"b2-4": {"weight": 8}}, ["bits.blocks.b2-4: the model has 3 blocks, b0 to b2"]),
        ({"3": {"weight": 8}}, ["bits.blocks.3 names no block; write b3 for one, or b0-3 for the first four"]),
        ({"b2-1": {"weight": 8}}, ["bits.blocks.b2-1 names no block; "]),
        ({"b0-1": {"weight": 8}, "b1-2": {}}, ["bits.blocks.b1-2 and bits.blocks.b0-1 are both for block 1"]),
        ({"b1": 8}, ["bits.blocks.b1=8 says not of what; write bits.blocks.b1.weight=8"]),
        ({"b1": {"wieght": 8}}, ["bits.blocks.b1.wieght is no setting; did you mean weight?"]),
        ({"b1": {"down": {"bits": 8}}}, ["bits.blocks.b1.down.bits is no setting; "]),
        (
            {"b0": {"weight": 9}, "b1": {"down": {"group_size": 48}}, "b2": {"format": "fp9"}},
            [
                "bits.blocks.b0.weight=9 is no width dqx has; ",
                "bits.blocks.b1.down.group_size=48 does not divide 160, the inputs of down ",
                "bits.blocks.b2.format=fp9 is unknown; did you mean fp8?",
            ],
        ),
    ],
)
def test_problems_of_blocks(blocks, messages):
    bits = w4()
    bits.blocks = blocks
    found = Method("rtn", RTN()).problems(bits, TOY)
    assert Method("rtn", RTN()).streams(bits.resolve(TOY)) == set()  # can be asked before they are told
    assert len(found) == len(messages), found
    assert all(problem.startswith(message) for problem, message in zip(found, messages, strict=True)), found


def test_widths_that_a_method_does_not_have_in_some_block():
    bits = BitsConfig("", WeightBits(16, 32), blocks={"b0": {"weight": 4, "activation": 8}})
    (weights_only,) = Method("gptq", GPTQ()).problems(bits, TOY)
    assert weights_only.startswith("bits.blocks.b0.activation=8, but method gptq quantizes weights only; write bits.bl")
    assert Method("gptq", GPTQ()).streams(bits.resolve(TOY)) == {"quantized"}
    assert Method("gptq", GPTQ()).streams(BitsConfig().resolve(TOY)) == set()


def test_blocks_that_do_not_fill_an_input():
    narrow = type(TOY)(**{**vars(TOY), "mlp_size": 168})
    first, second = bits_problems(MXFP4, narrow)
    assert first == (
        "bits.weight.group_size=32 does not divide 168, the inputs of down (3 blocks); mxfp4 cannot be had for them; "
        "write bits.overrides.down.weight=16"
    )
    assert second == (
        "bits.activation.format=mxfp4 has a scale per 32 channels, which do not divide 168, the inputs of down; "
        "write bits.overrides.down.activation=16"
    )
    remedied = changed(MXFP4, down=RoleBits(weight=16, activation=16))
    assert bits_problems(remedied, narrow) == []


def test_blocks_stay_together():
    """The blocks of a specification are neighbours; act_order alone would scatter them."""
    scattered = Method("gptq", GPTQ(act_order=True)).problems(BitsConfig("", NVFP4.weight), TOY)
    assert scattered == [
        "method.rounding.act_order=true groups inputs in the order of their activations, but nvfp4 shares a scale "
        "among neighbours; add method.rounding.static_groups=true"
    ]
    for settings, bits in ((GPTQ(act_order=True, static_groups=True), NVFP4), (GPTQ(act_order=True), FP8)):
        assert Method("gptq", settings).problems(BitsConfig("", bits.weight), TOY) == []


def test_unquantized_formats_are_not_judged():
    assert bits_problems(BitsConfig("", WeightBits(16, 5, False, "mxfp4"), ActivationBits(16, False, "fp8")), TOY) == []


def test_formats_have_all_their_facts():
    for name, format in FORMATS.items():
        assert (format.symmetric is None) == (name == "int")
        assert format.superblock is None or (format.weights_only and format.superblock % format.block == 0)
        assert set(format.widths) <= set(range(2, 9))
