"""Likelihoods of models that write block by block: sums over blocks, each bounded by masks inside it, or exact."""

from __future__ import annotations

import math
import random
from itertools import permutations

import pytest
import torch
from goldens import GOLDEN3, golden
from torch import Tensor

from dqx.api import load
from dqx.diffusion.batches import Request
from dqx.diffusion.likelihood import log_likelihood
from dqx.diffusion.samplers.blockwise import BlockwiseSampler, Pass, Recomputed
from dqx.diffusion.samplers.fast_dllm import FastDLLMSampler
from dqx.diffusion.samplers.nemotron import AutoregressiveSampler, NemotronSampler, SpeculativeSampler
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.diffusion.scorer import Scorer
from dqx.diffusion.stopping import Question
from dqx.models.architecture import CAUSAL, FULL, Attention
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.layout import Layout
from dqx.models.transformer import MaskedDiffusionTransformer

#: Our name, the golden set and the mask token where the checkpoint does not name it, a sampler with short blocks.
CASES: dict[str, tuple[str, int | None, BlockwiseSampler]] = {
    "sdar": ("sdar", 151, SDARSampler(block=4)),
    "fast_dllm": ("fastdllm2", 150, FastDLLMSampler(block=8, sub_block=4)),
    "nemotron": ("nemotron", None, NemotronSampler(block=4)),
    "autoregressive": ("nemotron", None, AutoregressiveSampler()),
}
SAMPLES = 6


def attention_of_final_tokens(sampler: BlockwiseSampler) -> Attention:
    """By the papers: block by block for SDAR and Fast-dLLM v2, causal for Nemotron-Labs-Diffusion."""
    return Attention(sampler.block) if isinstance(sampler, SDARSampler | FastDLLMSampler) else CAUSAL


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusionTransformer]:
    found = {}
    for case, (name, mask, _) in CASES.items():
        found[case] = load_weights(inspect(str(GOLDEN3 / f"{name}_tiny"), mask_token_id=mask)).eval()
    return found


def ids(n: int, seed: int) -> Tensor:
    return torch.randint(0, 90, (n,), generator=torch.Generator().manual_seed(seed))


def ragged() -> list[Request]:
    """Prefixes of 1 to 13 tokens, targets of 0 to 11; the choices of a question share a prefix, some tokens too."""
    lengths, found = random.Random(0), []
    for question in range(3):
        prefix, common = ids(lengths.randint(1, 13), seed=question), ids(5, seed=50 + question)
        for choice, length in enumerate((0, 1, 1, 4, 11 - 3 * question)):
            target = ids(length, seed=100 * question + choice)
            if choice > 2:
                target[:3] = common[:3]
            found.append(Request(prefix, target, ("task", question, choice)))
    return found


def scorer(case: str, models, samples: int = SAMPLES, **settings) -> Scorer:
    model = models[case]
    factorization = CASES[case][2].factorization()
    return Scorer(model, samples=samples, seed=3, factorization=factorization, **settings)


def plain(case: str, models, requests: list[Request], samples: int = SAMPLES) -> list[float]:
    model, factorization = models[case], CASES[case][2].factorization()
    return [
        log_likelihood(model, r.prefix, r.target, samples=samples, seed=3, key=r.key, factorization=factorization).value
        for r in requests
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_plain_ones_in_any_batches_and_any_order(case, models) -> None:
    requests = ragged()
    expected = plain(case, models, requests)
    for batch_tokens in (1, 40, 150, 10**6):
        assert scorer(case, models, batch_tokens=batch_tokens).score(requests) == pytest.approx(expected, abs=2e-4)
    shuffled = random.Random(1).sample(range(len(requests)), len(requests))
    found = scorer(case, models, batch_tokens=150).score(requests)
    again = scorer(case, models, batch_tokens=150).score([requests[i] for i in shuffled])
    assert [found[i] for i in shuffled] == again


# what is computed, from the model's own forward


def block_rows(case: str, model: MaskedDiffusionTransformer, text: Tensor, block: Tensor) -> Tensor:
    """Log-probabilities [W, V] of the tokens of a block behind a final text, each in the row of its own token."""
    runner, final = Recomputed(model), attention_of_final_tokens(CASES[case][2])
    if len(text):
        runner.run(Pass(text, final, stored=True))
    logits, _ = runner.run(Pass(block, FULL, stored=False, look=torch.ones(len(block), dtype=torch.bool)))
    if model.arch.logit_shift:
        logits = torch.cat((logits[:1], logits[:-1]))
    return logits.double().log_softmax(-1)


def next_token(case: str, model: MaskedDiffusionTransformer, text: Tensor) -> Tensor:
    """Log-probabilities [V] of the token behind a final text, by its last row."""
    layout = Layout.of(text[None], None, attention_of_final_tokens(CASES[case][2]))
    states = list(model.hidden_states(text[None], layout=layout))
    return model.head(states[-1])[0, -1].double().log_softmax(-1)


#: Prefix, target, and by hand: where the block of its masked tokens begins, how many tokens are predicted ahead of it.
HAND = [
    ("sdar", 6, 2, 4, 0),
    ("sdar", 4, 3, 4, 0),
    ("fast_dllm", 10, 3, 8, 0),
    ("fast_dllm", 8, 4, 8, 1),
    ("nemotron", 6, 4, 6, 1),
    ("nemotron", 6, 1, 6, 1),
]


@pytest.mark.parametrize(("case", "before", "length", "start", "ahead"), HAND)
@torch.no_grad()
def test_the_bound_is_the_mean_over_the_orders_in_which_a_block_may_be_written(
    case, before, length, start, ahead, models
) -> None:
    """log p is that of the mean probability over the orders, the bound the mean of their log-probabilities."""
    model = models[case]
    prefix, target = ids(before, 1), ids(length, 2)
    text = torch.cat((prefix, target))
    size = 8 if case == "fast_dllm" else 4
    certain = float(next_token(case, model, prefix)[target[0]]) if ahead else 0.0
    known = before + ahead
    chains = []
    for order in permutations(range(known, before + length)):
        block = torch.full((size,), model.arch.mask_token_id)
        block[: known - start] = text[start:known]
        chain = certain
        for at in order:
            chain += float(block_rows(case, model, text[:start], block)[at - start, text[at]])
            block[at - start] = text[at]
        chains.append(chain)
    mean, log_p = sum(chains) / len(chains), float(torch.tensor(chains).double().logsumexp(0)) - math.log(len(chains))
    exact = scorer(case, models, samples=2**length, exact=True)
    assert exact.score([Request(prefix, target)]) == pytest.approx([mean], abs=2e-4)
    assert mean <= log_p + 1e-9
    assert (mean == pytest.approx(log_p)) == (length - ahead < 2)


def test_the_autoregressive_likelihood_is_that_of_the_recorded_causal_logits(models) -> None:
    """They come from transformers' own class of the model."""
    data = golden("nemotron_forward", GOLDEN3)
    tokens, logits = data["input_ids"][0].long(), data["causal.logits"][0].double().log_softmax(-1)
    one_by_one = logits[:-1].gather(1, tokens[1:, None])[:, 0]
    found = scorer("autoregressive", models)
    values = found.score([Request(tokens[:n], tokens[n:]) for n in (1, 9, len(tokens) - 1)])
    assert values == pytest.approx([float(one_by_one[n - 1 :].sum()) for n in (1, 9, len(tokens) - 1)], abs=1e-3)
    assert found.n_forwards == 1  # of which the others read
    assert SpeculativeSampler().factorization() == found.factorization


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_independent_terms(case, models) -> None:
    """log p(a b | c) = log p(a | c) + log p(b | c a) where the cut is one between blocks, by enumeration."""
    start = 8 if case == "fast_dllm" else 4
    prefix, target = ids(start, 5), ids(11, 6)
    cut = 8 if case == "fast_dllm" else 4
    whole, first, second = scorer(case, models, samples=128, exact=True).score(
        [
            Request(prefix, target),
            Request(prefix, target[:cut]),
            Request(torch.cat((prefix, target[:cut])), target[cut:]),
        ]
    )
    assert whole == pytest.approx(first + second, abs=2e-4)


# no more work than needed


@pytest.mark.parametrize(("case", "tokens"), [("sdar", 8 + 4), ("nemotron", 9), ("autoregressive", 9)])
def test_choices_of_one_token_share_one_state(case, tokens, models) -> None:
    """Where final tokens predict it, the text alone; otherwise one block behind it."""
    prefix = ids(9, 1)
    requests = [Request(prefix, [t], ("mmlu", 0, i)) for i, t in enumerate((3, 9, 50))]
    found = scorer(case, models, samples=128)
    assert found.score(requests) == pytest.approx(plain(case, models, requests), abs=2e-4)
    assert (found.n_forwards, found.n_tokens) == (1, tokens)


def test_a_text_is_computed_once_beside_the_states_of_all_its_blocks(models) -> None:
    request = Request(ids(1, 1), ids(23, 2), ("text",))
    found = scorer("sdar", models, samples=128, batch_tokens=10**6)
    found.score([request])
    states = 7 + 5 * 15  # the first block has a token of the prefix
    assert found.n_forwards == 2  # lines of up to 256 tokens
    assert 20 + 4 * states < found.n_tokens <= 2 * 20 + 4 * states


@pytest.mark.parametrize("case", ["sdar", "nemotron"])
def test_padding_and_a_full_memory_change_nothing(case, models, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = models[case], ragged()
    expected = scorer(case, models, batch_tokens=10**6).score(requests)
    forward = model.head_rows

    def crowded(ids: Tensor, *others) -> Tensor:
        if ids.numel() > 90:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, *others)

    monkeypatch.setattr(model, "head_rows", crowded)
    found = scorer(case, models, batch_tokens=10**6)
    assert found.score(requests) == pytest.approx(expected, abs=2e-4)
    assert found.notes == ["likelihood batches were made smaller because the GPU's memory was full"]


@pytest.mark.parametrize("case", ["sdar", "nemotron"])
def test_a_continued_run_has_the_same_bits(case, models) -> None:
    requests, told, portions = ragged(), [], []
    whole = scorer(case, models, batch_tokens=60)
    expected = whole.score(requests, finished=portions.append, progress=told.append)
    assert sum(told) == sum(map(whole.work, requests))
    known = {i: value for portion in portions[:-1] for i, value in portion.items()}
    assert 0 < len(known) < len(requests)
    rest = scorer(case, models, batch_tokens=60)
    assert rest.score(requests, known=known) == expected
    assert 0 < rest.n_forwards < whole.n_forwards


def test_draws_until_a_question_is_decided(models) -> None:
    model, prefix = models["nemotron"], ids(6, 0)
    answer = NemotronSampler(block=8).generate(model, prefix[None], gen_length=8, steps=8).ids[0]
    requests = [Request(prefix, target, ("task", 0, i)) for i, target in enumerate((ids(8, 3), answer))]
    factorization = NemotronSampler(block=8).factorization()
    found = {}
    for level in (None, 0.01):
        one = Scorer(model, samples=64, seed=0, factorization=factorization, error_level=level)
        values = one.score(requests, [Question([0, 1], [1.0, 1.0])])
        found[level] = (values[1] > values[0], one.n_tokens)
    assert [right for right, _ in found.values()] == [True, True]
    assert found[0.01][1] < found[None][1] / 2


def test_what_cannot_be_computed_is_refused(models) -> None:
    model = models["nemotron"]
    with pytest.raises(ValueError, match=r"attention is block by block.* give factorization=sampler\.factorization"):
        Scorer(model, samples=1, seed=0)
    with pytest.raises(ValueError, match="attention is block by block"):
        log_likelihood(model, [1], [2], samples=1, seed=0)
    with pytest.raises(ValueError, match="block by block there is no guidance"):
        scorer("sdar", models, cfg_scale=0.5)
    with pytest.raises(ValueError, match=r"sampler\.causal_context=false .* leave it true for likelihood"):
        NemotronSampler(causal_context=False).factorization()
    with pytest.raises(ValueError, match="nothing that predicts its first token; give a prefix"):
        scorer("nemotron", models).score([Request([], [3])])
    assert scorer("sdar", models).score([Request([], [3])])[0] < 0


def test_a_trained_model_finds_its_text_likely() -> None:
    """In blocks as it was trained with; less so in those of twice the length."""
    lm = load("nano_block")
    block = lm.model.arch.block_length
    nats = {}
    for size in (block, 2 * block):
        lm.sampler = SDARSampler(block=size)
        nats[size] = lm.evaluate("nano_text", limit=4)["nano_text"].value
    assert nats[block] < 1.2 < math.log(lm.model.arch.vocab_size) / 4
    assert nats[block] < nats[2 * block]
