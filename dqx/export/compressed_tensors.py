"""Models as compressed-tensors: true widths on disk, read by transformers and by engines for Qwen2 and Llama.

A folder with `config.json`, safetensors and tokenizer, without code. Dream's body is Qwen2's and LLaDA's is Llama's, so
they are written as these, under Qwen2's names of tensors (Llama's are the same), with `is_causal: false`.

Of a linear `q_proj`, O = outputs, I = inputs, G = groups per row, b = bits:

    pack-quantized     weight_packed int32 [O, I b / 32], lowest bits first; weight_scale [O, G]; weight_shape [2];
                       weight_zero_point int32 [O b / 32, G], packed along outputs, of asymmetric grids
    int-quantized      weight int8 [O, I]; weight_scale [O, 1]; weight_zero_point int8 [O, 1] of asymmetric grids
    float-quantized    weight E4M3 [O, I]; weight_scale [O, 1]

Scales are stored in the model's dtype where that holds them to the bit, else in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqx.api import DiffusionLM
from dqx.export.weights import (
    copy_tokenizer,
    held_architecture,
    leave_out_code,
    linears,
    rounds_input,
    run_time_problems,
)
from dqx.formats.bits import ActivationBits
from dqx.models.architecture import Architecture
from dqx.models.checkpoint import save_tensors, tensor_names
from dqx.models.families import dream
from dqx.quant.activation import PerToken
from dqx.quant.checkpoint.folder import new_folder
from dqx.quant.linear import QuantLinear

INSTEAD = "export dequantized, which holds every model whose function lies in its weights"
#: Widths of packed codes that do not lie across words, which versions of the package before 0.20 read alike.
PACKED_WIDTHS = (2, 4, 8)
FORMATS = ("int", "fp8")
#: Roles that engines multiply in one product, with one grid for all.
FUSED = (("q", "k", "v"), ("gate", "up"))


@dataclass(frozen=True)
class Known:
    """A class of transformers that computes what a family does once it is told that attention is not causal."""

    model_type: str
    architecture: str


KNOWN = {"dream": Known("qwen2", "Qwen2ForCausalLM"), "llada": Known("llama", "LlamaForCausalLM")}


def problems(lm: DiffusionLM) -> list[str]:
    """Why the format, or what reads it, cannot hold the model, each with what to use instead."""
    problems = [*_family_problems(lm.model.arch), *run_time_problems(lm)]
    if find_spec("compressed_tensors") is None:
        problems.append("the package compressed-tensors is missing; pip install 'dqx[export]'")
    if lm.model.unfinished:
        return problems
    rounded = dict(_rounded(lm))
    told: dict[str, list[str]] = {}
    for name, _, module in linears(lm.model):
        found = _linear_problems(rounded[name]) if name in rounded else _kept_problems(module)
        for problem in found:
            told.setdefault(problem, []).append(name)
    problems += [f"{names[0]}{_more(names)}: {problem}" for problem, names in told.items()]
    return [*problems, *_joint_problems(lm, rounded)]


def notes(lm: DiffusionLM) -> list[str]:
    """What readers of the folder have to be told, or do differently than the simulation."""
    linear = next(linear for _, linear in _rounded(lm))
    notes = []
    if not rounds_input(linear):
        notes.append(
            "transformers: from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))"
        )
    elif _other_steps(linear.activation_bits):
        notes.append(
            "readers round inputs in steps of absmax / 127.5, this model in steps of absmax / 127: logits differ; with "
            "bits.activation.full_range=true they are rounded alike"
        )
    if _stored_scale(linear, lm.model.dtype).dtype != lm.model.dtype:
        notes.append(f"scales are float32; an engine that keeps them in {_name(lm.model.dtype)} rounds them once more")
    return notes


def _other_steps(bits: ActivationBits) -> bool:
    return bits.symmetric and bits.format == "int" and not bits.full_range


def write(lm: DiffusionLM, out: Path) -> None:
    """Write the folder, whole or not at all. Raises ValueError where it exists."""
    with new_folder(Path(out)) as folder:
        save_tensors(_tensors(lm), _config(lm), folder)
        copy_tokenizer(lm, folder)
        leave_out_code(folder)


def _family_problems(arch: Architecture) -> Iterator[str]:
    if arch.attention.block is not None:
        yield (
            f"{arch.family} attends block by block, and the classes of transformers attend to all tokens or to those "
            f"before; {INSTEAD}"
        )
    elif arch.family not in KNOWN:
        yield f"no class of transformers is known that computes what {arch.family} does; {INSTEAD}"
    elif arch.qkv_bias and arch.family == "llada":
        yield f"q, k and v have a bias, and Llama's have one only where o has one too; {INSTEAD}"


def _rounded(lm: DiffusionLM) -> Iterator[tuple[str, QuantLinear]]:
    for name, _, module in linears(lm.model):
        if isinstance(module, QuantLinear) and module.scale is not None:
            yield name, module


def _kept_problems(module: nn.Module) -> Iterator[str]:
    if rounds_input(module):
        yield f"its input is rounded and its weight is not, for which the format has no kernel; {INSTEAD}"


def _linear_problems(linear: QuantLinear) -> Iterator[str]:
    """Why the format cannot hold the grids of a linear."""
    bits = linear.weight_bits
    assert linear.grid is not None
    assert linear.group_index is not None
    assert linear.scale is not None
    if linear.column_scale is not None or linear.scale.dim() > 2:
        yield f"its weight is a sum of signs or has scales of its inputs (a {type(linear.grid).__name__}); {INSTEAD}"
        return
    if bits.format not in FORMATS:
        known = ", ".join(FORMATS)
        yield f"bits.weight.format={bits.format} is not written, only {known}; write bits=w4a16 or bits=fp8"
        return
    groups = linear.scale.shape[1]
    if not torch.equal(linear.group_index.cpu(), torch.arange(linear.in_features) // (linear.in_features // groups)):
        yield (
            f"its {linear.in_features} inputs are not {groups} groups of neighbours of one size; write "
            "method.rounding.static_groups=true, or method.rounding.act_order=false"
        )
    if bits.format == "fp8" and groups > 1:
        yield "fp8 is read with one scale per row; write bits.weight.group_size=-1"
    if bits.format == "int" and not rounds_input(linear) and bits.bits not in PACKED_WIDTHS:
        widths = ", ".join(map(str, PACKED_WIDTHS))
        yield f"codes of {bits.bits} bits are packed differently by different readers; write {widths}, or {INSTEAD}"
    elif bits.format == "int" and linear.zero_point is not None:
        zero = linear.zero_point
        if zero.min() < 0 or zero.max() > linear.grid.max_code:
            yield f"zero points lie outside {bits.bits} bits; write method.rounding.include_zero=true"
    if rounds_input(linear):
        yield from _input_problems(linear)
    if linear.exact_codes() is None:
        yield f"its weights are no longer values of its grid (something changed them afterwards); {INSTEAD}"


def _input_problems(linear: QuantLinear) -> Iterator[str]:
    """Why engines would round a linear's input otherwise."""
    bits, part = linear.activation_bits, linear.activation
    weight = linear.weight_bits
    if (bits.bits, bits.format) != (8, weight.format) or (weight.bits, linear.scale.shape[1]) != (8, 1):  # type: ignore[union-attr]
        yield (
            "inputs are rounded together with weights of 8 bits in one group per row, int with int or fp8 with fp8; "
            "write bits=w8a8 or bits=fp8"
        )
    if bits.scale_dtype != "float32":
        yield f"bits.activation.scale_dtype={bits.scale_dtype}: readers keep scales of inputs whole; write float32"
    if bits.group_size != -1:
        yield f"bits.activation.group_size={bits.group_size}: readers have one grid per token; write -1"
    if not isinstance(part, PerToken):
        kind = type(part).__name__
        yield f"inputs are rounded by {kind}, readers have a grid per token; write method.activation=per_token"
        return
    if part.clip_ratio != 1:
        yield f"method.activation.clip_ratio={part.clip_ratio}: readers take the whole range; write 1"
    if part.rescale:
        yield "method.activation.rescale=true: readers do not correct scales; write false"
    if not part.include_zero and not bits.symmetric:
        yield "method.activation.include_zero=false: ranges of readers hold zero; write true"


def _joint_problems(lm: DiffusionLM, rounded: dict[str, QuantLinear]) -> Iterator[str]:
    """Linears that differ where readers have one grid for them."""
    if not rounded:
        yield "no weight is quantized; export dequantized, which writes the model as it is"
        return
    schemes = list({str(_scheme(linear)): name for name, linear in rounded.items()}.values())
    if len(schemes) > 1:
        yield (
            f"{schemes[0]} and {schemes[1]} have different grids, and transformers reads all linears by the first; "
            "take out bits.overrides and bits.blocks (16 bits are possible), or export dequantized"
        )
    for index in range(lm.model.arch.n_blocks):
        for roles in FUSED:
            kept = [role for role in roles if f"blocks.{index}.{role}" not in rounded]
            if 0 < len(kept) < len(roles):
                yield (
                    f"blocks.{index}: {', '.join(kept)} stays in 16 bit, but engines multiply {', '.join(roles)} in "
                    "one product; give them the same widths, or export dequantized"
                )
                return


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _stored_scale(linear: QuantLinear, dtype: torch.dtype) -> Tensor:
    assert linear.scale is not None
    narrow = linear.scale.to(dtype)
    return narrow if torch.equal(narrow.to(linear.scale.dtype), linear.scale) else linear.scale


def _tensors(lm: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the folder, by name."""
    names, parameters = stored_names(lm), dict(lm.model.named_parameters())
    rounded = {f"{name}.weight": linear for name, linear in _rounded(lm)}
    for ours, theirs in names.items():
        if ours in rounded:
            stem = theirs.removesuffix(".weight")
            yield from ((f"{stem}.{part}", tensor) for part, tensor in _stored(rounded[ours]).items())
        else:
            yield theirs, parameters[ours]


def stored_names(lm: DiffusionLM) -> dict[str, str]:
    """Our parameter name -> the name in the folder: Qwen2's."""
    return tensor_names(replace(held_architecture(lm.model), family=dream.NAME))


def _stored(linear: QuantLinear) -> dict[str, Tensor]:
    """A linear's weight in the tensors of its format."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    assert linear.zero_point is not None
    bits, codes = linear.weight_bits, linear.exact_codes()
    assert codes is not None
    tensors = {"weight_scale": _stored_scale(linear, linear.weight.dtype)}
    if bits.format == "fp8":
        return tensors | {"weight": codes.view(torch.float8_e4m3fn)}
    middle = 2 ** (bits.bits - 1)
    signed, zero = ((each.to(torch.int16) - middle).to(torch.int8) for each in (codes, linear.zero_point))
    zeros = {} if bits.symmetric else {"weight_zero_point": zero}
    if rounds_input(linear):
        return tensors | zeros | {"weight": signed}
    zeros = {name: pack_to_int32(tensor, bits.bits, packed_dim=0) for name, tensor in zeros.items()}
    shape = torch.tensor(signed.shape)
    return tensors | zeros | {"weight_packed": pack_to_int32(signed, bits.bits), "weight_shape": shape}


def _scheme(linear: QuantLinear) -> dict[str, Any]:
    """The grids of a linear in the format's words."""
    bits, kind = linear.weight_bits, "float" if linear.weight_bits.format == "fp8" else "int"
    assert linear.scale is not None
    groups = linear.scale.shape[1]
    size = None if groups == 1 else linear.in_features // groups
    weights = {"num_bits": bits.bits, "type": kind, "symmetric": bits.symmetric, "dynamic": False}
    weights |= {"strategy": "channel" if size is None else "group", "group_size": size}
    if not rounds_input(linear):
        return {"weights": weights, "input_activations": None}
    own = linear.activation_bits
    inputs = {"num_bits": own.bits, "type": kind, "symmetric": own.symmetric, "dynamic": True, "strategy": "token"}
    return {"weights": weights, "input_activations": inputs}


def _layout(linear: QuantLinear) -> str:
    """How the package calls the tensors of `_stored`."""
    if linear.weight_bits.format == "fp8":
        return "float-quantized"
    return "int-quantized" if rounds_input(linear) else "pack-quantized"


def _config(lm: DiffusionLM) -> dict[str, Any]:
    """The `config.json` of the folder."""
    arch, known = held_architecture(lm.model), KNOWN[lm.model.arch.family]
    rounded, names = dict(_rounded(lm)), stored_names(lm)
    linear = next(iter(rounded.values()))
    kept = [names[f"{name}.weight"].removesuffix(".weight") for name, _, _ in linears(lm.model) if name not in rounded]
    quantization = {
        "quant_method": "compressed-tensors",
        "format": _layout(linear),
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **_scheme(linear)}},
        "ignore": ["lm_head", *kept],
    }
    return {key: getattr(arch, field) for field, key in dream.KEYS.items()} | {
        "architectures": [known.architecture], "attention_dropout": 0.0, "bos_token_id": None,
        "head_dim": arch.head_size, "hidden_act": "silu", "is_causal": False, "model_type": known.model_type,
        "num_key_value_heads": arch.n_kv_heads, "pad_token_id": arch.eos_token_id, "quantization_config": quantization,
        "tie_word_embeddings": arch.tied_head, "torch_dtype": _name(lm.model.dtype), "use_cache": False,
        "use_sliding_window": False,
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
