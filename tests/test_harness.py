"""lm-eval's model interface around a mask predictor."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from conftest import TinyCheckpoint
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dqx.diffusion import DreamSampler, Generation, LLaDASampler, log_likelihood
from dqx.evaluate.harness import DiffusionHarness, encode_pair
from dqx.models import inspect, load_weights
from dqx.models.tokenizer import load_tokenizer

END = 256


@dataclass
class Dictated:
    """A sampler that writes given tokens and remembers what it was asked for."""

    ids: list[int]
    asked: list[dict] = field(default_factory=list)

    def problems(self, gen_length: int, block_length: int | None, steps: int) -> list[str]:
        return []

    def generate(self, model: object, prompt: Tensor, **settings: object) -> Generation:
        self.asked += [{"prompt": row, **settings} for row in prompt.tolist()]
        return Generation(torch.tensor([self.ids] * len(prompt)), 7 * len(prompt))


def request(context: str, second: object, kind: str = "generate_until", doc: int = 0, choice: int = 0) -> Instance:
    return Instance(kind, {}, (context, second), choice, metadata=("task", doc, 1))


def generation(context: str, doc: int = 0, n: int = 8, until: tuple[str, ...] = ()) -> Instance:
    return request(context, {"until": list(until), "max_gen_toks": n, "block_length": 4, "steps": n}, doc=doc)


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
        ("a", "b"),
        ("ab a", " ab b"),
        ("a\n", "b"),
    ]:
        expected = TemplateLM._encode_pair(theirs, context, continuation)
        assert encode_pair(tokenizer, context, continuation, 99) == expected
    assert encode_pair(tokenizer, "", "ab", 99) == ([99], [5])
    assert encode_pair(tokenizer, " ", "a", 99) == ([99], [3])


def test_likelihoods_are_those_of_the_estimator_whatever_the_order(parts) -> None:
    model, tokenizer = parts
    requests = [
        request(f"Question {doc}:", answer, "loglikelihood", doc, choice)
        for doc in range(2)
        for choice, answer in enumerate((" yes", " no"))
    ]
    harness = DiffusionHarness(model, tokenizer, LLaDASampler(), seed=3, mc_samples=4, progress=False)
    values = harness.loglikelihood(requests)
    assert harness.n_forwards < 16  # some draws of a choice mask the same tokens
    again = DiffusionHarness(model, tokenizer, LLaDASampler(), seed=3, mc_samples=4, progress=False)
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
        harness = DiffusionHarness(model, tokenizer, LLaDASampler(), mc_samples=1, greedy=greedy, progress=False)
        assert [flag for _, flag in harness.loglikelihood(requests)] == flags
        assert harness.n_forwards == forwards


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
    model, tokenizer = parts
    ids = tokenizer(written, add_special_tokens=False).input_ids
    harness = DiffusionHarness(model, tokenizer, Dictated(ids), progress=False)
    assert harness.generate_until([generation("Q", n=len(ids), until=until)]) == [text]
    assert (harness.n_forwards, harness.generated) == (7, len(ids))


def test_long_prompts_lose_their_beginning_and_this_is_recorded(parts) -> None:
    model, tokenizer = parts  # 64 tokens fit
    sampler = Dictated([65] * 8)
    harness = DiffusionHarness(model, tokenizer, sampler, mc_samples=1, progress=False)
    text = "".join(chr(97 + i % 26) for i in range(70))
    harness.generate_until([generation(text, doc=0), generation(text[:56], doc=1)])
    assert [tokenizer.decode(a["prompt"]) for a in sampler.asked] == [text[-56:], text[:56]]
    assert harness.truncated == {("task", 0): 14}
    harness.loglikelihood([request(text, " yes", "loglikelihood", doc=2)])
    assert harness.truncated == {("task", 0): 14, ("task", 2): 10}
    with pytest.raises(ValueError, match="64 new tokens leave no room for a prompt in the model's max_length=64"):
        harness.generate_until([generation("Q", n=64)])


def test_generation_noise_belongs_to_the_document(parts) -> None:
    model, tokenizer = parts
    sampler = LLaDASampler(temperature=1.0, remasking="random")
    requests = [generation("Same prompt", doc) for doc in range(3)]

    def run(order: list[int], seed: int = 0) -> dict[int, str]:
        harness = DiffusionHarness(model, tokenizer, sampler, seed=seed, progress=False)
        return dict(zip(order, harness.generate_until([requests[i] for i in order]), strict=True))

    together = run([0, 1, 2])
    assert run([2]) | run([1, 0]) == together
    assert len(set(together.values())) == 3
    assert run([0], seed=1) != {0: together[0]}


@pytest.mark.parametrize("sampler", [LLaDASampler(temperature=0.7), LLaDASampler(), DreamSampler(temperature=0.4)])
def test_generation_in_batches_is_generation_one_by_one(tiny_checkpoint: TinyCheckpoint, sampler) -> None:
    """Prompts of several lengths, some of them equal: the same answers in the order of the requests."""
    checkpoint = inspect(str(tiny_checkpoint("dream" if isinstance(sampler, DreamSampler) else "llada")))
    model, tokenizer = load_weights(checkpoint), load_tokenizer(checkpoint)
    texts = ["one", "three", "two", "seven", "six", "eight", "", "ten", "four"]
    requests = [generation(text, doc=i) for i, text in enumerate(texts)]

    def answers(batch_size: int) -> list[str]:
        harness = DiffusionHarness(model, tokenizer, sampler, batch_size=batch_size, progress=False)
        found = harness.generate_until(requests)
        assert harness.generated == 8 * len(texts)
        return found

    alone = answers(1)
    assert len(set(alone)) > 3
    assert answers(3) == answers(8) == alone


def test_an_empty_prompt_starts_from_the_end_token(parts) -> None:
    model, tokenizer = parts
    sampler = Dictated([65])
    DiffusionHarness(model, tokenizer, sampler, progress=False).generate_until([generation("", n=1)])
    assert sampler.asked[0]["prompt"] == [END]


def test_a_continuation_without_tokens_is_refused(parts) -> None:
    harness = DiffusionHarness(*parts, LLaDASampler(), progress=False)
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
    harness = DiffusionHarness(model, tokenizer, DreamSampler(), mc_samples=2, progress=False)
    assert len(harness.generate_until([generation("Question:", n=8)])) == 1
    assert harness.loglikelihood([request("Question:", " yes", "loglikelihood")])[0][0] < 0
