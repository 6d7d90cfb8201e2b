"""Predictions against full precision: known values, brute force, and exact agreement where nothing changed."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import TESTS
from tiny import random_model

from dqx.api import load
from dqx.config.compose import build, compose, resolve, select
from dqx.data.calibration import CalibBatch
from dqx.diagnostics.fidelity import (
    POSITIONS,
    RATIOS,
    Prediction,
    Question,
    Reference,
    compare,
    first_step,
    from_tensors,
    measure_fidelity,
    predict,
    questions,
    sqnr,
    to_tensors,
    windows,
)
from dqx.diffusion.rollout import Rollout, State, noise, schedule, write
from dqx.diffusion.samplers.dream import DreamSampler
from dqx.diffusion.samplers.llada import LLaDASampler
from dqx.models.family import family_of
from dqx.quant import quantize
from dqx.study.experiment import problems

SAMPLERS = {
    "llada": LLaDASampler(suppress_mask=True),
    "random order": LLaDASampler(suppress_mask=True, remasking="random", temperature=1.0),
    "guidance": LLaDASampler(suppress_mask=True, cfg_scale=1.0),
    "threshold": LLaDASampler(suppress_mask=True, threshold=0.02),
    "dream": DreamSampler(suppress_mask=True),
    "origin": DreamSampler(suppress_mask=True, alg="origin", temperature=1.0),
}
GEN_LENGTH = 12


def tiny(family="llada"):
    """A random model in float64, and the windows [3, 32] it is asked about."""
    config = json.loads((TESTS / "golden" / f"{family}_tiny" / "config.json").read_text())
    model = random_model(family_of(family).architecture(config))
    tokens = torch.randint(model.arch.mask_token_id, (3, 32), generator=torch.Generator().manual_seed(0))
    return model.double(), tokens


def refer(model, sampler, tokens, *, steps=4, count=16, together=8):
    """What full precision says."""
    rollout = write(model, sampler, tokens[:, :16], gen_length=GEN_LENGTH, steps=steps, seed=1, together=together)
    asked = questions(tokens, rollout.states(count), rollout.mask_token_id, seed=1)
    said = predict(model, sampler, asked, steps=steps, seed=1, together=together)
    return Reference(rollout, asked, list(said))


def changed(model, index=1):
    """A copy of the model with another block."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[index].up.weight.mul_(-1)
    return other


# ---- known values ----------------------------------------------------------------------------------------------


def test_known_values():
    p, q = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0.9, 0.1, 0.0]])
    texts = torch.tensor([[[9, 9], [9, 9]], [[1, 9], [9, 1]], [[1, 2], [2, 1]]])
    others = torch.tensor([[[9, 9], [9, 9]], [[1, 9], [1, 9]], [[1, 3], [1, 2]]])
    state = State(texts[1], step=1, prompt=0, mask_ratio=0.5, mask_token_id=9)
    compared = torch.zeros(2, 2, dtype=torch.bool)
    asked = [Question(texts[1], compared, 0.3), Question(texts[1], compared, 0.5, state)]
    hidden = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])  # two blocks, one position
    commits = torch.tensor([[True, True], [True, True]])
    ours = Prediction(p.log(), hidden, torch.tensor([[1, 2], [2, 1]]), commits)
    theirs = Prediction(q.log(), hidden + torch.tensor([[[0.0, 0.0]], [[0.1, 0.0]]]), others[2], commits.logical_not())
    reference = Reference(Rollout(texts, 0, 9), asked, [ours, ours])
    found = compare(reference, [theirs, theirs], Rollout(others, 0, 9))
    divergence = pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1), rel=1e-5)
    assert found["by_mask_ratio"] == [{"mask_ratio": 0.3, "positions": 1, "divergence": divergence, "agreement": 1.0}]
    (row,) = found["by_step"]
    assert (row["step"], row["mask_ratio"], row["divergence"]) == (1, 0.5, divergence)
    assert (row["commit_flips"], row["commit_delays"]) == (0.75, 1.0)
    assert found["layers"] == {"steps": [1], "mask_ratios": [0.5], "sqnr_db": [[None], [pytest.approx(20, abs=1e-4)]]}
    assert found["answers"] == {
        "documents": 2,
        "tokens": 2,
        "steps": 2,
        "agreement": 0.25,
        "first_diverging_step": [2, 1],
    }
    assert first_step([False, False]) is None


def test_hidden_states_that_are_not_finite_are_no_exact_ones():
    found = sqnr(torch.ones(3, 1, 2), torch.tensor([[[1.0, 1.0]], [[1.0, math.inf]], [[1.0, math.nan]]]))
    assert found[:2] == [None, -math.inf]
    assert math.isnan(found[2])


def test_steps_are_those_of_the_run_up_to_one_per_token():
    assert [schedule(16, steps) for steps in (None, 4, 64)] == [16, 4, 16]


# ---- the states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_states_are_those_that_the_sampler_sees_and_commits_those_it_makes(name):
    sampler = SAMPLERS[name]
    model, tokens = tiny("dream" if isinstance(sampler, DreamSampler) else "llada")
    reference = refer(model, sampler, tokens, together=1)
    seen, rollout = [], reference.rollout
    answer = sampler.generate(
        model, tokens[:, :16], gen_length=GEN_LENGTH, steps=4, noise=noise(1, range(3)), on_step=seen.append
    )
    assert rollout.ids[:-1].equal(torch.stack(seen))
    assert rollout.answers[-1].equal(answer.ids)
    shares = [rollout.state(step).mask_ratio for step in range(rollout.steps + 1)]
    assert shares[0] == 1
    assert shares[-1] == 0
    assert shares == sorted(shares, reverse=True)
    for question, said in zip(reference.questions, reference.predictions, strict=True):
        if question.state is not None:
            before, after = rollout.answers[question.state.step], rollout.answers[question.state.step + 1]
            assert said.commits.equal(before != after)
            assert said.tokens[said.commits].equal(after[said.commits])


def test_classes_of_tokens_part_the_windows():
    model, tokens = tiny()
    state = refer(model, SAMPLERS["llada"], tokens).rollout.state(2)
    prompt, committed, masked = (state.token_class(name) for name in ("prompt", "committed", "masked"))
    assert (prompt.int() + committed.int() + masked.int()).eq(1).all()
    assert prompt[:, :16].all()
    assert masked.sum(1).tolist() == [6, 6, 6]  # of 12, a quarter is written in each of 4 steps
    assert state.mask_ratio == 0.5
    with pytest.raises(ValueError, match=r"no class of tokens; they are prompt, committed, masked"):
        state.token_class("given")


def test_many_steps_are_sampled_and_those_that_write_nothing_left_out():
    model, tokens = tiny()
    rollout = refer(model, SAMPLERS["llada"], tokens, steps=12).rollout
    assert [state.step for state in rollout.states(16)] == list(range(12))
    assert [state.step for state in rollout.states(3)] == [2, 6, 10]
    assert rollout.states(0) == []
    none = refer(model, SAMPLERS["llada"], tokens, count=0).unmoved()
    assert (none["by_step"], none["layers"]) == ([], {"steps": [], "mask_ratios": [], "sqnr_db": []})
    idle = Rollout(rollout.ids[[0, 0, 1, 1, 2]], rollout.prompt, rollout.mask_token_id)
    assert [state.step for state in idle.states(16)] == [1, 3]


# ---- the measures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SAMPLERS, "cache"])
def test_an_unchanged_model_agrees_exactly_and_a_changed_one_does_not(name):
    sampler = SAMPLERS.get(name, LLaDASampler(suppress_mask=True, cache="dual"))
    model, tokens = tiny("dream" if isinstance(sampler, DreamSampler) else "llada")
    reference = refer(model, sampler, tokens)
    same = measure_fidelity(model, sampler, reference, seed=1)
    assert same == reference.unmoved()
    assert [row["mask_ratio"] for row in same["by_mask_ratio"]] == list(RATIOS)
    assert [row["positions"] for row in same["by_mask_ratio"]] == [9, 24, 24, 24, 24]
    for row in same["by_mask_ratio"] + same["by_step"]:
        assert (row["divergence"], row["agreement"]) == (0, 1)
    assert {(row["commit_flips"], row["commit_delays"]) for row in same["by_step"]} == {(0, 0)}
    assert {value for block in same["layers"]["sqnr_db"] for value in block} == {None}
    assert same["answers"]["agreement"] == 1
    assert same["answers"]["first_diverging_step"] == [None] * 3

    other = measure_fidelity(changed(model), sampler, reference, seed=1)
    assert all(row["divergence"] > 0 for row in other["by_mask_ratio"] + other["by_step"])
    exact, *moved = other["layers"]["sqnr_db"]
    assert set(exact) == {None}  # the block before the one that was changed
    assert all(math.isfinite(value) for block in moved for value in block)
    assert other["layers"]["steps"] == [row["step"] for row in other["by_step"]]
    assert other["answers"]["agreement"] < 1
    assert all(1 <= step <= 4 for step in other["answers"]["first_diverging_step"] if step)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_measures_equal_those_of_two_models_in_memory(family):
    """With nothing shared but the states and the positions: plain forwards, hooks, argmax and softmax."""
    model, tokens = tiny(family)
    other, sampler = changed(model), SAMPLERS["llada"]
    reference = refer(model, sampler, tokens)
    found = measure_fidelity(other, sampler, reference, seed=1)

    def look(net, ids):
        states = []
        hooks = [b.register_forward_hook(lambda _, __, out: states.append(out)) for b in net.blocks]
        with torch.no_grad():
            logits = net(ids)
        for hook in hooks:
            hook.remove()
        return logits, torch.stack(states)

    rows = found["by_mask_ratio"] + found["by_step"]
    for question, row in zip(reference.questions, rows, strict=True):
        (p, x), (q, y) = look(model, question.ids), look(other, question.ids)
        where = question.compared
        divergence = torch.nn.functional.kl_div(
            q[where].log_softmax(-1), p[where].log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        assert row["divergence"] == pytest.approx(divergence.mean().item(), rel=1e-4)
        assert row["agreement"] == (p[where].argmax(-1) == q[where].argmax(-1)).double().mean().item()
        assert row["positions"] == int(where.sum())
        if question.state is None:
            continue
        index = found["layers"]["steps"].index(question.state.step)
        columns = where.roll(-1, 1) if family == "dream" else where
        for block in range(1, len(x)):
            a, b = x[block][columns], y[block][columns]
            ratio = 10 * math.log10(a.square().sum() / (a - b).square().sum())
            assert found["layers"]["sqnr_db"][block][index] == pytest.approx(ratio, rel=1e-6)
        flips, delays = [], []
        for i, ids in enumerate(question.ids):
            masked = (ids == model.arch.mask_token_id).nonzero()[:, 0]
            masked = masked[masked >= 16]
            best = []
            for logits in (p[i, masked], q[i, masked]):
                logits[:, model.arch.mask_token_id] = -torch.inf
                best.append((logits.argmax(-1), logits.softmax(-1).max(-1).values.topk(3).indices))
            (ours, first), (theirs, second) = best
            flips += (ours[first] != theirs[first]).tolist()
            delays += [place not in second for place in first]
        assert row["commit_flips"] == pytest.approx(sum(flips) / len(flips))
        assert row["commit_delays"] == pytest.approx(sum(delays) / len(delays))


def test_nothing_depends_on_how_many_windows_go_together_or_how_many_there_are():
    model, tokens = tiny()
    other, sampler = changed(model), SAMPLERS["random order"]
    together, alone, fewer = (refer(model, sampler, tokens[:n], together=size) for n, size in ((3, 8), (3, 1), (2, 8)))
    assert together.rollout.ids.equal(alone.rollout.ids)
    assert together.rollout.ids[:, :2].equal(fewer.rollout.ids)
    for a, b, c in zip(together.questions, alone.questions, fewer.questions, strict=True):
        assert a.compared.equal(b.compared)
        assert a.compared[:2].equal(c.compared)
    for a, b in zip(
        predict(other, sampler, together.questions, steps=4, seed=1),
        predict(other, sampler, alone.questions, steps=4, seed=1, together=1),
        strict=True,
    ):
        assert torch.allclose(a.log_probs, b.log_probs, atol=1e-6)
        assert torch.allclose(a.hidden, b.hidden)
        assert a.tokens.equal(b.tokens)
        assert a.commits.equal(b.commits)


def test_positions_are_few_and_stay_the_same_while_they_are_masked():
    model, tokens = tiny()
    found = [q for q in refer(model, SAMPLERS["llada"], tokens, steps=12).questions if q.state is not None]
    assert [q.compared.sum(1).tolist() for q in found] == [[min(12 - step, POSITIONS)] * 3 for step in range(12)]
    for before, after in pairwise(found):
        still = before.compared & after.state.token_class("masked")
        assert (still <= after.compared).all()
    assert all((q.compared <= q.state.token_class("masked")).all() for q in found)


@pytest.mark.parametrize(
    ("family", "name", "setting"),
    [("llada", "quarot", "seed=3"), ("dream", "d2quant", "method.transforms.rotate.tile=32")],
)
def test_a_rotation_of_the_residual_stream_is_no_error(family, name, setting):
    model, tokens = tiny(family)
    reference = refer(model, SAMPLERS["llada"], tokens)
    config = select(method=name, bits="w16a16", overrides=[setting])
    method = build(config.method)
    quantize(model, method, config.bits, [CalibBatch(tokens, torch.zeros(3))], seed=3, progress=False)
    change = method.residual_map(config.bits, model.arch, seed=3)
    found = measure_fidelity(model, SAMPLERS["llada"], reference, seed=1, residual_map=change)["layers"]["sqnr_db"]
    assert all(value > 200 for block in found for value in block)  # float64
    found = measure_fidelity(model, SAMPLERS["llada"], reference, seed=1)["layers"]["sqnr_db"]
    assert all(value < 10 for block in found for value in block)


def test_what_is_kept_is_read_back():
    model, tokens = tiny()
    said = refer(model, SAMPLERS["llada"], tokens).predictions
    for a, b in zip(said, from_tensors(to_tensors(said)), strict=True):
        assert all(getattr(a, name).equal(getattr(b, name)) for name in vars(a))


# ---- settings --------------------------------------------------------------------------------------------------


def test_settings_are_judged():
    def found(*overrides):
        return problems(resolve(compose(["method=rtn", "task=nano_facts", "outliers.samples=0", *overrides])))

    assert found() == found("fidelity.samples=0", "fidelity.gen_length=9999") == []
    assert found("fidelity.length=3") == ["fidelity.length=3 must be 16 or more"]
    assert found("fidelity.steps=-1") == ["fidelity.steps=-1 must be 0 or more"]
    (problem,) = found("fidelity.gen_length=5000")
    assert "take 5064 positions, more than the model's 4096" in problem


def test_more_windows_than_text_are_refused(tiny_checkpoint):
    lm = load(str(tiny_checkpoint("llada")), dtype="float32")
    with pytest.raises(ValueError, match=r"more than the bundled text's \d+ tokens"):
        windows(lm.tokenizer, 10**6, 32)
