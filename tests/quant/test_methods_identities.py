"""Every method of conf/method, on every kind of family: 16 bits is a no-op, every width works or says why not, and no
linear is left alone without a reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tiny import ROLES, TOY, Batch

from dqx.config.compose import build, compose, resolve
from dqx.config.schema import choices
from dqx.data.calibration import CalibBatch
from dqx.data.passes import pass_batches
from dqx.diffusion.samplers.fast_dllm import FastDLLMSampler
from dqx.diffusion.samplers.nemotron import NemotronSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.architecture import CAUSAL, Attention, Yarn
from dqx.models.plant import plant_outliers
from dqx.models.transformer import MaskedDiffusionTransformer, initialise
from dqx.quant import BitsConfig, Method, QuantReport, quantize
from dqx.quant.linear import QuantLinear
from dqx.quant.transforms.block_rotate import BlockRotate

SMALL = replace(TOY, vocab_size=64, hidden_size=128, mlp_size=384, n_blocks=2, mask_token_id=63, eos_token_id=62)
NORMED = {"head_norm": True, "attention": Attention(4)}
STRETCHED = Yarn(4.0, 16, query_scale=0.1)
ARCHITECTURES = {
    "llada": replace(SMALL, family="llada", mlp_size=256, n_kv_heads=4, qkv_bias=False, logit_shift=False),
    "dream": SMALL,
}
BLOCKWISE = {  # heads together wider than the residual stream, as wide, and narrower
    "sdar": replace(ARCHITECTURES["llada"], family="sdar", n_kv_heads=2, head_dim=64, **NORMED),
    "nemotron": replace(
        ARCHITECTURES["llada"], family="nemotron", hidden_size=256, head_dim=32, attention=CAUSAL, yarn=STRETCHED
    ),
    "fast_dllm": replace(SMALL, family="fast_dllm", attention=Attention(8)),
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
ALL = {**ARCHITECTURES, **BLOCKWISE}
MODELS = {
    "llada": "nano_llada", "dream": "nano_dream",
    "sdar": "sdar_4b", "nemotron": "nemotron_8b", "fast_dllm": "fast_dllm_7b",
}  # fmt: skip
SAMPLERS = {
    "sdar": SDARSampler(block=4, remasking="low_confidence_static"),
    "nemotron": NemotronSampler(block=8),
    "fast_dllm": FastDLLMSampler(block=8, sub_block=4),
}
FILES = {choice for choice in choices("bits") if choice.startswith("gguf_")}
SUPERBLOCKS = {choice for choice in FILES if choice.endswith("_k")}  # of 256 inputs, which these models have not
WITH_ACTIVATIONS = {"w8a8", "w6a6", "w4a8", "w4a4", "w4a4g128", "fp8", "mxfp4", "nvfp4"} | FILES
NOT_FEW_INTEGERS = {"w5", "w6", "w8", "w8a16", "fp8_w8a16", "mxfp4_w4a16", "nvfp4_w4a16"}  # no binary matrices
REFUSED = {
    "fp16": set(choices("bits")) - {"w16a16"},
    "awq": WITH_ACTIVATIONS,
    "awq_as_published": WITH_ACTIVATIONS,
    "d2quant": WITH_ACTIVATIONS | NOT_FEW_INTEGERS,
    "d2quant_as_published": WITH_ACTIVATIONS | NOT_FEW_INTEGERS,
    "quant_dllm": WITH_ACTIVATIONS | NOT_FEW_INTEGERS | {"w4", "w4a16"},  # some groups have a matrix more
    "quant_dllm_as_published": WITH_ACTIVATIONS | NOT_FEW_INTEGERS | {"w4", "w4a16"},
}
WIDTHS = ["w8a8", "w4a8", "w4a4", "w4a16", "w3a16", "w2a16", "fp8", "mxfp4_w4a16", "nvfp4"]
slow = pytest.mark.slow
METHODS = choices("method")
LEFT_IN_16_BIT = {("gptq_as_published", "llada"): {"q", "k", "v"}}
SHIFTS = ["blocks.*.mlp_norm.bias", "norm.bias"]
ADDED = {"d2quant": SHIFTS, "d2quant_as_published": SHIFTS}
CHANGES_THE_FUNCTION = ["quarot_as_published", "d2quant_as_published"]  # subtract the mean of the embedding


@cache
def composed(**choice: str) -> DictConfig:
    return compose([f"{group}={name}" for group, name in choice.items()])


@cache
def built(name: str, family: str) -> Method:
    """A method by its name, with a shorter search where it rotates greedily."""
    method = build(resolve(composed(model=MODELS[family], method=name)).method)
    shorter = {k: replace(t, steps=4) for k, t in method.transforms.items() if isinstance(t, BlockRotate)}
    return replace(method, transforms=dict(method.transforms) | shorter)


def bits_of(name: str, family: str, bits: str) -> BitsConfig:
    """What a choice of `bits` means with a method: the one composition's node in the other, as Hydra would put it."""
    if name == "fp16":
        return BitsConfig() if bits == "w16a16" else resolve(composed(bits=bits)).bits
    cfg = composed(model=MODELS[family], method=name)
    cfg.bits = composed(bits=bits).bits
    found = OmegaConf.to_object(cfg.bits)
    assert isinstance(found, BitsConfig)
    return found


@cache
def weights(family: str) -> dict[str, torch.Tensor]:
    """Of a random model with gains and biases unlike 1 and 0, and columns of unequal size."""
    g = torch.Generator().manual_seed(0)
    model = MaskedDiffusionTransformer(ALL[family])
    initialise(model, g)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=g)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=g)
    return model.state_dict()


def fresh(family: str, dtype: torch.dtype = torch.float32) -> MaskedDiffusionTransformer:
    model = MaskedDiffusionTransformer(ALL[family])
    model.load_state_dict(weights(family))
    return model.to(dtype).eval()


def sequences(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(seed))


def run(model: MaskedDiffusionTransformer, method: Method, bits: BitsConfig) -> QuantReport:
    """On text, or on the passes that write its second half where the family's sampler writes so."""
    batches: list[Batch | CalibBatch] = [Batch(sequences())]
    if (sampler := SAMPLERS.get(model.arch.family)) is not None:
        schedule = {"gen_length": 12, "steps": 12, "seed": 0, "rollout": False}
        batches = list(pass_batches(model, sampler, sequences(), **schedule))
    return quantize(model, method, bits, batches, progress=False)


@torch.no_grad()
def logits(model: MaskedDiffusionTransformer) -> torch.Tensor:
    return model(sequences(2))


def cases(families: Iterable[str]) -> list:
    """Methods with families; of those with block-wise attention one in the default run, with the methods' own forms."""
    return [
        pytest.param(name, family, marks=[slow] if family in BLOCKWISE and not default(name, family) else [])
        for family in families
        for name in METHODS
    ]


def default(name: str, family: str) -> bool:
    return family == "sdar" and not name.endswith("as_published")


@pytest.mark.parametrize("gain", [32.0, pytest.param(1.0, marks=slow)])
@pytest.mark.parametrize(("name", "family"), cases(ALL))
def test_sixteen_bits_is_a_no_op(name, family, gain):
    """Every transform, correction and fold leaves the function alone, with and without planted outliers."""
    model = fresh(family, torch.float64)
    plant_outliers(model, gain, 4)
    before = logits(model)
    report = run(model, built(name, family), bits_of(name, family, "w16a16"))
    change = (logits(model) - before).abs().max()
    assert (change > 1e-3) if name in CHANGES_THE_FUNCTION else (change < 1e-9 * before.abs().max())
    assert report.average_bits == 16
    assert {row.bits for row in report.linears} == {16}


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_which_bits_a_method_takes(name, family):
    refused = set()
    for choice in choices("bits"):
        problems = built(name, family).problems(bits_of(name, family, choice), ARCHITECTURES[family])
        assert all(problem.startswith(("bits", "method.")) for problem in problems)  # names the setting to change
        refused |= {choice} if problems else set()
    assert refused == REFUSED.get(name, set()) | SUPERBLOCKS


@pytest.mark.parametrize(("name", "family"), cases(BLOCKWISE))
def test_methods_run_where_attention_is_blockwise(name, family):
    """At w4a4 and w2a16, or why not is told; queries and keys keep their norms' gains."""
    ran = []
    for choice in ("w4a4", "w2a16"):
        method, bits, model = built(name, family), bits_of(name, family, choice), fresh(family)
        if choice in REFUSED.get(name, set()):
            assert method.problems(bits, ALL[family])
            continue
        report = run(model, method, bits)
        ran.append(choice)
        assert torch.isfinite(logits(model)).all()
        assert {row.bits for row in report.linears} <= {bits.weight.bits, 16}
        if ALL[family].head_norm:
            assert torch.equal(model.blocks[0].k_norm.weight, fresh(family).blocks[0].k_norm.weight)
    assert ran or name == "fp16"


def quick(name: str) -> str:
    """One width per method in the default run; the others are marked slow."""
    return "w3a16" if "w4a4" in REFUSED.get(name, set()) or name in ("gptq", "gptaq", "rtn") else "w4a4"


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "choice"),
    [
        pytest.param(name, choice, marks=[] if choice == quick(name) else [slow])
        for name in METHODS
        for choice in WIDTHS
        if choice not in REFUSED.get(name, set())
    ],
)
def test_no_linear_is_skipped(name, choice, family):
    """Every linear is rounded as asked, its input too; what is left in 16 bit is written out here and in the record."""
    method, bits = built(name, family), bits_of(name, family, choice)
    original, model = fresh(family), fresh(family)
    report = run(model, method, bits)
    assert torch.isfinite(logits(model)).all()
    assert [row.name for row in report.linears] == [f"blocks.{i}.{role}" for i in range(2) for role in ROLES]
    untouched = LEFT_IN_16_BIT.get((name, family), set())
    for row in report.linears:
        linear, before = (m.get_submodule(row.name) for m in (model, original))
        if row.role in untouched:
            assert row.bits == 16, row
            continue
        assert isinstance(linear, QuantLinear), row
        assert (row.bits, row.activation_bits) == (bits.weight.bits, bits.activation.bits), row
        assert (linear.activation is None) == (bits.activation.bits == 16), row
        assert max(len(group.unique()) for group in linear.codes().view(-1, 16)) <= 2**row.bits, row
        assert not torch.equal(linear.weight, before.weight), row
    kept = KEPT[family] + [f"blocks.*.{role}.weight" for role in untouched] + ADDED.get(name, [])
    assert sorted(row.name for row in report.kept) == sorted(kept)
    assert all(row.reason for row in report.kept)
