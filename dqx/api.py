"""The Python API: load a model, look at logits, generate, score, quantize, evaluate. The command line uses it too.

    import dqx

    lm = dqx.load("nano_llada")                       # a name from conf/model, a folder or a hub id
    lm.generate("Question: 5-4+2+4+2-6+6=?\\nAnswer:", gen_length=16, block_length=8)  # " 1 3 7 9 3 9 = 9"
    lm.log_likelihood("Question: What is the job of Anna?\\nAnswer:", " baker", samples=16)
    report = lm.quantize("gptq", "w3a16")             # in place; names from conf/method and conf/bits
    results = lm.evaluate("nano_facts", limit=32)     # names from conf/task

Log-likelihoods are in nats. Everything random follows `seed` alone, not batch sizes or devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dqx.common.devices import dtype_of, pick_device
from dqx.config import compose as configuration
from dqx.config.schema import CalibConfig
from dqx.data.calibration import CalibBatch, calibration_windows
from dqx.data.masking import calibration_states
from dqx.diffusion.likelihood import log_likelihood, log_likelihood_given
from dqx.diffusion.noise import SeededNoise
from dqx.evaluate.journal import Journal
from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.tasks import evaluate
from dqx.models.checkpoint import Checkpoint, inspect, load_weights, skeleton
from dqx.models.family import family_of
from dqx.models.plant import plant_outliers
from dqx.models.tokenizer import load_tokenizer
from dqx.models.transformer import MaskedDiffusionTransformer
from dqx.quant import QuantReport, quantize


@dataclass
class DiffusionLM:
    """A masked diffusion language model with its tokenizer and sampler."""

    model: MaskedDiffusionTransformer
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    sampler: Any
    config: configuration.ModelConfig

    def tokens(self, text: str) -> Tensor:
        """Token ids [T] of a text, on the model's device, nothing added."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(ids, dtype=torch.long, device=self.model.device)

    @torch.no_grad()
    def logits(self, text: str | Tensor) -> Tensor:
        """Logits [B, T, V] of a text or of token ids [B, T]; row i predicts token i in every family."""
        return self.model(self.tokens(text)[None] if isinstance(text, str) else text.to(self.model.device))

    def generate(
        self,
        prompt: str,
        *,
        gen_length: int = 128,
        block_length: int | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> str:
        """Fill `gen_length` masks after the prompt and return them as text, special tokens left out.

        `block_length` defaults to one block, `steps` to one per token. Raises ValueError for settings the sampler
        cannot run.
        """
        block_length, steps = block_length or gen_length, steps or gen_length
        problems = self.sampler.problems(gen_length, block_length, steps)
        if problems:
            raise ValueError("; ".join(problems))
        generation = self.sampler.generate(
            self.model,
            self.tokens(prompt)[None],
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            noise=SeededNoise(seed, [("generate", prompt)]),
        )
        return str(self.tokenizer.decode(generation.ids[0], skip_special_tokens=True))

    def log_likelihood(
        self,
        prefix: str,
        target: str,
        *,
        samples: int = 128,
        seed: int = 0,
        masks: Tensor | None = None,
        batch_size: int = 8,
    ) -> float:
        """Monte-Carlo bound on log p(target | prefix) in nats; exact where the target is one token.

        `masks` [N, L] (True: masked) replaces the `samples` draws that `seed` gives, L the target's tokens.
        """
        prefix_ids, target_ids = self.tokens(prefix), self.tokens(target)
        if masks is None:
            return log_likelihood(
                self.model,
                prefix_ids,
                target_ids,
                samples=samples,
                seed=seed,
                key=(prefix, target),
                batch_size=batch_size,
            ).value
        masks = masks.to(self.model.device, torch.bool)
        if masks.dim() != 2 or masks.shape[1] != len(target_ids) or not masks.any(1).all():
            raise ValueError(
                f"masks must be [N, {len(target_ids)}] with at least one masked token a row; got {list(masks.shape)}"
            )
        tokens = torch.cat((prefix_ids, target_ids))
        perturbed = tokens.repeat(len(masks), 1)
        perturbed[:, len(prefix_ids) :][masks] = self.model.arch.mask_token_id
        return log_likelihood_given(self.model, perturbed, tokens, masks.double().mean(1))

    def calibration(self, calib: CalibConfig, *, seed: int = 0, data_root: str | None = None) -> list[CalibBatch]:
        """Calibration batches of the settings in `calib`, from the text to the masks."""
        windows = calibration_windows(calib, self.tokenizer, seed=seed, data_root=data_root)
        return calibration_states(self.model, self.sampler, windows, calib, seed=seed)

    def quantize(
        self,
        method: str = "gptq",
        bits: str | int = "w4a16",
        *,
        batches: Sequence[CalibBatch] | None = None,
        overrides: Sequence[str] = (),
        seed: int = 0,
        data_root: str | None = None,
    ) -> QuantReport:
        """Quantize in place with a method and a width from `conf/` and say what was done.

        `batches` replaces the configured calibration text; `overrides` are config overrides such as
        `method.rounding.damping=0.1`, `calib=mcs` or `calib.samples=16`. Raises ConfigProblems for a pair that cannot
        work.
        """
        selected = configuration.select(method=method, bits=bits, model=self.config, overrides=overrides)
        part = configuration.build(selected.method)
        problems = part.problems(selected.bits, self.model.arch)
        if problems:
            raise configuration.ConfigProblems(problems)
        if batches is None and part.needs_data:
            batches = self.calibration(selected.calib, seed=seed, data_root=data_root)
        return quantize(self.model, part, selected.bits, batches or (), seed=seed)

    def evaluate(
        self,
        tasks: str | Sequence[str] = "nano",
        *,
        limit: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        data_root: str | None = None,
    ) -> dict[str, TaskResult]:
        """Accuracy on tasks from `conf/task`, one result per task with one row per document."""
        suite = configuration.suite([tasks] if isinstance(tasks, str) else list(tasks))
        return self.evaluate_suite(suite, limit=limit, steps=steps, seed=seed, data_root=data_root)

    def evaluate_suite(
        self,
        suite: Mapping[str, TaskSpec],
        *,
        limit: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        data_root: str | None = None,
        likelihood: LikelihoodSettings | None = None,
        journal: Journal | None = None,
    ) -> dict[str, TaskResult]:
        """`evaluate` for task settings of one's own; with a `journal`, of a single task."""
        return evaluate(
            self.model,
            self.tokenizer,
            suite,
            sampler=self.sampler,
            steps=steps,
            seed=seed,
            limit=limit,
            data_root=data_root,
            chat=self.config.chat,
            likelihood=likelihood,
            journal=journal,
        )


def describe_configured(config: configuration.ModelConfig) -> DiffusionLM:
    """The model that a `model` config describes, its weights not loaded yet (on torch's meta device).

    Raises CheckpointError where its files cannot be used.
    """
    checkpoint = inspect(config.path, config.revision)
    if config.mask_token_id is not None:
        checkpoint = replace(checkpoint, arch=replace(checkpoint.arch, mask_token_id=config.mask_token_id))
    sampler = configuration.build(config.sampler)
    return DiffusionLM(skeleton(checkpoint.arch), load_tokenizer(checkpoint), checkpoint, sampler, config)


def load_configured(config: configuration.ModelConfig) -> DiffusionLM:
    """The model that a `model` config describes. Raises CheckpointError where its files cannot be used."""
    lm = describe_configured(config)
    lm.model = load_weights(lm.checkpoint, dtype_of(config.dtype), pick_device(config.device))
    plant_outliers(lm.model, config.outliers.gain, config.outliers.channels)
    return lm


def load(name_or_path: str = "nano_llada", **overrides: Any) -> DiffusionLM:
    """A model by its name in `conf/model`, or a checkpoint by folder or hub id with its family's default sampler.

    Keyword arguments override the model's config: `load("llada_8b_base", path="/data/llada", dtype="float16")`.
    """
    if name_or_path in configuration.choices("model"):
        chosen = configuration.compose([f"model={name_or_path}"]).model
    else:
        family = family_of(inspect(name_or_path).arch.family)
        chosen = configuration.ModelConfig(
            Path(name_or_path).name, family.name, name_or_path, dtype="auto", sampler=dict(family.sampler)
        )
    model = OmegaConf.to_object(OmegaConf.merge(chosen, overrides))
    assert isinstance(model, configuration.ModelConfig)
    return load_configured(model)
