"""`DiffusionLM`: a model with its tokenizer and sampler, and what can be done with it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dqx.common.files import write_json
from dqx.common.problems import raise_if
from dqx.config.compose import build, select, suite
from dqx.config.schema import CalibConfig, ConfigProblems, ModelConfig
from dqx.data.calibration import CalibBatch, calibration_windows
from dqx.data.masking import calibration_states
from dqx.diffusion.block_engine import engine_for
from dqx.diffusion.engine import Prompt
from dqx.diffusion.frames import OnFrame
from dqx.diffusion.likelihood import log_likelihood, log_likelihood_given
from dqx.diffusion.settings import count_problems
from dqx.engines.model import EngineModel
from dqx.evaluate.journal import Journal
from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import EvaluationSettings, LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.tasks import evaluate
from dqx.formats.bits import BitsConfig
from dqx.models.checkpoint import Checkpoint, CheckpointError, save
from dqx.models.transformer import Architecture, MaskedDiffusionTransformer
from dqx.models.vocabulary import id_problems, text_ids
from dqx.quant.checkpoint.folder import save_quantized
from dqx.quant.loop import quantize as quantize_model
from dqx.quant.method import Method
from dqx.quant.report import QuantReport

Text = str | Sequence[int] | Tensor  # a text, or the ids of its tokens
P = ParamSpec("P")
R = TypeVar("R")

#: In the folder of a saved model: name, sampler and the rest of its `ModelConfig`.
SETTINGS = "dqx.json"


def told_plainly(function: Callable[P, R]) -> Callable[P, R]:
    """A mistake in the call is one short exception, without the way to where it was noticed and without its causes."""

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ConfigProblems, CheckpointError) as error:
            raise error.with_traceback(None) from None

    return plain


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized, and what that did."""

    method: Method
    bits: BitsConfig
    report: QuantReport


@dataclass(repr=False)
class DiffusionLM:
    """A masked diffusion language model with its tokenizer and sampler."""

    model: MaskedDiffusionTransformer
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    sampler: Any
    config: ModelConfig
    quantization: Quantization | None = None  # None: full precision

    def facts(self) -> dict[str, str]:
        """What the model is, in words: family, size, dtype, device, precision."""
        report = None if self.quantization is None else self.quantization.report
        precision = "full precision"
        if report is not None:
            precision = f"{report.method} {report.bits}, {report.average_bits:.2f} bits per weight"
        if isinstance(self.model, EngineModel):
            precision = self.model.engine.described()
        return {
            "family": self.model.arch.family,
            "size": f"{self.checkpoint.parameters() / 1e6:,.1f} M parameters",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "precision": precision,
        }

    def __repr__(self) -> str:
        return f"DiffusionLM({self.config.name}: {', '.join(self.facts().values())})"

    def _repr_html_(self) -> str:
        rows = {"model": self.config.name, **self.facts(), "sampler": self.sampler.name}
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{cells}</table>"

    def tokens(self, text: Text) -> Tensor:
        """Token ids [T] of a text, on the model's device, nothing added. Raises ConfigProblems for ids it lacks."""
        if isinstance(text, str):
            try:
                text = text_ids(self.tokenizer, text)
            except ValueError as error:
                raise ConfigProblems([str(error)]) from error
        ids = torch.as_tensor(text, dtype=torch.long, device=self.model.device)
        ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
        if ids.dim() != 1:
            raise ConfigProblems([f"the tokens of one text are a list [T]; these are {list(ids.shape)}"])
        self._check_tokens(ids)
        return ids

    @told_plainly
    @torch.no_grad()
    def logits(self, text: Text | Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, T, V] of a text or of token ids [T] or [B, T]; row i predicts token i in every family."""
        ids = self.tokens(text) if isinstance(text, str) else torch.as_tensor(text, device=self.model.device)
        ids = ids if ids.dim() == 2 else ids[None]
        if not ids.numel():
            raise ConfigProblems(["the text has no tokens; give at least one"])
        self._check_tokens(ids)
        self._check_length(ids.shape[1])
        logits: Tensor = self.model(ids)
        return logits

    @told_plainly
    def generate(
        self,
        prompt: Text | Sequence[Text],
        *,
        gen_length: int = 128,
        block_length: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        chat: bool = False,
        on_frame: OnFrame | None = None,
    ) -> str | list[str]:
        """Fill `gen_length` masks after a prompt and return them as text, special tokens left out.

        Args:
            prompt: a text, or a list of them (or of their tokens; a tensor [B, P]), which are written in batches. Each
                is written as it is alone, and a list gives a list.
            gen_length: how many tokens to write.
            block_length: tokens of a block; blocks are written one after the other. None is a single block, or the
                sampler's own where it has one.
            steps: denoising steps; None is one per token.
            seed: of the noise, which depends on nothing but the prompt besides.
            chat: put each prompt, a text, through the checkpoint's chat template as what a user says.
            on_frame: gets a `Frame` after every forward of every prompt: what is written by now and how sure it was
                (`dqx/diffusion/frames.py`). The answers do not depend on it.

        Raises:
            ConfigProblems: settings that the sampler cannot run, an empty prompt, a prompt that together with the
                answer is longer than the model, a checkpoint without a template.
        """
        raise_if(count_problems(gen_length=gen_length))
        block_length = self.sampler.block_length(gen_length) if block_length is None else block_length
        steps = self.sampler.steps_for(gen_length, steps)
        problems = self.sampler.problems(gen_length, block_length, steps)
        problems += self.sampler.token_problems(self.model.arch.vocab_size)
        if problems:
            raise ConfigProblems(problems)
        alone = _is_one_text(prompt)
        texts: list[Any] = [prompt] if alone else list(prompt)
        if chat:
            texts = [self._as_chat(text) for text in texts]
        prompts = [Prompt(self.tokens(text).tolist(), ("generate", self._as_text(text))) for text in texts]
        if not all(each.ids for each in prompts):
            raise ConfigProblems(["a prompt has no tokens; each needs at least one"])
        self._check_length(max((len(each.ids) for each in prompts), default=0), gen_length)
        engine = engine_for(self.sampler)(
            self.model,
            self.sampler,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            seed=seed,
            on_frame=on_frame,
        )
        answers = engine.generate(prompts)
        written = [str(self.tokenizer.decode(answer.ids, skip_special_tokens=True)) for answer in answers]
        return written[0] if alone else written

    @told_plainly
    def log_likelihood(
        self,
        prefix: Text,
        target: Text,
        *,
        samples: int = 128,
        seed: int = 0,
        masks: Tensor | Sequence[Sequence[bool]] | None = None,
        batch_size: int = 8,
    ) -> float:
        """Monte-Carlo bound on log p(target | prefix) in nats; exact where the target is one token.

        Of models that write block by block it is a sum over blocks, as their sampler writes them; with the
        autoregressive sampler it is exact.

        Args:
            prefix: what is given, P tokens.
            target: what is scored, L tokens.
            samples: draws of masks.
            seed: of the draws, which depend on nothing but the two texts besides.
            masks: [N, L], True where a token is masked: these in place of the draws; for models with full attention.
            batch_size: sequences that go through the model at a time.

        Raises:
            ConfigProblems: masks of another shape, or a row of them without a mask, or of a model that writes block
                by block; no draws; texts that together are longer than the model.
        """
        raise_if(count_problems(samples=samples, batch_size=batch_size))
        prefix_ids, target_ids = self.tokens(prefix), self.tokens(target)
        self._check_length(len(prefix_ids) + len(target_ids))
        raise_if(self.sampler.likelihood_problems())
        factorization = self.sampler.factorization()
        if masks is None:
            return log_likelihood(
                self.model,
                prefix_ids,
                target_ids,
                samples=samples,
                seed=seed,
                key=(self._as_text(prefix), self._as_text(target)),
                batch_size=batch_size,
                factorization=factorization,
            ).value
        if factorization is not None:
            raise ConfigProblems(
                ["masks are for models whose targets are masked as a whole; this one has a likelihood of each block"]
            )
        masks = torch.as_tensor(masks, device=self.model.device).bool()
        if masks.dim() != 2 or masks.shape[1] != len(target_ids) or not masks.any(1).all():
            raise ConfigProblems(
                [f"masks must be [N, {len(target_ids)}] with at least one masked token a row; got {list(masks.shape)}"]
            )
        tokens = torch.cat((prefix_ids, target_ids))
        perturbed = tokens.repeat(len(masks), 1)
        perturbed[:, len(prefix_ids) :][masks] = self.model.arch.mask_token_id
        return log_likelihood_given(self.model, perturbed, tokens, masks.double().mean(1), batch_size=batch_size)

    def calibration(
        self, calib: CalibConfig, *, seed: int = 0, data_root: str | Path | None = None, commitments: bool = False
    ) -> list[CalibBatch]:
        """Calibration batches of the settings in `calib`, from the text to the masks.

        With `commitments`, which `method.token_weight=frontier` needs, those of a trajectory say when each token is
        written.
        """
        windows = calibration_windows(calib, self.tokenizer, seed=seed, data_root=_path(data_root))
        return calibration_states(self.model, self.sampler, windows, calib, seed=seed, commitments=commitments)

    @told_plainly
    def quantize(
        self,
        method: str | Method = "gptq",
        bits: str | int | BitsConfig = "w4a16",
        *,
        calib: Sequence[Any] | None = None,
        overrides: Sequence[str] = (),
        seed: int = 0,
        data_root: str | Path | None = None,
    ) -> QuantReport:
        """Quantize in place and say what was done.

        Args:
            method: a name from `conf/method`, or a method of one's own.
            bits: a name from `conf/bits` (4 is the method's own kind of 4 bits), or widths of one's own.
            calib: calibration sequences in place of the configured text: texts, token ids [T] or [B, T], or batches.
            overrides: of the configuration, such as `method.rounding.damping=0.1`, `calib=mcs` or `calib.samples=16`.
            seed: of the text's windows, their masks, and of parts that draw random numbers.
            data_root: a folder with copies of datasets in the hub's layout.

        Raises:
            ConfigProblems: names that do not exist, and a method, widths and a model that cannot work together.
        """
        part, widths, text = _chosen(method, bits, self.config, self.model.arch, overrides)
        raise_if(self._weightless())
        if calib is None:
            committed = part.weighs_by("committed")
            calib = ()
            if part.needs_data:
                calib = self.calibration(text, seed=seed, data_root=data_root, commitments=committed)
        batches = [self.tokens(each) if isinstance(each, str) else each for each in calib]
        report = quantize_model(self.model, part, widths, batches, seed=seed)
        self.quantization = Quantization(part, widths, report)
        return report

    def save(self, folder: str | Path) -> Path:
        """Write model and tokenizer to a new folder, from which `dqx.load` reads the same model. Returns it.

        At full precision the folder is a checkpoint in the hub's format. Raises FileExistsError where it exists, and
        ConfigProblems after a quantization that failed.
        """
        folder = Path(folder).expanduser()
        if folder.exists():
            raise FileExistsError(f"{folder} exists already; name a new folder")
        raise_if(self._weightless())
        if self.model.unfinished:
            raise ConfigProblems(["the model is quantized in part, by an attempt that failed; load its weights again"])
        done = self.quantization
        if done is None:
            save(self.model, self.checkpoint.config, folder)
        else:
            save_quantized(self.model, done.report, folder, method=done.method, bits=done.bits)
        write_json(folder / SETTINGS, asdict(self.config))
        self.tokenizer.save_pretrained(str(folder))
        return folder

    @told_plainly
    def evaluate(
        self,
        tasks: str | Sequence[str] = "nano",
        *,
        limit: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        data_root: str | Path | None = None,
    ) -> dict[str, TaskResult]:
        """Accuracy on tasks from `conf/task`, one result per task with one row per document."""
        chosen = suite([tasks] if isinstance(tasks, str) else list(tasks))
        return self.evaluate_suite(chosen, limit=limit, steps=steps, seed=seed, data_root=data_root)

    def evaluate_suite(
        self,
        suite: Mapping[str, TaskSpec],
        *,
        limit: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        data_root: str | Path | None = None,
        likelihood: LikelihoodSettings | None = None,
        journal: Journal | None = None,
    ) -> dict[str, TaskResult]:
        """`evaluate` for task settings of one's own; with a `journal`, of a single task."""
        settings = EvaluationSettings(
            limit=limit,
            steps=steps,
            seed=seed,
            data_root=_path(data_root),
            chat=self.config.chat,
            likelihood=likelihood or LikelihoodSettings(),
        )
        return evaluate(self.model, self.tokenizer, suite, sampler=self.sampler, settings=settings, journal=journal)

    def _weightless(self) -> list[str]:
        if not isinstance(self.model, EngineModel):
            return []
        return [f"the weights are in {self.model.engine.file}, and dqx has none of them; load {self.config.name} alone"]

    def _check_tokens(self, ids: Tensor) -> None:
        if problems := id_problems(ids, self.model.arch.vocab_size):
            raise ConfigProblems(problems)

    def _check_length(self, length: int, gen_length: int = 0) -> None:
        """Raise ConfigProblems where a text, with what is to be written after it, is longer than the model."""
        longest = self.model.arch.max_length
        if length + gen_length <= longest:
            return
        if gen_length == 0:
            raise ConfigProblems([f"{length} tokens are more than the {longest} positions of {self.config.name}"])
        room = longest - length
        remedy = f"write gen_length={room} or less" if room > 0 else "shorten the prompt"
        told = f"a prompt of {length} tokens and gen_length={gen_length} take {length + gen_length} positions"
        raise ConfigProblems([f"{told}, more than the {longest} of {self.config.name}; {remedy}"])

    def _as_text(self, text: Text) -> str:
        return text if isinstance(text, str) else str(self.tokenizer.decode(self.tokens(text)))

    def _as_chat(self, text: Any) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigProblems(
                [f"{self.config.name} has no chat template; leave out chat=True, or load an instruct checkpoint"]
            )
        if not isinstance(text, str):
            raise ConfigProblems(["chat=True takes texts: the template goes around them"])
        message = {"role": "user", "content": text}
        return str(self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


@told_plainly
def quantize(
    model: MaskedDiffusionTransformer | DiffusionLM,
    method: str | Method = "gptq",
    bits: str | int | BitsConfig = "w4a16",
    calib: Sequence[Any] = (),
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
) -> QuantReport:
    """`DiffusionLM.quantize` for a model without tokenizer: `calib` holds token ids [T] or [B, T], or batches."""
    if isinstance(model, DiffusionLM):
        return model.quantize(method, bits, calib=calib, overrides=overrides, seed=seed)
    described = ModelConfig(name="", family=model.arch.family, path="", sampler={})
    part, widths, _ = _chosen(method, bits, described, model.arch, overrides)
    return quantize_model(model, part, widths, calib, seed=seed)


def _chosen(
    method: str | Method, bits: str | int | BitsConfig, model: ModelConfig, arch: Architecture, overrides: Sequence[str]
) -> tuple[Method, BitsConfig, CalibConfig]:
    """Method, widths and calibration text from names in `conf/`, or as given. Raises ConfigProblems."""
    config = select(
        method=method if isinstance(method, str) else "rtn",
        bits="w16a16" if isinstance(bits, BitsConfig) else bits,
        model=model,
        overrides=overrides,
    )
    part = build(config.method) if isinstance(method, str) else method
    widths = bits if isinstance(bits, BitsConfig) else config.bits
    problems = part.problems(widths, arch)
    if problems:
        raise ConfigProblems(problems)
    return part, widths, config.calib


def _is_one_text(prompt: Any) -> bool:
    if isinstance(prompt, Tensor):
        return prompt.dim() < 2
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))


def _path(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).expanduser())
