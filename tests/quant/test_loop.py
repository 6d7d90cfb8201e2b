"""`quantize` on whole models: official whole-model GPTQ, identities, what is quantized, what the report says."""

import json
from dataclasses import replace

import pytest
import torch
from goldens import GOLDEN, tiny
from safetensors.torch import load_file
from tiny import ROLES, TOY, Batch, ids, linears, logits, toy

from dqx.formats.integers import Grid
from dqx.models.family import family_of
from dqx.models.transformer import shift_logits
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.activation import PerToken
from dqx.quant.linear import QuantLinear
from dqx.quant.report import stored_bits
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN, rtn_round
from dqx.quant.stream import Stream

FAMILIES = ("llada", "dream")
GPTQ_CASES = [
    (family, case)
    for family in FAMILIES
    for case in json.loads((GOLDEN / f"gptq_model_{family}.json").read_text())["cases"]
    if not case["name"].endswith("reference_module_list")  # leaves out q, k and v
]

FP16 = Method("fp16")
RTN_METHOD = Method("rtn", RTN(), PerToken())
GPTQ_METHOD = Method("gptq", GPTQ(), PerToken())


def bits(weight: int, activation: int = 16, group_size: int = 32, symmetric: bool = False) -> BitsConfig:
    return BitsConfig(
        f"w{weight}a{activation}", WeightBits(weight, group_size, symmetric), ActivationBits(activation, symmetric)
    )


def run(model, method, setting, batches=None, **kwargs):
    batches = [Batch(ids())] if batches is None else batches
    return quantize(model, method, setting, batches, progress=False, **kwargs)


@pytest.mark.parametrize(("family", "case"), GPTQ_CASES, ids=lambda v: v["name"] if isinstance(v, dict) else v)
def test_whole_model_gptq_equals_official(family, case):
    golden = load_file(GOLDEN / f"gptq_model_{family}.safetensors")
    model = tiny(family)
    method = Method("gptq", GPTQ(act_order=case["desc_act"]))
    report = run(model, method, bits(case["bits"], symmetric=case["sym"]), [Batch(golden["calibration_ids"])])
    names = family_of(family)
    for i in range(len(model.blocks)):
        for role in ROLES:
            hub = names.block_prefix.format(i) + names.block_names[role]
            if f"codes.{case['name']}.{hub}" not in golden:
                continue
            ours = getattr(model.blocks[i], role)
            assert torch.equal(ours.codes(), golden[f"codes.{case['name']}.{hub}"]), hub
            torch.testing.assert_close(ours.scale, golden[f"scale.{case['name']}.{hub}"], rtol=1e-4, atol=0)
            assert torch.equal(ours.zero_point, golden[f"zero.{case['name']}.{hub}"]), hub
    expected = golden[f"logits.{case['name']}"]
    with torch.no_grad():
        ours = model(golden["input_ids"])
    torch.testing.assert_close(ours, shift_logits(expected) if family == "dream" else expected, atol=2e-4, rtol=0)
    # their list holds the names of one block's linears: ours covers exactly the same
    assert {names.block_names[row.role] for row in report.linears} == set(case["quantized"])


QUANTIZED_ROLES = {
    "llada": ["q", "k", "v", "o", "gate", "up", "down"],
    "dream": ["q", "k", "v", "o", "gate", "up", "down"],
}
KEPT = {
    "llada": ["embed.weight", "blocks.*.attn_norm.weight", "blocks.*.mlp_norm.weight", "norm.weight", "head.weight"],
    "dream": [
        "embed.weight",
        "blocks.*.q.bias",
        "blocks.*.k.bias",
        "blocks.*.v.bias",
        "blocks.*.attn_norm.weight",
        "blocks.*.mlp_norm.weight",
        "norm.weight",
        "head.weight",
    ],
}


@pytest.mark.parametrize("method", [RTN_METHOD, GPTQ_METHOD], ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_linear_is_skipped(family, method):
    model, original = tiny(family), tiny(family)
    report = run(model, method, bits(3, 8), [Batch(ids(2, 16))])
    expected = [f"blocks.{i}.{role}" for i in range(len(model.blocks)) for role in QUANTIZED_ROLES[family]]
    assert [row.name for row in report.linears] == expected
    for name, linear in linears(model).items():
        assert isinstance(linear, QuantLinear), name
        assert linear.activation is not None, name
        assert not torch.equal(linear.weight, linears(original)[name].weight), name
        levels = torch.stack([w.unique().new_tensor(len(w.unique())) for w in linear.weight.view(-1, 32)])
        assert levels.max() <= 8, name
    assert sorted(row.name for row in report.kept) == sorted(KEPT[family])
    assert all(row.reason for row in report.kept)
    counted = sum(row.parameters for row in report.kept) + sum(row.shape[0] * row.shape[1] for row in report.linears)
    assert counted == sum(p.numel() for p in original.parameters())
    state, before = model.state_dict(), original.state_dict()
    for name in before:
        if not any(name == f"{linear}.weight" for linear in expected):
            assert torch.equal(state[name], before[name]), name


@pytest.mark.parametrize("method", [FP16, RTN_METHOD, GPTQ_METHOD], ids=lambda m: m.name)
def test_sixteen_bits_changes_nothing(method):
    model = toy()
    before = logits(model)
    report = run(model, method, bits(16), [])
    assert torch.equal(logits(model), before)
    assert report.average_bits == 16
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    assert {row.name for row in report.kept} >= {"blocks.*.q.weight", "blocks.*.down.weight"}


def test_rtn_runs_no_forward_and_rounds_every_weight_alone():
    model, original = toy(), toy()

    def forbidden(*_):
        raise AssertionError("a forward pass was run")

    hooks = [m.register_forward_pre_hook(forbidden) for m in model.modules()]
    report = run(model, RTN_METHOD, bits(4), [])
    for hook in hooks:
        hook.remove()
    for name, linear in linears(model).items():
        expected = rtn_round(linears(original)[name].weight, Grid(4), 32)
        assert torch.equal(linear.weight, expected.dequantize())
        assert torch.equal(linear.codes(), expected.codes)
    assert all(row.output_error is None for row in report.linears)
    assert report.calibration_tokens == 0


def test_more_bits_are_closer_and_eight_are_close():
    reference = logits(toy())

    def error(method, setting):
        model = toy()
        run(model, method, setting, [Batch(ids(2))])
        return ((logits(model) - reference).square().mean() / reference.var()).item()

    for method in (RTN_METHOD, GPTQ_METHOD):
        for symmetric in (False, True):
            errors = [error(method, bits(n, n, symmetric=symmetric)) for n in (8, 5, 2)]
            assert errors == sorted(errors)
            assert errors[0] < 1e-3
        assert error(method, bits(16, 8)) < 1e-3
        assert error(method, bits(8, 16, group_size=-1)) < 1e-3


def test_gptq_beats_rtn_on_outputs():
    for width in (2, 3):
        rtn_model, gptq_model = toy(), toy()
        run(rtn_model, RTN_METHOD, bits(width), [])
        report = run(gptq_model, GPTQ_METHOD, bits(width))
        reference = toy()
        assert all(row.output_error is not None and row.output_error < row.weight_error for row in report.linears)
        x = ids()
        with torch.no_grad():
            gptq_error = (gptq_model(x) - reference(x)).square().mean()
            rtn_error = (rtn_model(x) - reference(x)).square().mean()
        assert gptq_error < rtn_error


def test_quantized_weights_survive_a_second_time():
    once, twice = toy(), toy()
    run(once, RTN_METHOD, bits(4), [])
    twice.load_state_dict({k: v for k, v in once.state_dict().items() if k in twice.state_dict()})
    run(twice, RTN_METHOD, bits(4), [])
    torch.testing.assert_close(logits(twice), logits(once), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("setting", [bits(4, 8), bits(8, 8, symmetric=True)], ids=lambda b: b.name)
def test_other_dtypes(dtype, setting):
    model = toy(dtype)
    report = run(model, GPTQ_METHOD, setting)
    assert model.dtype == dtype
    assert logits(model).dtype == dtype
    assert torch.isfinite(logits(model)).all()
    for name, linear in linears(model).items():
        assert linear.weight.dtype == dtype, name
        index = linear.group_index.long()
        back = linear.scale[:, index] * (linear.codes().to(linear.scale.dtype) - linear.zero_point[:, index])
        assert torch.equal(back.to(dtype), linear.weight), name  # codes read off a bfloat16 weight are exact
    assert max(row.weight_error for row in report.linears) < 0.03


def test_result_does_not_depend_on_batching():
    a, b = toy(), toy()
    run(a, GPTQ_METHOD, bits(3), [Batch(ids())])
    run(b, GPTQ_METHOD, bits(3), [Batch(part) for part in ids().split([1, 2, 3])])
    assert torch.equal(logits(a), logits(b))


def test_shared_input_is_one_column_loop():
    """Stacking q, k, v (gate, up) gives what separate calls give."""
    together, apart = toy(torch.float64), toy(torch.float64)
    run(together, Method("gptq", GPTQ(chunk=32)), bits(3))
    # different but equivalent parts are not stacked: all chunks that start with every group give the same codes
    by_role = {"k": GPTQ(chunk=32), "v": GPTQ(chunk=16), "up": GPTQ(chunk=32)}
    run(apart, replace(GPTQ_METHOD, rounding=GPTQ(chunk=8), rounding_by_role=by_role), bits(3))
    for name, linear in linears(apart).items():
        assert torch.equal(linear.codes(), linears(together)[name].codes()), name


def test_streams_follow_their_model():
    """The quantized stream is the input of each block of the quantized model, the fp stream that of the original."""
    model = toy()
    quantized, fp = Stream(model, [ids()]), Stream(model, [ids()])
    untouched = toy()
    for i, block in enumerate(model.blocks):
        for stream, reference in ((quantized, model), (fp, untouched)):
            states = list(reference.hidden_states(ids()))
            torch.testing.assert_close(torch.cat(stream.inputs), states[i], atol=1e-5, rtol=0)
        fp.advance(untouched.blocks[i])
        for role in ROLES:
            getattr(block, role).weight.data.mul_(0.9)
        quantized.advance(block)


def test_hessian_is_of_the_partly_quantized_block():
    """With stream=quantized a site's statistics see the linears before it quantized; with stream=fp they do not."""
    first, second = toy(), toy()
    from_quantized = run(first, GPTQ_METHOD, bits(2))
    from_fp = run(second, Method("gptq", GPTQ(stream="fp")), bits(2))
    same = [
        row.name
        for row in from_quantized.linears
        if torch.equal(linears(first)[row.name].weight, linears(second)[row.name].weight)
    ]
    assert same == ["blocks.0.q", "blocks.0.k", "blocks.0.v"]  # nothing before these is quantized
    x = Stream(first, [ids()])
    for i, block in enumerate(first.blocks):
        stats = x.collect(block, {"mlp_out": frozenset({"hessian"})}, keep_outputs=True)
        x.advance(block)
        row = next(r for r in from_quantized.linears if r.name == f"blocks.{i}.down")
        w, h = toy().blocks[i].down.weight, stats["mlp_out"]["hessian"]
        change = block.down.weight - w
        measured = ((change @ h) * change).sum() / ((w @ h) * w).sum()
        assert row.output_error == pytest.approx(measured.item(), rel=1e-3)
    assert len(from_fp.linears) == len(from_quantized.linears)


def test_output_error_is_that_of_the_linear():
    model, original = toy(), toy()
    report = run(model, GPTQ_METHOD, bits(2))
    with torch.no_grad():
        x = original.blocks[0].attn_norm(original.embed(ids())).flatten(0, 1)
        w, wq = original.blocks[0].v.weight, model.blocks[0].v.weight
        expected = ((x @ (wq - w).T).square().sum() / (x @ w.T).square().sum()).item()
    row = next(r for r in report.linears if r.name == "blocks.0.v")
    assert row.output_error == pytest.approx(expected, rel=1e-4)
    assert row.weight_error == pytest.approx(((wq - w).square().sum() / w.square().sum()).item(), rel=1e-4)


def test_calibration_attention_is_bidirectional_and_hooks_are_gone():
    model = toy()
    changed = ids(1)
    changed[0, -1] = (changed[0, -1] + 1) % 90
    a, b = Stream(model, [ids(1)]), Stream(model, [changed])
    a.advance(model.blocks[0])
    b.advance(model.blocks[0])
    assert (a.inputs[0][0, 0] - b.inputs[0][0, 0]).abs().max() > 1e-4  # the first token sees the last
    run(model, GPTQ_METHOD, bits(3))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activations_are_quantized_where_bits_say_so():
    weight_only, both = toy(), toy()
    run(weight_only, RTN_METHOD, bits(4), [])
    run(both, RTN_METHOD, bits(4, 4), [])
    for name, linear in linears(both).items():
        assert torch.equal(linear.weight, linears(weight_only)[name].weight)
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
        seen = PerToken()(x, ActivationBits(4))
        torch.testing.assert_close(linear(x), torch.nn.functional.linear(seen, linear.weight, linear.bias))
        assert not torch.equal(linear(x), linears(weight_only)[name](x))
    only_activations = toy()
    report = run(only_activations, Method("acts", None, PerToken()), bits(16, 4), [])
    assert report.average_bits == 16
    assert all(isinstance(linear, QuantLinear) for linear in linears(only_activations).values())
    assert torch.equal(only_activations.blocks[0].q.weight, toy().blocks[0].q.weight)
    with pytest.raises(ValueError, match="no codes"):
        only_activations.blocks[0].q.codes()


def test_rounding_by_role():
    method = replace(GPTQ_METHOD, rounding_by_role={"down": RTN(), "q": None})
    model, original = toy(), toy()
    report = run(model, method, bits(4, 8))
    assert {(row.role, row.rounding) for row in report.linears} == {
        ("q", None),
        ("k", "GPTQ"),
        ("v", "GPTQ"),
        ("o", "GPTQ"),
        ("gate", "GPTQ"),
        ("up", "GPTQ"),
        ("down", "RTN"),
    }
    assert isinstance(model.blocks[0].q, torch.nn.Linear)
    assert torch.equal(model.blocks[0].q.weight, original.blocks[0].q.weight)
    assert [row.bits for row in report.linears if row.role == "q"] == [16, 16, 16]
    assert [(r.count, r.reason) for r in report.kept if r.name == "blocks.*.q.weight"] == [
        (3, "method.rounding_by_role.q is null")
    ]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group_size", "rounding"), [(32, RTN()), (-1, RTN()), (32, GPTQ(act_order=True))], ids=str)
def test_average_bits_are_those_of_the_stored_tensors(group_size, rounding, symmetric):
    model = toy()
    report = run(model, Method("m", rounding), bits(3, 16, group_size, symmetric))
    total = weights = 0
    for linear in linears(model).values():
        weights += linear.weight.numel()
        total += (
            3 * linear.codes().numel() + 16 * linear.scale.numel() + (0 if symmetric else 3 * linear.zero_point.numel())
        )
        if linear.group_index.diff().min() < 0:  # act_order: the groups of the inputs have to be stored as well
            total += 16 * linear.group_index.numel()
    assert report.average_bits == pytest.approx(total / weights)
    rounded = rtn_round(torch.ones(64, 256), Grid(4), 128)
    assert stored_bits((64, 256), WeightBits(4), rounded) / rounded.codes.numel() == 4 + 20 / 128
    assert stored_bits((64, 256), WeightBits(4)) / rounded.codes.numel() == 16


def test_report_is_json_and_names_everything():
    report = run(toy(), Method("gptq", GPTQ(act_order=True)), bits(3), seed=7)
    record = json.loads(json.dumps(report.to_dict()))
    assert record["seed"] == 7
    assert record["method"] == "gptq"
    assert record["calibration_sequences"] == 6
    assert record["calibration_tokens"] == 6 * 24
    assert len(record["linears"]) == 21
    row = record["linears"][4]
    assert (row["name"], row["role"], row["shape"]) == ("blocks.0.gate", "gate", [160, 64])
    assert (row["bits"], row["group_size"], row["symmetric"], row["rounding"]) == (3, 32, False, "GPTQ")
    assert 3 < record["average_bits"] < 4


def test_departures_are_in_the_report():
    model = toy()
    with torch.no_grad():  # identical tokens: a Hessian of rank one, which no damping keeps from being factored
        model.embed.weight[:] = model.embed.weight[0]
    report = run(model, Method("gptq", GPTQ(damping=0.0)), bits(4))
    assert any(note.startswith("blocks.0.q: Cholesky failed") for note in report.notes)
    assert report.to_dict()["notes"] == report.notes


def test_broken_inputs_stop_with_a_place():
    with pytest.raises(ValueError, match="at least one calibration batch"):
        run(toy(), GPTQ_METHOD, bits(4), [])
    model = toy()
    model.blocks[1].up.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.up\.weight"):
        run(model, RTN_METHOD, bits(4), [])
    model = toy()
    model.blocks[0].up.weight.data.mul_(1e30)
    with pytest.raises(ValueError, match=r"blocks\.0, down: the Hessian holds NaN or infinity"):
        run(model, GPTQ_METHOD, bits(4))
    model = toy()
    run(model, RTN_METHOD, bits(4), [])
    with pytest.raises(ValueError, match="quantized already"):
        run(model, RTN_METHOD, bits(4), [])
    with pytest.raises(ValueError, match="does not divide"):
        run(toy(), RTN_METHOD, bits(4, group_size=128), [])


DREAM_7B = replace(TOY, hidden_size=3584, mlp_size=18944, n_blocks=28, n_heads=28, n_kv_heads=4)


def test_group_size_message():
    assert RTN_METHOD.problems(bits(4, group_size=1024), DREAM_7B) == [
        "bits.weight.group_size=1024 does not divide 3584, the inputs of q, k, v, o, gate, up (28 blocks); "
        "512, 256, 128 and -1 do",
        "bits.weight.group_size=1024 does not divide 18944, the inputs of down (28 blocks); 512, 256, 128 and -1 do",
    ]
    for size in (512, 128, 7, -1):
        assert RTN_METHOD.problems(bits(4, group_size=size), replace(DREAM_7B, mlp_size=3584 * 2)) == []
    for size in (0, -2):
        (problem,) = RTN_METHOD.problems(bits(4, group_size=size), DREAM_7B)
        assert "512, 256, 128 and -1 do" in problem
    assert RTN_METHOD.problems(bits(16, 8, group_size=1000), DREAM_7B) == []  # no weight is grouped


@pytest.mark.parametrize(
    ("method", "setting", "parts"),
    [
        (FP16, bits(4), ["fp16 quantizes nothing; bits must be w16a16"]),
        (FP16, bits(16, 8), ["fp16 quantizes nothing"]),
        (Method("gptq", GPTQ()), bits(4, 4), ["bits.activation.bits=4", "weights only", "bits=w4a16"]),
        (Method("acts", None, PerToken()), bits(4, 4), ["bits.weight.bits=4", "rounds no weights"]),
        (RTN_METHOD, bits(9), ["bits.weight.bits=9", "16 (not quantized)"]),
        (RTN_METHOD, bits(1), ["bits.weight.bits=1"]),
        (RTN_METHOD, bits(4, 3 + 8), ["bits.activation.bits=11"]),
        (
            replace(RTN_METHOD, quantizes="everything"),
            bits(4),
            ["method.quantizes=everything", "weights_and_activations"],
        ),
        (Method("m", RTN(), quantizes="weights_and_activations"), bits(4), ["needs an activation part"]),
        (replace(RTN_METHOD, rounding_by_role={"ff_out": RTN()}), bits(4), ["ff_out", "q, k, v, o, gate, up, down"]),
        (replace(RTN_METHOD, rounding_by_role={"o": GPTQ(chunk=0)}), bits(4), ["method.rounding_by_role.o.chunk=0"]),
        (Method("gptq", GPTQ(damping=3)), bits(4), ["method.rounding.damping=3"]),
        (Method("rtn", RTN(), PerToken(clip_ratio=2)), bits(4), ["method.activation.clip_ratio=2"]),
    ],
)
def test_impossible_settings(method, setting, parts):
    (problem,) = method.problems(setting, TOY)
    assert all(part in problem for part in parts), problem


def test_all_problems_at_once():
    found = Method("gptq", GPTQ(chunk=-1)).problems(bits(11, 4, group_size=100), TOY)
    assert len(found) == 5  # chunk, weight bits, weight-only, and the group size against both widths


def test_which_methods_need_data():
    assert not RTN_METHOD.needs_data
    assert not FP16.needs_data
    assert GPTQ_METHOD.needs_data
    assert replace(RTN_METHOD, rounding_by_role={"down": GPTQ()}).needs_data
    assert replace(GPTQ_METHOD, rounding_by_role={"down": GPTQ(stream="fp")}).streams() == {"quantized", "fp"}


@pytest.mark.parametrize(
    "batches",
    [ids(), [ids()], list(ids()), ids().tolist(), [ids()[:1], ids()[1].int(), Batch(ids()[2:])]],
    ids=["tensor", "list", "rows", "lists", "mixed"],
)
@torch.no_grad()
def test_token_ids_calibrate_as_batches_do(batches):
    model, expected = toy(), toy()
    assert run(model, GPTQ_METHOD, bits(3), batches).calibration_tokens == ids().numel()
    run(expected, GPTQ_METHOD, bits(3))
    assert torch.equal(model(ids(2)), expected(ids(2)))


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ("a text", r"batches\[0\] is of type str; calibration takes token ids"),
        ([ids(), torch.randn(2, 8)], r"batches\[1\] is of type torch\.float32 tensor \[2, 8\]"),
        ([1, 2, 3], r"batches\[0\] is of type int"),
        (ids() + 500, "the calibration text: 5[0-9]+ is no token of the model; ids go from 0 to 95"),
        (ids() - 96, "the calibration text: -96 is no token of the model"),
        ([], "give at least one calibration batch"),
    ],
    ids=["text", "floats", "flat", "foreign", "negative", "none"],
)
def test_what_is_no_calibration_text_is_told(batches, told):
    with pytest.raises(ValueError, match=told):
        run(toy(), GPTQ_METHOD, bits(3), batches)


def test_a_report_is_short_to_look_at():
    report = run(toy(), GPTQ_METHOD, bits(3))
    assert repr(report) == f"QuantReport(gptq w3a16: 21 linears, {report.average_bits:.2f} bits per weight)"
    table = report._repr_html_()
    assert table.count("<tr>") == 8
    assert "<td>down</td><td>3</td><td>3</td><td>16</td>" in table
