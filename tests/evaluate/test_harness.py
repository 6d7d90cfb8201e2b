"""lm-eval's model interface around a mask predictor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import TinyCheckpoint
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dqx.diffusion import SeededNoise, greedy_matches, log_likelihood
from dqx.diffusion.batches import Request
from dqx.diffusion.samplers import DreamSampler, LLaDASampler
from dqx.evaluate.ending import Ending
from dqx.evaluate.harness import DiffusionHarness, HarnessTask, encode, encode_pair, end_tokens
from dqx.evaluate.session import EvaluationSession
from dqx.evaluate.settings import EvaluationSettings
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.tokenizer import load_tokenizer

END = 256


def request(context: str, second: object, kind: str = "generate_until", doc: int = 0, choice: int = 0) -> Instance:
    return Instance(kind, {}, (context, second), choice, metadata=("task", doc, 1))


def generation(context: str, doc: int = 0, n: int = 8, until: tuple[str, ...] = ()) -> Instance:
    return request(context, {"until": list(until), "max_gen_toks": n, "block_length": 4, "steps": n}, doc=doc)


def recorded(model) -> list[list[list[int]]]:
    """The token ids of every forward from now on."""
    seen: list[list[list[int]]] = []
    whole = model.logits_where

    def logits_where(ids, *rest):
        seen.append(ids.tolist())
        return whole(ids, *rest)

    model.logits_where = logits_where
    return seen


QUIET = EvaluationSettings(progress=False)


@pytest.fixture
def parts(tiny_checkpoint: TinyCheckpoint):
    checkpoint = inspect(str(tiny_checkpoint("llada", max_sequence_length=64)))
    return load_weights(checkpoint), load_tokenizer(checkpoint)


def test_pairs_are_split_as_lm_eval_splits_them() -> None:
    words = ["Ġ", "a", "b", "Ġa", "Ġb", "ab", "Ċ", "Ġab"]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("Ġa", "b")]
    bpe = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    theirs = SimpleNamespace(
        backend="causal", tok_encode=lambda text: tokenizer(text, add_special_tokens=False).input_ids
    )
    for context, continuation in [
        ("a", " b"),
        ("a ", "b"),
        ("a  \n", "ab"),
        ("ab a", " ab b"),
        ("a\n", "b"),
    ]:
        expected = TemplateLM._encode_pair(theirs, context, continuation)
        assert encode_pair(tokenizer, context, continuation, 99) == expected
    # where a token reaches over the boundary, lm-eval would leave the beginning out, or all of it
    assert TemplateLM._encode_pair(theirs, "a", "b") == ([1], [])
    assert encode_pair(tokenizer, "a", "b", 99) == ([1], [2])
    assert encode_pair(tokenizer, "a", "b ab", 99) == ([1], [2, 7])
    assert encode_pair(tokenizer, "", "ab", 99) == ([99], [5])
    assert encode_pair(tokenizer, " ", "a", 99) == ([99], [3])


def test_likelihoods_are_those_of_the_estimator_whatever_the_order(parts) -> None:
    model, tokenizer = parts
    requests = [
        request(f"Question {doc}:", answer, "loglikelihood", doc, choice)
        for doc in range(2)
        for choice, answer in enumerate((" yes", " no"))
    ]
    harness = DiffusionHarness(
        model, tokenizer, LLaDASampler(), EvaluationSettings(seed=3, progress=False), HarnessTask(mc_samples=4)
    )
    values = harness.loglikelihood(requests)
    assert harness.n_forwards < 16  # some draws of a choice mask the same tokens
    again = DiffusionHarness(
        model, tokenizer, LLaDASampler(), EvaluationSettings(seed=3, progress=False), HarnessTask(mc_samples=4)
    )
    assert again.loglikelihood(requests[::-1])[::-1] == values
    prefix, target = (torch.tensor(tokenizer(text).input_ids) for text in ("Question 1:", " no"))
    expected = log_likelihood(model, prefix, target, samples=4, seed=3, key=("task", 1, 1))
    assert values[3] == (pytest.approx(expected.value, rel=1e-12), False)
    assert len({value for value, _ in values}) == 4


def test_greedy_flag_only_on_request(parts) -> None:
    model, tokenizer = parts
    model.head.weight.zero_()  # all tokens are equally likely, and the first one, "!", wins
    requests = [request("Question:", answer, "loglikelihood") for answer in ("!!", "!?")]
    for greedy, flags, forwards in [(False, [False, False], 1), (True, [True, False], 5)]:
        harness = DiffusionHarness(model, tokenizer, LLaDASampler(), QUIET, HarnessTask(mc_samples=1, greedy=greedy))
        assert [flag for _, flag in harness.loglikelihood(requests)] == flags
        assert harness.n_forwards == forwards


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_greedy_flags_are_those_of_the_plain_decoder(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    """In batches of targets of one length, half of which greedy decoding writes."""
    checkpoint = inspect(str(tiny_checkpoint(family)))
    model, tokenizer = load_weights(checkpoint), load_tokenizer(checkpoint)
    random = torch.Generator().manual_seed(0)
    asked = []
    for n, length in ((9, 1), (17, 3), (1, 3), (12, 5), (9, 3)):
        prefix = torch.randint(0, 200, (n,), generator=random)
        written = LLaDASampler().generate(model, prefix[None], gen_length=length, steps=length).ids[0]
        asked += [Request(prefix, written), Request(prefix, written.roll(1) + 1)]
    session = EvaluationSession([], [])
    harness = DiffusionHarness(model, tokenizer, LLaDASampler(), QUIET, HarnessTask(greedy=True))
    flags = harness.greedy_flags(dict(enumerate(asked)), session)
    expected = [greedy_matches(model, one.prefix, one.target) for one in asked]
    assert [flags[i] for i in range(len(asked))] == expected
    assert session.spent["n_forwards"] == 2 * (1 + 3 + 3 + 5 + 3)
    assert {True, False} == set(expected)


@pytest.mark.parametrize(
    ("written", "until", "text"),
    [
        ("one\ntwo", ("\n",), "one"),
        ("one two", ("wo", "two"), "one "),  # the earliest, not the first listed
        ("one<|eot_id|>two", (), "one"),
        ("one<|endoftext|><|endoftext|>", ("zzz",), "one"),
        ("one<|mdm_mask|>two", ("<|mdm_mask|>",), "one"),  # a stop string that is a special token
        ("one<|mdm_mask|>two", (), "onetwo"),
        ("\none", ("\n",), ""),
        ("one", ("",), "one"),
    ],
)
def test_answers_end_at_stop_strings_and_end_tokens(parts, written: str, until: tuple[str, ...], text: str) -> None:
    """And from the moment that the beginning of an answer settles it, the rest changes nothing."""
    model, tokenizer = parts
    ids = tokenizer(written, add_special_tokens=False).input_ids
    ending = Ending(tokenizer, end_tokens(model, tokenizer), until)
    assert ending.text(ids) == text
    settled = [n for n in range(len(ids) + 1) if ending.settled(ids[:n])]
    assert {ending.text(ids[:n]) for n in settled} <= {text}
    assert bool(settled) == (written not in ("one<|mdm_mask|>two", "one") or "<|mdm_mask|>" in until)


@pytest.mark.parametrize(
    ("written", "until", "settled"),
    [
        ("a stop", ("stop",), True),
        ("a sto", ("stop",), False),
        ("one two", ("wo", "two three"), False),  # "two three" began earlier and may become complete
        ("one two th.", ("wo", "two three"), True),
        ("two one two", ("two", "one"), True),
        ("one<|endoftext|>", (), True),
        ("one<|mdm_mask|>", (), False),
        ("one<|mdm_mask|>", ("<|mdm_mask|>",), True),
        ("anything", ("",), False),
    ],
)
def test_when_an_answer_is_settled(parts, written: str, until: tuple[str, ...], settled: bool) -> None:
    model, tokenizer = parts
    ending = Ending(tokenizer, end_tokens(model, tokenizer), until)
    assert ending.settled(tokenizer(written, add_special_tokens=False).input_ids) == settled


def test_half_a_character_settles_nothing(parts) -> None:
    model, tokenizer = parts
    ids = tokenizer("aé.", add_special_tokens=False).input_ids
    ending = Ending(tokenizer, end_tokens(model, tokenizer), ("é", "\ufffd"))
    assert [ending.settled(ids[:n]) for n in range(5)] == [False, False, False, True, True]


def test_long_prompts_lose_their_beginning_and_this_is_recorded(parts) -> None:
    model, tokenizer = parts  # 64 tokens fit
    harness = DiffusionHarness(model, tokenizer, LLaDASampler(), QUIET, HarnessTask(mc_samples=1))
    asked = recorded(model)
    text = "".join(chr(97 + i % 26) for i in range(70))
    harness.generate_until([generation(text, doc=0), generation(text[:56], doc=1)])
    assert [tokenizer.decode(row[:56]) for row in asked[0]] == [text[-56:], text[:56]]
    assert harness.truncated == {("task", 0): 14}
    harness.loglikelihood([request(text, " yes", "loglikelihood", doc=2)])
    assert harness.truncated == {("task", 0): 14, ("task", 2): 10}
    with pytest.raises(ValueError, match="64 new tokens leave no room for a prompt in the model's max_length=64"):
        harness.generate_until([generation("Q", n=64)])


def test_a_choice_longer_than_the_model_is_cut_and_this_is_recorded(parts) -> None:
    model, tokenizer = parts  # 64 tokens fit
    harness = DiffusionHarness(model, tokenizer, LLaDASampler(), QUIET, HarnessTask(mc_samples=2))
    values = harness.loglikelihood(
        [request("Q:", " " + "ab" * 40, "loglikelihood"), request("Q:", " c", "loglikelihood", doc=1)]
    )
    assert all(value < 0 for value, _ in values)
    assert harness.truncated == {("task", 0): 2 + 81 - 64}


def test_the_mask_tokens_text_is_text(parts) -> None:
    model, tokenizer = parts
    mask = model.arch.mask_token_id
    spelled = tokenizer.convert_ids_to_tokens(mask)
    ids = encode(tokenizer, f"a {spelled}{spelled} b", mask)
    assert mask not in ids
    assert tokenizer.decode(ids) == f"a {spelled}{spelled} b"
    assert encode(tokenizer, "a b<|eot_id|>", mask) == encode(tokenizer, "a b<|eot_id|>")
    harness = DiffusionHarness(model, tokenizer, LLaDASampler(), QUIET, HarnessTask(mc_samples=4))
    ((value, _),) = harness.loglikelihood([request("Q:", f" {spelled}", "loglikelihood")])
    assert value < -1  # of some ordinary tokens, not 0.0 of none


def test_generation_noise_belongs_to_the_document(parts) -> None:
    model, tokenizer = parts
    sampler = LLaDASampler(temperature=1.0, remasking="random")
    requests = [generation("Same prompt", doc) for doc in range(3)]

    def run(order: list[int], seed: int = 0) -> dict[int, str]:
        harness = DiffusionHarness(model, tokenizer, sampler, EvaluationSettings(seed=seed, progress=False))
        return dict(zip(order, harness.generate_until([requests[i] for i in order]), strict=True))

    together = run([0, 1, 2])
    assert run([2]) | run([1, 0]) == together
    assert len(set(together.values())) == 3
    assert run([0], seed=1) != {0: together[0]}


@pytest.mark.parametrize("sampler", [LLaDASampler(temperature=0.7), LLaDASampler(), DreamSampler(temperature=0.4)])
def test_texts_are_those_of_the_plain_sampler(tiny_checkpoint: TinyCheckpoint, sampler) -> None:
    """Prompts of several lengths, stop strings in the middle of blocks: answers in the order of the requests."""
    checkpoint = inspect(str(tiny_checkpoint("dream" if isinstance(sampler, DreamSampler) else "llada")))
    model, tokenizer = load_weights(checkpoint), load_tokenizer(checkpoint)
    questions = ["one", "three", "two", "seven", "six", "eight", "", "ten", "four"]
    plain = [
        sampler.generate(
            model,
            torch.tensor([tokenizer(text, add_special_tokens=False).input_ids or [END]]),
            gen_length=8,
            block_length=sampler.block_length(4),
            steps=8,
            noise=SeededNoise(0, [("task", i)]),
        )
        for i, text in enumerate(questions)
    ]
    whole = [tokenizer.decode(out.ids[0], skip_special_tokens=True) for out in plain]
    until = tuple(letter for text in whole for letter in text[3:] if letter.isascii())[:5]
    ending = Ending(tokenizer, end_tokens(model, tokenizer), until)
    expected = [ending.text(out.ids[0].tolist()) for out in plain]
    assert len(set(expected)) > 3
    requests = [generation(text, doc=i, until=until) for i, text in enumerate(questions)]
    for size in (1, 3, None):
        harness = DiffusionHarness(model, tokenizer, sampler, QUIET, HarnessTask(batch_size=size))
        assert harness.generate_until(requests) == expected
        assert harness.n_forwards + harness.n_saved == sum(out.n_forwards for out in plain)
        assert harness.n_saved > 0
        assert harness.generated < 8 * len(questions)


def test_an_empty_prompt_starts_from_the_end_token(parts) -> None:
    model, tokenizer = parts
    asked = recorded(model)
    DiffusionHarness(model, tokenizer, LLaDASampler(), QUIET).generate_until([generation("", n=4)])
    assert asked[0] == [[END] + 4 * [model.arch.mask_token_id]]


def test_a_continuation_without_tokens_is_refused(parts) -> None:
    harness = DiffusionHarness(*parts, LLaDASampler(), QUIET)
    with pytest.raises(ValueError, match="has no token of its own"):
        harness.loglikelihood([request("Q", "", "loglikelihood")])


def test_rolling_likelihood_is_refused(parts) -> None:
    with pytest.raises(NotImplementedError, match="no counterpart in a masked diffusion model"):
        DiffusionHarness(*parts, LLaDASampler()).loglikelihood_rolling([])


def test_chat_template(parts) -> None:
    model, tokenizer = parts
    harness = DiffusionHarness(model, tokenizer, LLaDASampler())
    history = [{"role": "user", "content": "Hi"}]
    assert harness.apply_chat_template(history) == "<user>Hi<|eot_id|><assistant>"
    begun = [*history, {"role": "assistant", "content": "He"}]
    assert harness.apply_chat_template(begun, add_generation_prompt=False) == "<user>Hi<|eot_id|><assistant>He"
    tokenizer.chat_template = (
        "{{ raise_exception('no system') if messages[0].role == 'system' else messages[0].content }}"
    )
    assert harness.apply_chat_template([{"role": "system", "content": "Be nice"}, *history]) == "Hi"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        harness.apply_chat_template(history)


def test_dream_needs_no_block_length(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = inspect(str(tiny_checkpoint("dream")))
    model, tokenizer = load_weights(checkpoint), load_tokenizer(checkpoint)
    harness = DiffusionHarness(model, tokenizer, DreamSampler(), QUIET, HarnessTask(mc_samples=2))
    assert len(harness.generate_until([generation("Question:", n=8)])) == 1
    assert harness.loglikelihood([request("Question:", " yes", "loglikelihood")])[0][0] < 0
