"""lm-eval's view of a masked diffusion model: text requests in, log-likelihoods and generated text out.

Requests are answered in batches (`dqx/diffusion/scorer.py`, `engine.py`), over several processes and sessions
(`session.py`). Their noise is a function of (seed, task, document, choice): order and number do not matter.

We differ from the LLaDA authors' lm-eval class: the greedy flag costs extra forwards and is computed only where a
metric reads it, and an answer ends at its first end token as well as at the first stop string (theirs drops end
tokens and keeps what follows them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dqx.common.digest import digest
from dqx.common.files import jsonable
from dqx.diffusion.batches import Request
from dqx.diffusion.block_engine import engine_for
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.samplers import Sampler, greedy
from dqx.diffusion.scorer import Scorer
from dqx.diffusion.stopping import Question
from dqx.evaluate.ending import Ending
from dqx.evaluate.journal import Journal
from dqx.evaluate.session import Document, EvaluationSession, progress_bar, score
from dqx.evaluate.settings import EvaluationSettings
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.models.vocabulary import text_ids

#: Tokens that end an answer or a turn in the two families, besides the end tokens of model and tokenizer.
END_TOKENS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>")


class Answered(Exception):
    """All requests are answered, and this is not the main process, which alone goes on to scores."""


@dataclass(frozen=True)
class HarnessTask:
    """What one task asks of the harness."""

    label: str = ""  # beside the progress bar
    mc_samples: int = 128  # draws per choice for likelihoods
    batch_size: int | None = None  # answers written at a time; None: as many as busy the device and fit its memory
    greedy: bool = False  # whether likelihoods say if greedy decoding writes the target; else they say False
    scale: Callable[[Instance], float] = lambda request: 1.0  # divides a likelihood before adaptive draws compare it


class DiffusionHarness(LM):
    """An lm-eval model around a mask predictor, its tokenizer and a sampler.

    Lengths and steps of a generation come with each request, as `max_gen_toks`, `block_length` and `steps` of its
    generation settings. Finished documents go to the `journal`, and those found there are not computed again. With
    several processes each has its share of a call; then all answers are returned in the main one, and the others raise
    Answered.

    Over all calls, processes and sessions, `n_forwards` counts sequences through the model, `n_tokens` their
    tokens that were computed, `n_saved` sequences that were not needed because an answer had ended, `generated` the
    tokens written (prompts never count). `earlier` has the seconds of earlier sessions, `truncated` the tokens cut from
    the left of prompts that did not fit, by (task, document), `took` the sequences that an answer took and the tokens
    written in them, where their number depends on the model, and `notes` what a reader of the results should know.
    """

    def __init__(
        self,
        model: MaskedDiffusionTransformer,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        settings: EvaluationSettings | None = None,
        task: HarnessTask | None = None,
        journal: Journal | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.settings, self.task, self.journal = settings or EvaluationSettings(), task or HarnessTask(), journal
        self.n_forwards = self.n_tokens = self.n_saved = self.generated = 0
        self.earlier = 0.0
        self.truncated: dict[tuple[str, int], int] = {}
        self.took: dict[tuple[str, int], tuple[int, int]] = {}
        self.notes: list[str] = []
        self.end_tokens = end_tokens(model, tokenizer)

    # what lm-eval asks of a model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The history as one prompt; a template that refuses system messages gets the history without them.

        Raises ValueError where the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; set model.chat=false, or use an instruct checkpoint")

        def render(messages: list[dict[str, str]]) -> str:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        try:
            return render(chat_history)
        except TemplateError:
            return render([message for message in chat_history if message["role"] != "system"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError(
            "rolling log-likelihood (perplexity tasks) has no counterpart in a masked diffusion model: "
            "use multiple-choice or generation tasks"
        )

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(nats, greedy flag) of each request's continuation after its context."""
        scorer = Scorer(
            self.model,
            samples=self.task.mc_samples,
            seed=self.settings.seed,
            exact=self.settings.likelihood.exact,
            error_level=self.settings.likelihood.error_level if self.settings.likelihood.adaptive else None,
            batch_tokens=self.settings.likelihood.batch_tokens,
            factorization=self.sampler.factorization(),
        )
        asked = self._likelihood_requests(requests)
        session = EvaluationSession(documents(requests), [scorer.work(request) for request in asked], self.journal)

        def answers(values: dict[int, float]) -> dict[int, tuple[float, bool]]:
            flags = self.greedy_flags({i: asked[i] for i in values}, session) if self.task.greedy else {}
            return {i: (nats, flags.get(i, False)) for i, nats in values.items()}

        score(
            scorer,
            asked,
            session,
            self._questions(requests),
            answers=answers,
            known=lambda answer: float(answer[0]),
            label=self.task.label,
            shown=self.settings.progress,
        )
        return [(float(nats), bool(flag)) for nats, flag in self._gather(session)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The generated text of each request, cut before its first stop string or end token; no more is written."""
        prompts = [self._prompt(request) for request in requests]
        counts = [self.steps(request) for request in requests]
        # tokens through the model that an answer takes at most
        work = [
            (len(prompt.ids) + request.args[1]["max_gen_toks"]) * count
            for prompt, request, count in zip(prompts, requests, counts, strict=True)
        ]
        session = EvaluationSession(documents(requests), work, self.journal)
        with progress_bar(
            sum(counts[i] for i in session.todo), self.task.label, "steps", shown=self.settings.progress
        ) as bar:
            for indices in alike(requests, session.todo):
                settings = requests[indices[0]].args[1]
                until = settings.get("until") or []
                ending = Ending(self.tokenizer, self.end_tokens, [until] if isinstance(until, str) else until)
                engine = engine_for(self.sampler)(
                    self.model,
                    self.sampler,
                    gen_length=settings["max_gen_toks"],
                    block_length=self.sampler.block_length(settings.get("block_length")),
                    steps=counts[indices[0]],
                    seed=self.settings.seed,
                    settled=ending.settled,
                    batch_size=self.task.batch_size,
                    progress=bar.update,
                )
                for at, answer in engine.stream([prompts[i] for i in indices]):
                    session.spend(
                        n_forwards=answer.n_forwards,
                        n_tokens=answer.n_tokens,
                        n_saved=answer.n_saved,
                        tokens=answer.n_written,
                    )
                    session.note(engine.notes)
                    session.enter({indices[at]: (ending.text(answer.ids), answer.n_forwards, answer.n_written)})
        answers = self._gather(session)
        if self.sampler.forwards_vary:
            took = ((int(forwards), int(tokens)) for _, forwards, tokens in answers)
            self.took.update(zip(map(document_key, requests), took, strict=True))
        return [str(text) for text, *_ in answers]

    # the pieces

    def steps(self, request: Instance) -> int:
        """The denoising steps of a request's answer."""
        settings = request.args[1]
        return self.sampler.steps_for(settings["max_gen_toks"], settings.get("steps"))

    def _gather(self, session: EvaluationSession) -> list[Any]:
        """The answers to all requests, and what they cost. Raises Answered in all processes but the main one."""
        answers = session.gather()
        self.n_forwards += session.spent["n_forwards"]
        self.n_tokens += session.spent["n_tokens"]
        self.n_saved += session.spent["n_saved"]
        self.generated += session.spent["tokens"]
        self.earlier += session.past.spent["nanoseconds"] / 1e9
        self.notes += session.notes + self._draws_note(session)
        if not session.processes.main:
            raise Answered
        return answers

    def greedy_flags(self, asked: Mapping[int, Request], session: EvaluationSession) -> dict[int, bool]:
        """`likelihood.greedy_matches` of each request, in batches of targets of one length."""
        flags = {}
        lengths = sorted({len(request.target) for request in asked.values()})
        for length in lengths:
            indices = [i for i, request in asked.items() if len(request.target) == length]
            engine = Engine(self.model, greedy(), gen_length=length, steps=length, batch_size=self.task.batch_size)
            for at, answer in engine.stream([Prompt(asked[i].prefix, i) for i in indices]):
                session.spend(n_forwards=answer.n_forwards, n_tokens=answer.n_tokens)
                flags[indices[at]] = answer.ids == asked[indices[at]].target.tolist()
            session.note(engine.notes)
        return flags

    def _likelihood_requests(self, requests: Sequence[Instance]) -> list[Request]:
        """Prefix, target and noise of each request. A context that successive requests share is encoded once."""
        asked: list[Request] = []
        encoded: tuple[str, list[int]] = ("", [])
        last: tuple[list[int], Tensor] = ([], torch.tensor([], dtype=torch.long))
        arch = self.model.arch
        for request in requests:
            context, continuation = request.args[:2]
            bare = context.rstrip()
            if bare != encoded[0]:
                encoded = (bare, encode(self.tokenizer, bare, arch.mask_token_id))
            prefix, target = encode_pair(
                self.tokenizer, context, continuation, arch.eos_token_id, encoded[1], arch.mask_token_id
            )
            if not target:
                raise ValueError(f"{request.task_name}: the continuation {continuation!r} has no token of its own")
            if len(target) >= arch.max_length:  # cut from the left as a prompt is, and as in lm-eval
                self._cut(request, len(prefix) + len(target) - arch.max_length)
                prefix, target = prefix[-1:], target[1 - arch.max_length :]
            prefix = self._fit(request, prefix, len(target))
            if prefix != last[0]:
                last = (prefix, torch.tensor(prefix))
            asked.append(Request(last[1], torch.tensor(target), (*document_key(request), request.idx)))
        return asked

    def _questions(self, requests: Sequence[Instance]) -> list[Question]:
        if not self.settings.likelihood.adaptive:
            return []
        return [Question(d.requests, [self.task.scale(requests[i]) for i in d.requests]) for d in documents(requests)]

    def _draws_note(self, session: EvaluationSession) -> list[str]:
        draws = {int(what.split()[1]): n for what, n in session.spent.items() if what.startswith("draws ")}
        if not draws:
            return []
        counts = ", ".join(f"{draws[n]} by {n}" for n in sorted(draws))
        level = self.settings.likelihood.error_level
        return [f"draws until a question was decided at level {level:g}: of {sum(draws.values())}, {counts}"]

    def _prompt(self, request: Instance) -> Prompt:
        context, settings = request.args[:2]
        ids = self._fit(
            request, encode(self.tokenizer, context, self.model.arch.mask_token_id), settings["max_gen_toks"]
        )
        return Prompt(ids or [self.model.arch.eos_token_id], document_key(request))

    def _fit(self, request: Instance, prompt: list[int], n_new: int) -> list[int]:
        """The end of `prompt` that leaves room for `n_new` tokens. What is cut is kept in `truncated`."""
        room = self.model.arch.max_length - n_new
        if room < 1:
            raise ValueError(
                f"{request.task_name}: {n_new} new tokens leave no room for a prompt in the model's "
                f"max_length={self.model.arch.max_length}; set a smaller gen_length for this task"
            )
        cut = len(prompt) - room
        if cut <= 0:
            return prompt
        self._cut(request, cut)
        return prompt[cut:]

    def _cut(self, request: Instance, count: int) -> None:
        document = document_key(request)
        self.truncated[document] = max(count, self.truncated.get(document, 0))


def documents(requests: Sequence[Instance]) -> list[Document]:
    """The documents that requests are of, in order of appearance."""
    by_document: dict[tuple[str, int], list[int]] = {}
    for i, request in enumerate(requests):
        by_document.setdefault(document_key(request), []).append(i)
    return [
        Document(f"{task}/{doc}", own, digest([jsonable(requests[i].args) for i in own]))
        for (task, doc), own in by_document.items()
    ]


def alike(requests: Sequence[Instance], indices: Sequence[int]) -> list[list[int]]:
    """Generation requests with equal settings, by index, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for i in indices:
        groups.setdefault(repr(sorted(requests[i].args[1].items())), []).append(i)
    return list(groups.values())


def document_key(request: Instance) -> tuple[str, int]:
    """(task, document) of a request, the name of its noise. Requests outside a task are named by their text."""
    if request.task_name is None or request.doc_id is None:
        return (str(request.args[0]), 0)
    return (request.task_name, request.doc_id)


def end_tokens(model: MaskedDiffusionTransformer, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids after which nothing belongs to an answer any more."""
    special = tokenizer.get_added_vocab()
    ends = {special[token] for token in END_TOKENS if token in special}
    return ends | {model.arch.eos_token_id, *model.arch.end_token_ids} | ({tokenizer.eos_token_id} - {None})


def encode(tokenizer: PreTrainedTokenizerBase, text: str, mask_token_id: int | None = None) -> list[int]:
    """Token ids of a text, nothing added (as in lm-eval's class for Hugging Face models).

    Where the text spells the mask token, that is text too, in ordinary tokens: a mask would be a place to fill, of
    which nothing is scored. Raises ValueError where it spells a token that the model does not have.
    """
    whole = text_ids(tokenizer, text)
    if mask_token_id is None or mask_token_id not in whole:
        return whole
    spelled = str(tokenizer.convert_ids_to_tokens(mask_token_id))
    encoded = []
    for number, part in enumerate(text.split(spelled)):
        encoded += text_ids(tokenizer, spelled, plain=True) if number else []
        encoded += text_ids(tokenizer, part) if part else []
    return encoded


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    continuation: str,
    start: int,
    prefix: list[int] | None = None,
    mask_token_id: int | None = None,
) -> tuple[list[int], list[int]]:
    """Context and continuation as ids, split as lm-eval does where the split is a token's boundary.

    Spaces at the end of the context belong to the continuation; the whole text is encoded once and cut at the length of
    the encoded context (`prefix`, where it is known already). An empty context becomes the token `start`.

    Where a token of the whole text reaches over the boundary, lm-eval scores the rest of the continuation without it.
    Here context and continuation are encoded apart, so that all of the continuation is scored.
    """
    if not context:
        target = encode(tokenizer, continuation, mask_token_id)
        return ([start], target) if target[:1] != [start] else (target[:1], target[1:])
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    if prefix is None:
        prefix = encode(tokenizer, bare, mask_token_id)
    whole = encode(tokenizer, bare + continuation, mask_token_id)
    if whole[: len(prefix)] != prefix:
        return prefix or [start], encode(tokenizer, continuation, mask_token_id)
    return prefix or [start], whole[len(prefix) :]
