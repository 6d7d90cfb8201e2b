"""Generation in batches: what is written is what the plain sampler writes, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dqx.diffusion import SeededNoise
from dqx.diffusion.engine import Engine, Prompt, row_bytes
from dqx.diffusion.samplers import DreamSampler, LLaDASampler, Sampler
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.transformer import MaskedDiffusionTransformer

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = (5, 1, 9, 5, 14, 2, 7)
LLADA = [
    LLaDASampler(),
    LLaDASampler(temperature=0.8),
    LLaDASampler("random"),
    LLaDASampler("random", 0.8, suppress_eos_confidence=True),
    LLaDASampler(cfg_scale=1.5),
    LLaDASampler(temperature=0.5, cfg_scale=0.5, suppress_eos_logits=True),
]
DREAM = [
    DreamSampler("origin"),
    DreamSampler("origin", temperature=0.7),
    DreamSampler("maskgit_plus", top_k=5),
    DreamSampler("topk_margin", temperature=0.6, top_p=0.9),
    DreamSampler("entropy"),
    DreamSampler("entropy", alg_temp=0.5, temperature=0.3),
]
LLADA_SCHEDULE = {"gen_length": 8, "block_length": 4, "steps": 6}
DREAM_SCHEDULE = {"gen_length": 8, "steps": 9}


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusionTransformer]:
    """Random models in float64: no two confidences are so close that rounding could swap them."""
    return {f: load_weights(inspect(str(GOLDEN / f"{f}_tiny")), dtype=torch.float64) for f in ("llada", "dream")}


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Prompt]:
    draw = torch.Generator().manual_seed(0)
    return [Prompt(torch.randint(0, 200, (n,), generator=draw).tolist(), ("task", i)) for i, n in enumerate(lengths)]


def alone(model, sampler: Sampler, prompt: Prompt, *, seed: int = 0, **schedule: int) -> tuple[list[int], int]:
    """The plain path: tokens, forwards."""
    out = sampler.generate(model, torch.tensor([prompt.ids]), noise=SeededNoise(seed, [prompt.document]), **schedule)
    return out.ids[0].tolist(), out.n_forwards


@contextmanager
def sizes_of_batches(model: MaskedDiffusionTransformer, most: int = 1000) -> Iterator[list[int]]:
    """The rows of each forward; more than `most` run out of memory."""
    sizes: list[int] = []
    whole = model.logits_where

    def counted(ids, *rest):
        if len(ids) > most:
            raise torch.OutOfMemoryError
        sizes.append(len(ids))
        return whole(ids, *rest)

    model.logits_where = counted
    try:
        yield sizes
    finally:
        del model.logits_where


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 4e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_padding_is_not_seen(family: str, dtype: torch.dtype, close: float) -> None:
    model = load_weights(inspect(str(GOLDEN / f"{family}_tiny")), dtype=dtype)
    rows = [torch.tensor(prompt.ids) for prompt in prompts()]
    width = max(map(len, rows))
    real = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    batches = [torch.full(real.shape, token) for token in (3, model.arch.mask_token_id)]
    for batch in batches:
        batch[real] = torch.cat(rows)
    with torch.no_grad():
        states, others = (list(model.hidden_states(batch, real)) for batch in batches)
        expected = zip(*(list(model.hidden_states(row[None])) for row in rows), strict=True)
    for state, other, wanted in zip(states, others, expected, strict=True):
        assert torch.equal(state[real], other[real])  # whatever the padding is
        wanted = torch.cat(wanted, dim=1)[0]
        assert (state[real] - wanted).abs().max() <= close * wanted.abs().max()


@pytest.mark.parametrize("sampler", LLADA + DREAM, ids=str)
def test_every_batch_size_and_order_writes_what_the_plain_sampler_writes(models, sampler: Sampler) -> None:
    family = "llada" if isinstance(sampler, LLaDASampler) else "dream"
    model, schedule = models[family], LLADA_SCHEDULE if family == "llada" else DREAM_SCHEDULE
    asked = prompts()
    for seed, batch_sizes in ((0, (1, 3, 16)), (5, (2, 7))):
        expected = [alone(model, sampler, prompt, seed=seed, **schedule) for prompt in asked]
        assert len({str(ids) for ids, _ in expected}) == len(asked)
        for turn, batch_size in enumerate(batch_sizes):
            order = [(i * 3 + turn) % len(asked) for i in range(len(asked))]
            engine = Engine(model, sampler, seed=seed, batch_size=batch_size, **schedule)
            with sizes_of_batches(model) as sizes:
                answers = engine.generate([asked[i] for i in order])
            assert [(answer.ids, answer.n_forwards) for answer in answers] == [expected[i] for i in order]
            assert sum(sizes) == sum(answer.n_forwards for answer in answers)
            assert max(sizes) == min(batch_size, len(asked))
            assert not engine.notes
            for answer in answers:
                written = sum(token != model.arch.mask_token_id for token in answer.ids)
                assert (answer.n_saved, answer.n_written) == (0, written)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("steps", [2, 4, 16])
def test_schedules_of_every_fineness(models, family: str, steps: int) -> None:
    """Several tokens a step, and steps that write nothing, in single precision."""
    model = load_weights(inspect(str(GOLDEN / f"{family}_tiny")))
    sampler = LLaDASampler() if family == "llada" else DreamSampler()
    schedule = {"gen_length": 8, "steps": steps} | ({"block_length": 4} if family == "llada" else {})
    answers = Engine(model, sampler, batch_size=3, **schedule).generate(prompts())
    assert [(a.ids, a.n_forwards) for a in answers] == [alone(model, sampler, p, **schedule) for p in prompts()]


@pytest.mark.parametrize("sampler", [LLADA[1], LLADA[4], DREAM[4], DREAM[1]], ids=str)
def test_a_settled_row_stops_and_frees_its_place(models, sampler: Sampler) -> None:
    """Rows end at the first token of a set, wherever in a block: what precedes it is that of the whole answer."""
    family = "llada" if isinstance(sampler, LLaDASampler) else "dream"
    model, schedule = models[family], LLADA_SCHEDULE if family == "llada" else DREAM_SCHEDULE
    expected = [alone(model, sampler, prompt, **schedule) for prompt in prompts()]
    ends = {ids[i % 6] for i, (ids, _) in enumerate(expected[:5])}  # two rows write none of them, or late

    def settled(ids: list[int]) -> bool:
        assert model.arch.mask_token_id not in ids
        return not ends.isdisjoint(ids)

    engine = Engine(model, sampler, settled=settled, batch_size=3, **schedule)
    with sizes_of_batches(model) as sizes:
        answers = engine.generate(prompts())
    for answer, (ids, n_forwards) in zip(answers, expected, strict=True):
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        assert answer.ids[: end + 1] == ids[: end + 1]
        assert answer.ids == ids[: len(answer.ids)]
        if sampler != DREAM[1]:  # the schedule of `origin` is drawn
            assert answer.n_forwards + answer.n_saved == n_forwards
    assert sum(answer.n_saved for answer in answers) > 0
    assert sum(sizes) == sum(answer.n_forwards for answer in answers)
    assert set(sizes[: len(sizes) // 2]) == {3}  # no place is empty while prompts wait


@pytest.mark.parametrize("sampler", [LLADA[1], LLADA[3], DREAM[1]], ids=str)
def test_progress_moves_with_every_step_and_ends_at_all_of_them(models, sampler: Sampler) -> None:
    """Also where answers stop early, and where rows leave the batch and take a step again."""
    family = "llada" if isinstance(sampler, LLaDASampler) else "dream"
    model, schedule = models[family], LLADA_SCHEDULE if family == "llada" else DREAM_SCHEDULE
    asked = len(LENGTHS) * schedule["steps"]
    for settled, most in ((None, 1000), (lambda ids: len(ids) > 3, 1000), (None, 2)):
        told: list[int] = []
        engine = Engine(model, sampler, settled=settled, batch_size=3, progress=told.append, **schedule)
        with sizes_of_batches(model, most=most) as sizes:
            answers = engine.generate(prompts())
        assert len(answers) == len(LENGTHS)
        assert sum(told) == asked
        assert min(told) >= 0
        assert sum(n > 0 for n in told) >= len(sizes) - len(LENGTHS)  # not only when answers are finished


def test_answers_come_as_they_finish_and_the_longest_prompts_first(models) -> None:
    engine = Engine(models["llada"], LLaDASampler(), batch_size=2, **LLADA_SCHEDULE)
    assert [i for i, _ in engine.stream(prompts())] == [4, 2, 6, 0, 3, 5, 1]
    assert engine.generate([]) == []


@pytest.mark.parametrize("sampler", [LLADA[5], DREAM[5]], ids=str)
def test_out_of_memory_halves_the_batch_and_changes_nothing(models, sampler: Sampler) -> None:
    family = "llada" if isinstance(sampler, LLaDASampler) else "dream"
    model, schedule = models[family], LLADA_SCHEDULE if family == "llada" else DREAM_SCHEDULE
    expected = [alone(model, sampler, prompt, **schedule) for prompt in prompts()]
    engine = Engine(model, sampler, batch_size=6, **schedule)
    with sizes_of_batches(model, most=2) as sizes:
        assert [(a.ids, a.n_forwards) for a in engine.generate(prompts())] == expected
    assert max(sizes) == 1
    assert engine.notes == [
        "out of memory with 6 sequences at a time; went on with 3",
        "out of memory with 3 sequences at a time; went on with 1",
    ]
    with sizes_of_batches(model, most=0), pytest.raises(torch.OutOfMemoryError, match="one sequence of 22 tokens"):
        engine.generate(prompts())


def test_out_of_memory_in_the_middle_of_answers(models) -> None:
    """Rows that have to leave the batch keep what they have written."""
    model, sampler = models["llada"], LLADA[3]
    engine = Engine(model, sampler, batch_size=4, **LLADA_SCHEDULE)
    whole, calls = model.logits_where, []

    def shrinking(ids, *rest):
        calls.append(len(ids))
        if len(calls) > 3 and len(ids) > 2:
            raise torch.OutOfMemoryError
        return whole(ids, *rest)

    model.logits_where = shrinking
    try:
        answers = engine.generate(prompts())
    finally:
        del model.logits_where
    assert calls[:6] == [4, 4, 4, 4, 2, 2]
    assert [(a.ids, a.n_forwards) for a in answers] == [alone(model, sampler, p, **LLADA_SCHEDULE) for p in prompts()]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_model_that_predicts_masks(family: str) -> None:
    """Each row's own masks decide how much Dream writes, and masks that stay keep a row from being settled."""
    model = load_weights(inspect(str(GOLDEN / f"{family}_tiny")), dtype=torch.float64)
    with torch.no_grad():
        model.head.weight[model.arch.mask_token_id] *= 3
    sampler = LLaDASampler() if family == "llada" else DreamSampler("maskgit_plus")
    schedule = LLADA_SCHEDULE if family == "llada" else DREAM_SCHEDULE
    seen = []

    def settled(ids: list[int]) -> bool:
        seen.append(ids)
        return False

    answers = Engine(model, sampler, settled=settled, batch_size=4, **schedule).generate(prompts())
    assert [(a.ids, a.n_forwards) for a in answers] == [alone(model, sampler, p, **schedule) for p in prompts()]
    assert any(model.arch.mask_token_id in answer.ids for answer in answers)
    assert not any(model.arch.mask_token_id in ids for ids in seen)


def test_memory_bounds_the_batch(models) -> None:
    model = models["dream"]
    engine = Engine(model, DreamSampler(), **DREAM_SCHEDULE)
    rows = [engine.begin(i, prompt) for i, prompt in enumerate(prompts())]
    one = row_bytes(model.arch, 14 + 8, 8)
    assert [engine.room(rows, free) for free in (0.0, one, 4 * one, float("inf"))] == [1, 1, 3, 512 // 22]
    assert engine.room(rows, 15 * one) == 12 < engine.room(rows[:4], 15 * one)


def test_prompts_may_be_lists_or_tensors(models) -> None:
    engine = Engine(models["llada"], LLaDASampler(), **LLADA_SCHEDULE)
    (of_list,), (of_tensor,) = (engine.generate([Prompt(ids, "a")]) for ids in ([3, 1, 4], torch.tensor([3, 1, 4])))
    assert of_list == of_tensor
    for wrong, message in (
        ("text", "got str"),
        ([0.5], "got torch.float32"),
        (torch.ones(1, 2).long(), r"shape \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=f"token ids are whole numbers in a row; .*{message}"):
            engine.generate([Prompt(wrong, "a")])


def test_settings_that_cannot_run(models) -> None:
    model = models["llada"]
    with pytest.raises(
        ValueError, match=r"(?s)block_length=3 does not divide gen_length=8.*batch_size=0 is not a positive"
    ):
        Engine(model, LLaDASampler(), gen_length=8, block_length=3, steps=8, batch_size=0)
    with pytest.raises(ValueError, match="eos_token_id=999 is not a token of the model"):
        Engine(model, LLaDASampler(suppress_eos_logits=True, eos_token_id=999), **LLADA_SCHEDULE)
    with pytest.raises(ValueError, match="prompt 1 has no token; give at least one"):
        Engine(model, LLaDASampler(), **LLADA_SCHEDULE).generate([Prompt([1], "a"), Prompt([], "b")])
