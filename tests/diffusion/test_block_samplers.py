"""Samplers of models with block-wise attention against recorded calls of their official code (tests/golden3)."""

from __future__ import annotations

import json

import pytest
import torch
from goldens import GOLDEN3, golden
from torch import Tensor

from dqx.diffusion.block_engine import BlockEngine
from dqx.diffusion.engine import Prompt
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Cached, Recomputed
from dqx.diffusion.samplers.dream import filter_logits
from dqx.diffusion.samplers.fast_dllm import FastDLLMSampler
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler, SpeculativeSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer

RUNNERS = {"cached": lambda model: Cached(model, 160), "recomputed": Recomputed}


def model_of(name: str, mask: int | None = None) -> MaskedDiffusionTransformer:
    return load_weights(inspect(str(GOLDEN3 / f"{name}_tiny"), mask_token_id=mask)).eval()


def recorded(name: str) -> dict[str, dict]:
    """The arguments and counts of each case, with its tensors."""
    tensors = golden(f"{name}_generate", GOLDEN3)
    cases = json.loads((GOLDEN3 / f"{name}_generate.json").read_text())["cases"]
    for case, values in cases.items():
        values |= {k.split(".", 1)[1]: t for k, t in tensors.items() if k.split(".")[0] == case}
    return cases


def replay(
    model: MaskedDiffusionTransformer, sampler: BlockwiseSampler, case: dict, steps: int, gen_length: int, runner: str
) -> Tensor:
    """Run a program, and compare each of its passes with the recorded call; the canvas in the end."""
    writing = sampler.begin(case["prompt"].long(), gen_length=gen_length, steps=steps, arch=model.arch)
    runs, calls = RUNNERS[runner](model), []
    lengths = case["forward_len"].tolist()
    ids, argmax, prob = (case[f"forward_{k}"].split(lengths) for k in ("ids", "argmax", "prob"))
    draws = list(zip(case["draws"].long(), case["draw_prob"], strict=True)) if "draws" in case else None
    while (due := writing.due) is not None:
        number = len(calls)
        calls.append("s" if due.stored else "d")
        assert due.ids.tolist() == ids[number].tolist()
        logits, _ = runs.run(due)
        if due.look is None:
            found = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        elif draws is None:
            found = sampler.candidates(logits, due.look[None], [0], noise=None, arch=model.arch)
            assert found[0].tolist() == argmax[number][due.look].tolist()
            torch.testing.assert_close(found[1], prob[number][due.look], atol=1e-4, rtol=0)
        else:  # drawn for every row of the call, also for known ones
            drawn, draws = draws[: len(due.ids)], draws[len(due.ids) :]
            rows = due.look.nonzero()[:, 0].tolist()
            found = torch.stack([drawn[i][0] for i in rows]), torch.stack([drawn[i][1] for i in rows])
        writing.send(found)
    assert len(calls) == case["n_forwards"]
    if not case.get("use_block_cache"):  # whose passes are stored to be replaced
        assert "".join(calls) == case["kinds"].translate(str.maketrans("cb", "ss"))
    return writing.canvas


SDAR = recorded("sdar")


def sdar(case: dict) -> tuple[SDARSampler, int]:
    """The sampler of a recorded case, and the steps of a whole answer."""
    sampler = SDARSampler(
        block=case["block_length"],
        remasking=case["remasking_strategy"],
        threshold=case.get("confidence_threshold"),
        temperature=case["temperature"],
        top_k=case.get("top_k"),
        top_p=case.get("top_p"),
    )
    return sampler, case["denoising_steps"] * -(-case["gen_length"] // case["block_length"])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", [name for name in SDAR if name != "static_overwrites_known"])
def test_sdar(name, runner):
    case = SDAR[name]
    model = model_of("sdar", 151)
    stop = case.get("stopping_criteria_idx")
    if stop:
        object.__setattr__(model.arch, "eos_token_id", stop[0])
    else:
        object.__setattr__(model.arch, "eos_token_id", 159)
    sampler, steps = sdar(case)
    canvas = replay(model, sampler, case, steps, case["gen_length"], runner)
    assert canvas.tolist() == case["output"].tolist()
    assert int((canvas == 151).sum()) == case["masks_left"]


def test_sdar_draws_from_the_same_distribution():
    """The filtered probabilities of the recorded draws are those of the sampler's own filters."""
    case = SDAR["sampled"]
    sampler, steps = sdar(case)
    model = model_of("sdar", 151)
    writing = sampler.begin(case["prompt"].long(), gen_length=14, steps=steps, arch=model.arch)
    runs, at = Cached(model, 160), 0

    class Replay:
        def uniform(self, kind, rows, positions, steps, width=1):
            return torch.zeros(len(rows), width, dtype=torch.float64)

    while (due := writing.due) is not None:
        logits, _ = runs.run(due)
        if due.look is None:
            writing.send((torch.zeros(0), torch.zeros(0)))
            continue
        drawn = case["draws"][at : at + len(due.ids)].long()[due.look]
        wanted = case["draw_prob"][at : at + len(due.ids)][due.look]
        at += len(due.ids)
        for token, probability, row in zip(drawn, wanted, logits, strict=True):
            lifted = row.clone()[None]
            tokens, _ = sampler.candidates(
                lifted, torch.ones(1, 1, dtype=torch.bool), [0], noise=Replay(), arch=model.arch
            )

            probs = filter_logits(filter_logits(row[None] / 1.3, None, 20), 0.9, None).softmax(-1)[0]
            torch.testing.assert_close(probs[token], probability, atol=1e-4, rtol=0)
            assert probs[tokens[0]] > 0
        writing.send((drawn, wanted))


NEMOTRON = recorded("nemotron")


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", NEMOTRON)
def test_nemotron(name, runner):
    case, model = NEMOTRON[name], model_of("nemotron")
    object.__setattr__(model.arch, "eos_token_id", case.get("eos_token_id", model.arch.eos_token_id))
    gen_length, steps = case["max_new_tokens"], case["max_new_tokens"]
    sampler: BlockwiseSampler
    if case["function"] == "ar_generate":
        sampler = AutoregressiveSampler()
    elif case["function"] == "linear_spec_generate":
        sampler = SpeculativeSampler(block=case["block_length"], threshold=case.get("threshold") or 0.0)
    else:
        sampler = NemotronSampler(
            block=case["block_length"],
            threshold=case["threshold"],
            causal_context=case.get("causal_context", True),
            max_thinking_tokens=case.get("max_thinking_tokens"),
            end_think_token_id=case.get("end_think_token_id"),
        )
    canvas = replay(model, sampler, case, steps, gen_length, runner)
    assert canvas[: case["output_length"]].tolist() == case["output"].tolist()
    assert (canvas[case["output_length"] :] == model.arch.mask_token_id).all()


FAST_DLLM = recorded("fastdllm2")


# the block cache holds keys and values of an earlier state, which cannot be computed anew
@pytest.mark.parametrize(
    ("name", "runner"),
    [(n, r) for n, case in FAST_DLLM.items() for r in RUNNERS if r == "cached" or not case.get("use_block_cache")],
)
def test_fast_dllm(name, runner):
    case, model = FAST_DLLM[name], model_of("fastdllm2", 151)
    object.__setattr__(model.arch, "eos_token_id", case["stop_token"])
    sampler = FastDLLMSampler(
        block=case["block_size"],
        sub_block=case["small_block_size"],
        threshold=case["threshold"],
        block_cache=case.get("use_block_cache", False),
    )
    canvas = replay(model, sampler, case, case["max_new_tokens"], case["max_new_tokens"], runner)
    assert canvas[: case["output_length"]].tolist() == case["output"].tolist()
    assert (canvas[case["output_length"] :] == 151).all()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_engine_writes_what_the_plain_loop_writes(batch_size):
    model = model_of("sdar", 151)
    sampler = SDARSampler(block=4, threshold=0.5)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 150, (n,), generator=g) for n in (9, 3, 17, 8, 1, 12, 30)]
    plain = [sampler.generate(model, p[None], gen_length=16, steps=16).ids[0].tolist() for p in prompts]
    seen = []
    engine = BlockEngine(model, sampler, gen_length=16, steps=16, batch_size=batch_size, progress=seen.append)
    answers = engine.generate([Prompt(p, i) for i, p in enumerate(prompts)])
    for answer, wanted in zip(answers, plain, strict=True):
        assert answer.ids == wanted
    assert sum(seen) == 16 * len(prompts)
    whole = sampler.generate(model, prompts[0][None], gen_length=16, steps=16, cached=False)
    assert whole.ids[0].tolist() == plain[0]
    assert whole.n_forwards == answers[0].n_forwards
    assert whole.n_tokens > answers[0].n_tokens


def test_the_entropy_bound_limits_what_is_written_at_once():
    sampler = SDARSampler(remasking="entropy_bound", bound=0.5)
    entropy = torch.tensor([0.3, 0.1, 2.0, 0.2, 0.4])  # rising, the sums before each are 0, 0.1, 0.3, 0.6 and 1
    assert sampler.chosen(-entropy, 1).tolist() == [True, True, False, True, False]
    assert sampler.chosen(-entropy, 4).tolist() == [True, True, False, True, True]  # those that are due in any case
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arch = model_of("sdar", 151).arch
    tokens, surest = sampler.candidates(logits.clone(), torch.ones(1, 3, dtype=torch.bool), [0], noise=None, arch=arch)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert sampler.chosen(sampler.unsure(torch.rand(5)), 2).sum() == 2
    torch.testing.assert_close(-surest, torch.distributions.Categorical(logits=logits).entropy())


def test_entropy_bounds_trade_passes_for_certainty():
    model = model_of("sdar", 151)
    prompt, passes = torch.arange(9)[None], []
    for bound in (0.0, 0.5, 1e9):
        sampler = SDARSampler(block=4, remasking="entropy_bound", bound=bound)
        passes.append(sampler.generate(model, prompt, gen_length=16, steps=16).n_forwards)
    static = SDARSampler(block=4, remasking="low_confidence_static").generate(model, prompt, gen_length=16, steps=16)
    assert passes[0] == static.n_forwards >= passes[1] > passes[2]


def test_a_settled_text_ends_a_row():
    model = model_of("sdar", 151)
    sampler = SDARSampler(block=4)
    prompt = torch.arange(9)
    (whole,) = BlockEngine(model, sampler, gen_length=16, steps=16).generate([Prompt(prompt, 0)])
    engine = BlockEngine(model, sampler, gen_length=16, steps=16, settled=lambda ids: len(ids) >= 2)
    (answer,) = engine.generate([Prompt(prompt, 0)])
    assert 2 <= len(answer.ids) < 16
    assert answer.ids == whole.ids[: len(answer.ids)]
    assert answer.n_forwards < whole.n_forwards


def test_noise_belongs_to_the_document():
    model = model_of("sdar", 151)
    sampler = SDARSampler(block=4, temperature=1.0, threshold=0.5)
    prompts = [Prompt(torch.arange(n), n) for n in (5, 9, 6)]
    settings = {"gen_length": 16, "steps": 16, "seed": 1}
    together = BlockEngine(model, sampler, **settings).generate(prompts)
    alone = [BlockEngine(model, sampler, **settings).generate([prompt])[0] for prompt in prompts]
    assert [a.ids for a in together] == [a.ids for a in alone]
    other = BlockEngine(model, sampler, **settings | {"seed": 2}).generate(prompts)
    assert [a.ids for a in together] != [a.ids for a in other]


def test_out_of_memory_halves_the_batch(monkeypatch):
    model = model_of("sdar", 151)
    sampler = SDARSampler(block=4)
    prompts = [Prompt(torch.arange(4 + n), n) for n in range(5)]
    wanted = [a.ids for a in BlockEngine(model, sampler, gen_length=8, steps=8).generate(prompts)]
    real, calls = model.head_rows, []

    def failing(ids, look, feed):
        calls.append(len(ids))
        if len(calls) > 4 and len(ids) > 2:
            raise torch.OutOfMemoryError
        return real(ids, look, feed)

    monkeypatch.setattr(model, "head_rows", failing)
    engine = BlockEngine(model, sampler, gen_length=8, steps=8, batch_size=5)
    assert [a.ids for a in engine.generate(prompts)] == wanted
    assert engine.notes == ["out of memory with 5 sequences at a time; went on with 2"]


def test_settings_that_cannot_work_are_told():
    told = SDARSampler(block=4, remasking="none", threshold=2.0).problems(16, None, 16)
    known = "low_confidence_dynamic, low_confidence_static, sequential, entropy_bound"
    assert told == [f"sampler.remasking='none' is not one of {known}"]
    (told,) = SDARSampler(remasking="entropy_bound", bound=-1).problems(8, 4, 8)
    assert "bound=-1 is not a number at least 0" in told
    assert "threshold=2.0" in SDARSampler(threshold=2.0).problems(16, None, 16)[0]
    assert "steps=6 cannot be shared equally by 4 blocks" in SDARSampler().problems(16, None, 6)[0]
    assert SDARSampler().problems(14, 4, 16) == []
    assert "block_length=8 differs from sampler.block=4" in SDARSampler().problems(16, 8, 16)[0]
