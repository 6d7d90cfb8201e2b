"""Rounded weights on disk: at their true width, equal to the bit when they are read, and refused where damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PLAIN, Batch, ids, random_model
from torch import nn

from dqx.config.compose import build, select
from dqx.formats.bits import WeightBits
from dqx.formats.integers import Grid, bit_patterns
from dqx.models.checkpoint import CheckpointError
from dqx.quant import load_quantized, quantize, save_quantized
from dqx.quant.checkpoint.folder import read_recipe
from dqx.quant.checkpoint.packed_linear import UNPACKED, packed
from dqx.quant.checkpoint.packing import pack, packed_size, unpack
from dqx.quant.linear import QuantLinear
from dqx.quant.rounding.rtn import rtn_round
from dqx.study.estimate.memory import quantized_bytes

WIDE = replace(PLAIN, hidden_size=256, mlp_size=512, n_blocks=1)
BLOCK = "block-00000.safetensors"


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_come_back_from_bytes(bits):
    for count in (0, 1, 7, 8, 1001):
        numbers = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
        there = pack(numbers, bits)
        assert len(there) == packed_size(count, bits) == -(-count * bits // 8)
        assert torch.equal(unpack(there, bits, count), numbers)
        stream = int.from_bytes(bytes(there.tolist()), "little")
        assert [stream >> i * bits & 2**bits - 1 for i in range(count)] == numbers.tolist()


def test_where_bits_lie():
    numbers = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    assert pack(numbers, 3).tolist() == [0b11_010_001, 0b0_101_100_0, 0b000_111_11]


def test_another_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="8 numbers of 3 bits take 3 bytes, and there are 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3, 8)


def saved(tmp_path, method="rtn", bits="w4a16", *overrides, dtype=torch.bfloat16, arch=WIDE):
    """Model, report and folder."""
    config = select(method=method, bits=bits, overrides=["model=nano_llada", *overrides])
    model, part = random_model(arch).to(dtype), build(config.method)
    batches = [Batch(ids())] if part.needs_data else []
    report = quantize(model, part, config.bits, batches, progress=False)
    save_quantized(model, report, tmp_path / "saved", method=part, bits=config.bits)
    return model, report, tmp_path / "saved", (part, config.bits)


HALF = "bits.weight.scale_dtype=float16"
SIZES = {
    **{f"int {b}": ("rtn", "w4a16", f"bits.weight.bits={b}") for b in range(2, 9)},
    "int 3, float16 scales": ("rtn", "w3a16", HALF),
    "int 4, symmetric": ("rtn", "w4a16", "bits.weight.symmetric=true"),
    "scattered groups": ("gptq", "w3a16", "bits.weight.group_size=64", "method.rounding.act_order=true"),
    "fp8": ("rtn", "fp8"),
    "mxfp4": ("rtn", "mxfp4"),
    "nvfp4": ("rtn", "nvfp4"),
    "gguf q4_0": ("rtn", "gguf_q4_0"),
    "gguf q4_1": ("rtn", "gguf_q4_1"),
    "gguf q2_k": ("rtn", "gguf_q2_k"),
    "gguf q4_k": ("rtn", "gguf_q4_k"),
    "gguf q6_k": ("rtn", "gguf_q6_k"),
    "dual scales": ("d2quant", "w2a16"),
    "sums of signs": ("quant_dllm", "w2a16"),
}


@pytest.mark.parametrize("case", SIZES)
@torch.no_grad()
def test_files_are_as_large_as_the_record_says(case, tmp_path):
    """Codes and grids take what the report counts, and 16 bits more for each scale that is float32."""
    model, report, folder, _ = saved(tmp_path, *SIZES[case])
    assert_loads(model, folder)
    tensors = load_file(folder / BLOCK)
    wide = sum(x.numel() for name, x in tensors.items() if "scale" in name and x.dtype == torch.float32)
    counted = sum(row.stored_bits for row in report.linears) / 8 + 2 * wide
    linears = {f"{role}." for role in WIDE.roles}
    taken = sum(x.nbytes for name, x in tensors.items() if name.startswith(tuple(linears)) and "activation" not in name)
    assert taken == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("case", ["int 2", "int 5", "scattered groups", "fp8", "nvfp4", "gguf q4_k", "dual scales"])
def test_the_size_is_known_before(case, tmp_path):
    _, _, folder, asked = saved(tmp_path, *SIZES[case])
    size = sum(entry["bytes"] for entry in read_recipe(folder)["shards"].values())
    assert quantized_bytes(WIDE, torch.bfloat16, *asked) == pytest.approx(size, rel=0.1)


def assert_loads(model, folder):
    again, _ = load_quantized(folder)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        assert torch.equal(bit_patterns(x), bit_patterns(b[name])) if x.is_floating_point() else torch.equal(x, b[name])


def linear_of(weight, grid, dtype, group_size=32):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    return QuantLinear(linear, WeightBits(grid.bits, group_size), rtn_round(weight, grid, group_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_codes_are_exact_where_the_dtype_hides_the_nearest(bits, dtype):
    """Lopsided groups of 8 bits in bfloat16, whose nearest codes are off by one; values next to float16's smallest."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for w in (weight, weight.abs() + 0.01, weight * 2.0**-20):
        linear = linear_of(w, Grid(bits), dtype)
        codes = linear.exact_codes()
        values = linear.grid.dequantize(codes, *linear._at_inputs()).to(dtype)
        assert torch.equal(bit_patterns(values), bit_patterns(linear.weight))
    if (bits, dtype) == (8, torch.bfloat16):
        linear = linear_of(weight.abs() + 0.01, Grid(8), dtype)
        assert not torch.equal(linear.codes(), linear.exact_codes())


def test_a_changed_weight_has_no_codes():
    linear = linear_of(torch.randn(8, 64), Grid(4), torch.float32)
    assert packed(linear) is not None
    linear.weight[3, 5] += 0.01
    assert linear.exact_codes() is None
    assert packed(linear) is None


@torch.no_grad()
def test_what_cannot_be_packed_is_stored_as_it_is_and_told(tmp_path, caplog):
    model, config = random_model(WIDE), select(method="rtn", bits="w4a16", overrides=["model=nano_llada"])
    method = build(config.method)
    report = quantize(model, method, config.bits, progress=False)
    model.blocks[0].up.weight[0, 0] += 0.5
    save_quantized(model, report, tmp_path / "saved", method=method, bits=config.bits)
    assert "blocks.0: up stored at full width: not all of its weights are values of its grid" in caplog.text
    assert read_recipe(tmp_path / "saved")["shards"][BLOCK]["unpacked"] == {"up": UNPACKED}
    assert_loads(model, tmp_path / "saved")


def change(folder, edit):
    """Let `edit` change tensors and structure of the block's file."""
    from safetensors import safe_open

    tensors = load_file(folder / BLOCK)
    with safe_open(folder / BLOCK, framework="pt") as f:
        structure = json.loads(f.metadata()["structure"])
    edit(tensors, structure)
    save_file(tensors, folder / BLOCK, metadata={"structure": json.dumps(structure)})


DAMAGES = {
    "codes too few": (lambda t, s: t.update({"q.codes": t["q.codes"][:-1].clone()}), "q cannot be built.* take"),
    "codes missing": (lambda t, s: t.pop("q.codes"), r"tensor q\.codes is missing"),
    "scale of another shape": (lambda t, s: t.update({"q.scale": t["q.scale"][1:].clone()}), "its scale has shape"),
    "zero points too few": (
        lambda t, s: t.update({"q.zero_point": t["q.zero_point"][1:].clone()}),
        "numbers of 4 bits",
    ),
    "an unknown dtype": (lambda t, s: s["q"].update(dtype="load"), "load is no type of weights"),
    "no grid": (lambda t, s: s["q"].update(grid=None), "its grid is None"),
    "17 bits": (lambda t, s: s["q"]["grid"].update(bits=17), "no codes of 1 to 8 bits"),
    "no inputs per group": (lambda t, s: s["q"].update(group_index=0), "group_size=0"),
    "too many groups": (lambda t, s: s["q"].update(group_index=32), "one of 2 groups"),
    "an option missing": (lambda t, s: s["q"].pop("inputs"), "q cannot be built from it"),
    "no kind": (lambda t, s: s["q"].pop("kind"), "q cannot be built from it"),
    "a norm missing": (lambda t, s: t.pop("attn_norm.weight"), r"attn_norm\.weight missing"),
    "a norm of another size": (
        lambda t, s: t.update({"attn_norm.weight": torch.ones(3)}),
        r"attn_norm\.weight has shape",
    ),
    "a stranger": (lambda t, s: t.update({"stranger.weight": torch.ones(3)}), "no place for"),
    "another shape": (lambda t, s: s["q"].update(outputs=128, inputs=512), "q "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage, tmp_path):
    _, _, folder, _ = saved(tmp_path)
    edit, told = DAMAGES[damage]
    change(folder, edit)
    with pytest.raises(CheckpointError, match=told):
        load_quantized(folder, verify=False)


def test_a_folder_without_embedding_is_refused(tmp_path):
    _, _, folder, _ = saved(tmp_path)
    for name, tensor in (("embed", "embed.weight"), ("head", "norm.weight"), ("head", "head.weight")):
        path = folder / f"{name}.safetensors"
        whole = load_file(path)
        save_file({n: t for n, t in whole.items() if n != tensor}, path, metadata={"structure": "null"})
        with pytest.raises(CheckpointError, match=f"{tensor} missing"):
            load_quantized(folder, verify=False)
        save_file(whole, path, metadata={"structure": "null"})


def test_memory_that_weights_take_is_told(tmp_path):
    model, _, folder, _ = saved(tmp_path)
    shards = read_recipe(folder)["shards"]
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    told = sum(entry.get("bytes_in_memory", entry["bytes"]) for entry in shards.values())
    assert told == pytest.approx(own, rel=0.01)
    assert shards[BLOCK]["bytes"] < shards[BLOCK]["bytes_in_memory"] / 3
