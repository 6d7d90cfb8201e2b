"""Two ways to evaluate the same documents with the same random model, each with a count of its work.

The plain path is what the study runs: `LLaDASampler.generate` one prompt at a time to the end of the answer, and the
Monte-Carlo estimator one choice at a time with all draws in batches of 8 (also of one-token choices, where they are all
the same), then `greedy_matches`; the head works on whole sequences. dqx's are `Engine` and `Scorer`.

Random models write no stop string. What the plain path wrote up to a document's real length stands for its text up to
and including one: it is what dqx's engine has to write, and it is told that an answer is settled once it begins so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqx.benchmarks.cases import MODELS, scaled
from dqx.benchmarks.common import clock
from dqx.benchmarks.lengths import Lengths
from dqx.diffusion import SeededNoise, greedy_matches, log_likelihood_given
from dqx.diffusion.batches import Request
from dqx.diffusion.engine import Engine, Prompt
from dqx.diffusion.likelihood import mask_states
from dqx.diffusion.samplers import LLaDASampler
from dqx.diffusion.scorer import Scorer
from dqx.evaluate.spec import TaskSpec
from dqx.models.checkpoint import skeleton
from dqx.models.transformer import Architecture, Block, MaskedDiffusionTransformer, initialise

PUBLISHED_MODEL = MODELS["llada_8b"]
BATCH = 8  # sequences at a time in the study's likelihoods
SHARPNESS, MASK = 4, 0.1  # factors of queries and of the mask's embedding, so that answers depend on their prompts


def architecture(scale: int, blocks: int) -> Architecture:
    """LLaDA-8B with all widths divided by `scale`, and a vocabulary that leaves the head its share of the FLOPs.

    Raises ValueError for a scale that leaves no whole heads.
    """
    whole = PUBLISHED_MODEL
    vocab = whole.vocab_size * blocks // (scale * whole.n_blocks)
    return replace(
        scaled(whole, scale), n_blocks=blocks, vocab_size=vocab, mask_token_id=vocab - 2, eos_token_id=vocab - 1
    )


def random_model(arch: Architecture, seed: int, device: torch.device, dtype: torch.dtype) -> MaskedDiffusionTransformer:
    """A model with weights as before training, but for sharper attention and a mask that says less."""
    model = skeleton(arch).to(dtype).to_empty(device=device)
    initialise(model, torch.Generator(device).manual_seed(seed))
    for block in model.blocks:
        assert isinstance(block, Block)
        block.q.weight *= SHARPNESS
    model.embed.weight[arch.mask_token_id] *= MASK
    return model


@dataclass
class Work:
    """Time in seconds, sequences through the model and their tokens with padding, FLOPs of the blocks and the head.

    `whole_blocks` and `whole_head` are those that they would take on all tokens.
    """

    seconds: float = 0.0
    sequences: int = 0
    tokens: int = 0
    blocks: float = 0.0
    head: float = 0.0
    whole_blocks: float = 0.0
    whole_head: float = 0.0

    @property
    def flops(self) -> float:
        return self.blocks + self.head

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@contextmanager
def counted(model: MaskedDiffusionTransformer) -> Iterator[Work]:
    """The work that the model does inside. A multiplication and an addition are two FLOPs."""
    arch, work = model.arch, Work()
    inward = 2 * sum(arch.in_features(role) * arch.out_features(role) for role in "kv")
    outward = 2 * sum(arch.in_features(role) * arch.out_features(role) for role in ("q", "o", "gate", "up", "down"))
    per_row = 2 * arch.vocab_size * arch.hidden_size

    def flops(rows: int, length: int, read: int) -> float:
        """Of a block that gives the output of `read` columns."""
        attention = 4 * rows * read * length * arch.hidden_size
        return rows * (length * inward + read * outward) + attention

    def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
        rows, length = args[0].shape[:2]
        read = next((read.shape[1] for read in args[4:5] if read is not None), length)
        work.blocks += flops(rows, length, read)
        work.whole_blocks += flops(rows, length, length)
        if block is model.blocks[0]:
            work.sequences += rows
            work.tokens += rows * length
            work.whole_head += rows * length * per_row

    def look(head: nn.Module, args: tuple[Tensor, ...]) -> None:
        work.head += args[0].shape[:-1].numel() * per_row

    hooks = [block.register_forward_pre_hook(enter) for block in model.blocks]
    hooks.append(model.head.register_forward_pre_hook(look))
    start = clock(model.device)
    try:
        yield work
    finally:
        work.seconds = clock(model.device) - start
        for hook in hooks:
            hook.remove()


@dataclass
class Comparison:
    """What both paths did. `greedy` is the plain path's greedy pass, which `plain` leaves out.

    `equal` says of each document whether the tokens up to its stop are the same, `error` is the largest relative
    difference of a likelihood.
    """

    plain: Work = field(default_factory=Work)
    greedy: Work = field(default_factory=Work)
    dqx: Work = field(default_factory=Work)
    equal: list[bool] = field(default_factory=list)
    error: float = 0.0

    def __add__(self, other: Comparison) -> Comparison:
        sums: dict[str, Any] = {name: getattr(self, name) + mine for name, mine in vars(other).items()}
        return Comparison(**sums | {"error": max(self.error, other.error)})


def random_tokens(model: MaskedDiffusionTransformer, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(model.arch.mask_token_id, (length,), generator=generator)


def generate(model: MaskedDiffusionTransformer, spec: TaskSpec, documents: Sequence[Lengths], seed: int) -> Comparison:
    """The answers to documents of a generation task, by both paths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [random_tokens(model, document.prompt, generator) for document in documents]
    sampler, comparison = LLaDASampler(suppress_mask=True), Comparison()  # trained models do not write masks
    schedule: dict[str, Any] = {name: getattr(spec, name) for name in ("gen_length", "block_length", "steps")}
    texts = []
    with counted(model) as comparison.plain:
        for i, (prompt, document) in enumerate(zip(prompts, documents, strict=True)):
            noise = SeededNoise(seed, [i])
            answer = sampler.generate(model, prompt[None].to(model.device), noise=noise, **schedule).ids[0].tolist()
            texts.append(answer[: document.targets[0]])
    engine = Engine(
        model, sampler, seed=seed, settled=lambda ids: any(ids[: len(text)] == text for text in texts), **schedule
    )
    with counted(model) as comparison.dqx:
        answers = engine.generate([Prompt(prompt.tolist(), i) for i, prompt in enumerate(prompts)])
    comparison.equal = [answer.ids[: len(text)] == text for answer, text in zip(answers, texts, strict=True)]
    return comparison


def plain_likelihood(model: MaskedDiffusionTransformer, request: Request, samples: int, seed: int) -> float:
    """`log_likelihood` without its shortcut for targets of one token."""
    tokens = torch.cat((request.prefix, request.target))
    drawn = mask_states(len(request.target), samples=samples, seed=seed, key=request.key)
    states = tokens.repeat(samples, 1)
    states[:, len(request.prefix) :].masked_fill_(drawn, model.arch.mask_token_id)
    return log_likelihood_given(model, states, tokens, drawn.double().mean(1), batch_size=BATCH)


def score(model: MaskedDiffusionTransformer, spec: TaskSpec, documents: Sequence[Lengths], seed: int) -> Comparison:
    """The likelihoods of the choices of documents, by both paths."""
    assert spec.mc_samples is not None
    generator = torch.Generator().manual_seed(seed)
    requests, comparison = [], Comparison()
    for i, document in enumerate(documents):
        prompt = random_tokens(model, document.prompt, generator)
        for j, length in enumerate(document.targets):
            requests.append(Request(prompt, random_tokens(model, length, generator), (spec.harness, i, j)))
    with counted(model) as comparison.plain:
        plain = [plain_likelihood(model, request, spec.mc_samples, seed) for request in requests]
    with counted(model) as comparison.greedy:
        for request in requests:
            greedy_matches(model, request.prefix.to(model.device), request.target)
    with counted(model) as comparison.dqx:
        values = Scorer(model, samples=spec.mc_samples, seed=seed).score(requests)
    comparison.error = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(values, plain, strict=True))
    return comparison


PATHS = {"generation": generate, "likelihood": score}
