"""The benchmark's transcriptions against the official vectors, and both of its sides against each other."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from goldens import GOLDEN, golden, tiny
from rich.console import Console
from tiny import SITES

from dqx.benchmarks import activations, blocks, evaluate, plain, quantize, temperature, throughput
from dqx.benchmarks.cases import MODELS, make_case, scaled
from dqx.benchmarks.sides import BITS, SETTINGS, SIDES, SideRun, compare, differences
from dqx.config import compose
from dqx.report.terminal import rendered

SMALL = {"hidden_size": 256, "mlp_size": 384}  # heads as wide as the real ones


def case(model, n_kv_heads):
    arch = replace(MODELS[model], n_heads=2, n_kv_heads=n_kv_heads, **SMALL)
    return make_case(arch, 192, length=64)


@pytest.mark.parametrize("name", ["w4_g32_noact_asym", "w3_g32_noact_asym", "w2_g32_noact_asym"])
def test_plain_gptq_is_the_official_one(name):
    data = golden("gptq_asym")
    (settings,) = [c for c in json.loads((GOLDEN / "gptq.json").read_text())["cases"] if c["name"] == name]
    x = data["inputs"].flatten(0, 1)
    ours = plain.gptq(data["weight"], x, settings["bits"], settings["group_size"], chunk=settings["blocksize"])
    assert (ours.codes != data[f"{name}.codes"]).float().mean() < 1e-3
    torch.testing.assert_close(ours.scale, data[f"{name}.scale"])


@pytest.mark.parametrize("name", ["b16_s256", "b32_s16"])
def test_plain_duquant_is_the_official_one(name):
    data = golden("duquant_linear")
    first, second = data[f"{name}.base_rots"]
    rotation = plain.duquant(data["x"], (first, second), int(name.split("_s")[1]), by_row=True)
    assert [rotation[0].channels, rotation[2].channels] == [data[f"{name}.exchange_ids.{i}"].tolist() for i in (0, 1)]
    assert torch.equal(rotation[1], data[f"{name}.perm"][0])
    torch.testing.assert_close(plain.duquant_apply(data["weight"], rotation), data[f"{name}.w_rotated"])


def test_plain_awq_is_the_official_one():
    """The scales of two of the four groups, and the thresholds of the linear that those scales leave alone."""
    block = tiny("llada").blocks[1]
    data = golden("awq_llada_submodule_search_w3")
    hidden = golden("awq_llada_inputs")["hidden_states"]
    inputs = {}
    hooks = [
        getattr(block, SITES[site][0]).register_forward_pre_hook(lambda _, args, s=site: inputs.update({s: args[0]}))
        for site in SITES
    ]
    rope = tiny("llada").context(torch.zeros(1, hidden.shape[1], dtype=torch.long))[0]
    with torch.no_grad():
        block(hidden, rope)
    for hook in hooks:
        hook.remove()
    scales = {}
    for i, (site, judge) in enumerate({"attn_out": block.o, "mlp_in": block.mlp, "mlp_out": block.down}.items(), 1):
        linears = [getattr(block, role) for role in SITES[site]]
        scales[site], losses = plain.awq_scale(linears, inputs[site], judge, 3, 32)
        torch.testing.assert_close(scales[site], data[f"scale.{i}"])
        assert losses == pytest.approx(data[f"scale_losses.{i}"].tolist(), rel=1e-4)
    weight = block.gate.weight * scales["mlp_in"]
    x = (inputs["mlp_in"] / scales["mlp_in"]).flatten(0, 1)
    for matmul in (False, True):
        limits = plain.awq_clip(weight[:64], x, 3, 32, matmul=matmul)
        assert ((limits - data["clip.ff_proj"][:64]).abs() > 1e-5).float().mean() < 0.04


@pytest.mark.parametrize(("model", "n_kv_heads"), [("llada_8b", 2), ("dream_7b", 1)])
@pytest.mark.parametrize("method", SIDES)
def test_both_sides_agree(method, model, n_kv_heads):
    shorter = ["method.transforms.rotate.steps=40"] if method == "duquant" else []
    choice = compose.select(method=method, bits=BITS[method], overrides=[*SETTINGS[method], *shorter])
    start = case(model, n_kv_heads)
    theirs, ours = (SideRun(copy.deepcopy(start), compose.build(choice.method), choice.bits) for _ in range(2))
    for side, job in zip(SIDES[method], (theirs, ours), strict=True):
        side(job)
        assert job.seconds
    if method == "duquant":
        ours = SideRun(copy.deepcopy(start), ours.method, ours.bits)
    distance = compare(method, ours, theirs.tensors)
    # AWQ's thresholds: a symmetric clamp leaves weights half way between codes, so the last bit decides between two
    assert distance["codes"] < (0.02 if method == "awq" else 2e-3)
    assert distance["scale"] < (0.04 if method == "awq" else 2e-3)
    assert distance.get("channel_scale", 0) == distance.get("channels", 0) == distance.get("order", 0) == 0
    assert distance.get("matrix", 0) < 1e-4
    assert set(theirs.tensors) >= {f"codes.{role}" for roles in SITES.values() for role in roles}


def test_parts_are_put_beside_gptq():
    """Each is a method that can be asked for; two of them run, on a 16th of the widths."""
    every = quantize.PARTS | quantize.IN_FORWARDS
    for method, bits, settings in every.values():
        choice = compose.select(method=method, bits=bits, overrides=settings)
        assert compose.build(choice.method).problems(choice.bits, MODELS["llada_8b"]) == []
    asked = ["gptq", "kv per_head"]
    args = quantize.arguments(["--model", "llada_8b", "--parts", ",".join(asked), "--scale", "16", "--tokens", "512"])
    threads = torch.get_num_threads()
    figures = {name: quantize._part(name, args, print) for name in asked}
    torch.set_num_threads(threads)
    assert all(own["seconds"] > 0 for own in figures.values())
    assert [row[0].text for row in quantize.overview_of_parts(figures, args).rows] == asked


def test_differences_are_seen():
    codes, scale = torch.zeros(10, 10, dtype=torch.uint8), torch.ones(10, 1)
    theirs = {"codes.q": codes, "scale.q": scale, "channels.attn_in.0": torch.tensor([1, 2])}
    ours = {"codes.q": codes.clone(), "scale.q": scale.clone(), "channels.attn_in.0": torch.tensor([1])}
    ours["codes.q"][0, 0] = 1
    ours["scale.q"][:5] *= 1.001
    assert differences(theirs, ours) == {"codes": 0.01, "scale": 0.5, "channels": 1}
    assert differences(theirs, theirs) == {"codes": 0, "scale": 0, "channels": 0}


def test_cases_have_the_real_shapes_and_planted_outliers():
    dream = MODELS["dream_7b"]
    assert (dream.in_features("down"), dream.out_features("k"), dream.qkv_bias) == (18944, 512, True)
    assert scaled(dream, 4).mlp_size == 4736
    with pytest.raises(ValueError, match="scale=3 leaves no whole groups"):
        scaled(dream, 3)
    small = case("dream_7b", 1)
    inputs = small.site_inputs()
    assert {site: tuple(x.shape) for site, x in inputs.items()} == {
        "attn_in": (3, 64, 256), "attn_out": (3, 64, 256), "mlp_in": (3, 64, 256), "mlp_out": (3, 64, 384)
    }  # fmt: skip
    channels = inputs["attn_in"].abs().mean((0, 1))
    assert (channels.sort().values[-8:] > 5 * channels.median()).all()
    assert inputs["mlp_out"].abs().max() > 100 * inputs["mlp_out"].abs().median()


def test_command_line(capsys):
    for wrong, said in (
        (["--model", "llama"], "llama is unknown; there are dream_7b, "),
        (["--parts", "gptq,awq"], "awq is unknown"),
        (["--methods", "gptq,rtn"], "rtn is unknown"),
        (["--tokens", "100"], "multiple of 512"),
        (["--scale", "3"], "scale=3"),
        (["--threads", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            quantize.arguments(wrong)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("program", [activations, blocks, evaluate, temperature, throughput])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [("--scale=3", "scale=3 leaves no whole groups"), ("--scale=0", "scale=0"), ("--blocks=0", "must be at least 1")],
)
def test_all_check_their_arguments_alike(program, wrong, said, capsys):
    with pytest.raises(SystemExit):
        program.main([wrong])
    assert said in capsys.readouterr().err


def test_table():
    seconds = {"plain": {"scale search": 3.0, "clip": 5.0}, "dqx": {"scale search": 1.5, "clip": 0.5}}
    memory = {"plain": 900.0, "dqx": 700.0}
    row = quantize.Figures("dream_7b", "awq", "w4a16", 2048, 1, 1, 28, seconds, memory, memory, {"codes": 0.00123})
    row.aside = {"clip": 1.0}
    console = Console(width=130, record=True)
    console.print(rendered(quantize.overview([row])))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[-3][:6] == ["dream_7b", "awq", "w4a16", "8.00", "2.00", "4.00"]
    assert lines[-3][6:] == ["0.123", "%", "900", "700", "0.06", "0.02"]
    assert lines[-1] == ["clip", "5.00", "0.50", "10.00"]
    assert any("4.00 s in all, and the ratio is 2.00" in line for line in quantize.notes([row]))


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    """Both processes, the table and the file."""
    file = tmp_path / "figures.json"
    quantize.main(["--model", "llada_8b", "--methods", "gptq", "--scale", "32", "--tokens", "512", "--json", str(file)])
    (figures,) = json.loads(file.read_text())
    assert figures["seconds_per_model"]["dqx"] == pytest.approx(32 * figures["seconds"]["dqx"]["rounding"])
    assert figures["differences"]["codes"] < 0.01
    assert "llada_8b" in capsys.readouterr().out


def test_cost_of_outlier_statistics_is_put_beside_a_document():
    arch = replace(
        MODELS["llada_8b"], n_blocks=2, n_heads=2, n_kv_heads=2, vocab_size=1001, mask_token_id=1000, **SMALL
    )
    figures = activations.compare(arch, window=16, prompt=8, gen_length=4, steps=4)
    assert min(figures.document, figures.windows, figures.states, figures.windows_metered) > 0
    assert figures.share(8) == pytest.approx(figures.share(1) / 8)
    assert len(activations.overview(figures).rows) == 3 + len(activations.DOCUMENTS)


def test_cost_of_drawing_tokens_is_put_beside_a_step_that_draws_none():
    arch = replace(
        MODELS["llada_8b"], n_blocks=1, n_heads=2, n_kv_heads=2, vocab_size=1001, mask_token_id=1000, **SMALL
    )
    figures = temperature.compare(arch, rows=2, prompt=4, gen_length=8, steps=4, temperature=0.7, rounds=2)
    assert {t: len(rounds) for t, rounds in figures.steps.items()} == {0.0: 2, 0.7: 2}
    assert figures.looked_at == 2 * (8 + 6 + 4 + 2) / 4
    assert min(*figures.steps[0.0], *figures.steps[0.7], figures.uniforms) > 0
    assert [row[0].text for row in temperature.overview(figures).rows] == [
        "temperature 0", "temperature 0.7", "more", "uniforms of one position",
    ]  # fmt: skip
