"""How often the host waits for the device: once a denoising step, once a batch of likelihoods, never for a column.

A planted wait fails here: `float(scale[g])` in the column loop, `.item()` in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_saved import configured
from tiny import Batch

from dqx.config.compose import build
from dqx.diffusion import SeededNoise
from dqx.diffusion.engine import Engine
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.diffusion.scorer import Scorer
from dqx.formats.bits import WeightBits
from dqx.formats.integers import Grid
from dqx.quant import quantize
from dqx.quant.rounding.abmp import ABMP
from dqx.quant.rounding.blockwise import Blockwise, blockwise_round
from dqx.quant.rounding.daq import DAQ
from dqx.quant.rounding.dual_scale import DualScale, dual_scale
from dqx.quant.rounding.gptaq import GPTAQ, gptaq_round
from dqx.quant.rounding.gptq import ColumnSettings, gptq_round
from dqx.quant.rounding.rtn import rtn_round
from dqx.quant.transforms.greedy_rotation import greedy_rotation
from pretend.device import State
from pretend.test_diffusion import PROMPTS, SAMPLERS, ids, on, requests, schedule
from pretend.test_quantization import METHODS


@contextmanager
def counted(state: State) -> Iterator[list[int]]:
    """How often the host waited inside."""
    before, found = sum(state.waits.values()), []
    yield found
    found.append(sum(state.waits.values()) - before)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_step_of_the_engine_waits_once(sampler: Sampler, pretend: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are in it, and where rows that reuse keys and values go through the model by themselves."""
    steps = []
    take = Engine._step

    def step(self: Engine, batch: list) -> bool:
        with counted(pretend) as waits:
            done = take(self, batch)
        steps.append((len(batch), *waits))
        return done

    monkeypatch.setattr(Engine, "_step", step)
    engine = Engine(on("pretend", "llada"), sampler, batch_size=3, **schedule(sampler))
    with counted(pretend) as waits:
        engine.generate(PROMPTS)
    assert {waited for _, waited in steps} == {1}
    assert {rows for rows, _ in steps} == {2, 3}
    assert waits == [len(steps)]  # and nothing between steps


def test_a_batch_of_likelihoods_waits_once(pretend: State, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(on("pretend", "dream"), samples=6, seed=1, batch_tokens=100)
    forwards = []
    whole = scorer.model.logits_where
    monkeypatch.setattr(scorer.model, "logits_where", lambda *args: forwards.append(1) or whole(*args))
    with counted(pretend) as waits:
        scorer.score(requests())
    assert waits == [len(forwards)]
    assert len(forwards) > 3


@pytest.mark.parametrize("sampler", [SDARSampler(), NemotronSampler(block=4), AutoregressiveSampler()], ids=str)
def test_so_does_a_batch_of_likelihoods_by_blocks(
    sampler: Sampler, pretend: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {}
    for device in ("cpu", "pretend"):
        model, forwards = on(device, "llada"), []
        scorer = Scorer(model, samples=6, seed=1, batch_tokens=40, factorization=sampler.factorization())
        whole = model.head_rows
        monkeypatch.setattr(model, "head_rows", lambda *args, f=forwards, w=whole: f.append(1) or w(*args))
        with counted(pretend) as waits:
            values[device] = scorer.score([request for request in requests() if len(request.prefix)])
        assert waits == [len(forwards) if device == "pretend" else 0]
        assert len(forwards) > 1
    assert values["pretend"] == pytest.approx(values["cpu"], rel=1e-5)


@pytest.mark.parametrize(
    ("sampler", "waits"),
    [
        (LLaDASampler(), 3),  # how many masks a row has, where they are, NaN
        (LLaDASampler(temperature=0.8), 4),  # where noise is wanted
        (DreamSampler(), 3),
        (DreamSampler("entropy", alg_temp=0.5, temperature=0.3), 5),
    ],
    ids=str,
)
def test_a_step_of_the_plain_loop(sampler: Sampler, waits: int, pretend: State) -> None:
    """It keeps all on the device, and is the reference, not what evaluates."""
    prompt, how = torch.tensor([[1, 39, 3], [7, 5, 3]]), {"gen_length": 4, "steps": 1}
    noise = SeededNoise(0, ["a", "b"])
    model = on("pretend", "llada")
    with counted(pretend) as waited:
        out = sampler.generate(model, prompt, noise=noise, **how)
    assert out.n_forwards == len(prompt)
    assert waited == [waits]


def rounding(of: str, columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, columns, generator=draw).to("pretend") for n in (6, 200))
    hessian = x.T @ x
    settings = {"chunk": 8, "fresh_ranges": True}
    if of == "gptq":
        gptq_round(w, hessian, Grid(3), 4, settings=ColumnSettings(**settings))
    elif of == "gptaq":
        gptaq_round(w, hessian, hessian, Grid(3), 4, settings=GPTAQ(**settings))
    elif of == "levels":
        levels = ColumnSettings(**settings, group_order=True, levels=DualScale(iterations=columns))
        gptq_round(w, hessian, levels.grid(WeightBits(2)), 8, settings=levels)
    elif of == "blockwise":
        blockwise_round(w, hessian, Grid(3), 4)
    elif of == "blockwise, levels":
        blockwise = Blockwise(levels=DAQ(allocation=ABMP(0.3)))
        blockwise_round(w, hessian, blockwise.grid(WeightBits(2)), 4, settings=blockwise)
    elif of == "dual scale":
        dual_scale(w, 2, iterations=columns)
    elif of == "greedy search":
        greedy_rotation(x, torch.eye(8, device=x.device), steps=columns)
    else:
        rtn_round(w, Grid(3), 4)


@pytest.mark.parametrize("columns", [16, 48])
@pytest.mark.parametrize(
    ("of", "waits"),
    [
        ("rtn", 0),
        ("gptq", 2),  # is the Hessian finite, and has it been factored
        ("gptaq", 3),  # is the cross term finite
        ("levels", 4),  # which group comes next, how many there are
        ("blockwise", 2),  # is the Hessian finite, and has it been factored
        ("blockwise, levels", 4),  # how many groups there are, and which of them get more terms
        ("dual scale", 0),
        ("greedy search", 2),  # are the inputs finite, and what was found
    ],
)
def test_rounding_does_not_wait_for_columns_or_steps(of: str, waits: int, columns: int, pretend: State) -> None:
    with counted(pretend) as waited:
        rounding(of, columns)
    assert waited == [waits]


LINEARS, STACKS = 7, 4  # of a block; linears that read the same input are rounded together
BLOCKS = {
    "rtn": 1 + 2 * LINEARS,  # are the weights finite; the errors of each, and are its groups scattered
    "gptq": 1 + 2 * LINEARS + 2 * STACKS,
    "gptaq": 1 + 2 * LINEARS + 3 * STACKS,
    "duquant": 1 + 2 * LINEARS + 2 * 2 * STACKS + 1,  # two searches; is a head's scale shared
}


@pytest.mark.parametrize("method", BLOCKS)
def test_quantizing_a_block(method: str, pretend: State) -> None:
    config = configured("llada", METHODS[method])
    model = on("pretend", "llada")
    with counted(pretend) as waited:
        quantize(model, build(config.method), config.bits, [Batch(torch.tensor([ids(8, 1)]))], progress=False)
    assert waited == [len(model.blocks) * BLOCKS[method]]


KEYS = ("method.kv=per_channel", "method.kv.center=mean", "method.kv.recent=2", "method.kv.before_bias=true")


@pytest.mark.parametrize(("method", "kv"), [("rtn", ()), ("duquant", ()), ("quarot", ()), ("rtn", KEYS)])
def test_a_forward_of_a_quantized_model_never_waits(method: str, kv: tuple[str, ...], pretend: State) -> None:
    """Rounding activations, keys and values, and rotating them, asks nothing of the device."""
    config = configured("dream", (METHODS[method][0], "w4a4", *METHODS[method][2:], *kv))
    model = on("pretend", "dream")
    batch = torch.tensor([ids(8, 1)])
    quantize(model, build(config.method), config.bits, [Batch(batch)], progress=False)
    with counted(pretend) as waited, torch.no_grad():
        model(batch.to("pretend"))
    assert waited == [0]
