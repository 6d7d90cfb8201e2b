"""The two models of a run: loaded, or made, when something has to be computed on them and not before.

A quantized model is known from the cache without its weights: what was done (its report) and what came out (the digest
of the model, of which its results are kept). The weights are kept too where calibration text was read to make them.
Other methods (rtn) make them again in little more time than reading takes.

A model that does not fit into memory together with what quantizing it needs is quantized from disk, block by block,
straight into the folder of the cache. When a run was killed meanwhile, the next one goes on after the last finished
block. The numbers are the same.
"""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dqx.api import DiffusionLM, describe_configured, load_configured
from dqx.common.devices import dtype_of, pick_device
from dqx.common.memory import GB, trim
from dqx.common.names import method_label
from dqx.common.processes import one_model, processes
from dqx.config.compose import build
from dqx.config.schema import Config
from dqx.data.calibration import CalibBatch
from dqx.models.checkpoint import CheckpointError, skeleton
from dqx.quant import QuantReport, load_quantized, quantize, quantize_checkpoint, save_quantized
from dqx.quant.checkpoint.folder import read_recipe, verify_shards
from dqx.quant.checkpoint.on_disk import Loading, OtherSettings, partial
from dqx.study import facts as keys
from dqx.study.cache import space
from dqx.study.cache.key import Key
from dqx.study.cache.once import Once
from dqx.study.estimate.memory import pools, room_for_activations, streams_from_disk, weight_bytes

log = logging.getLogger(__name__)


class MadeAnew(Exception):
    """The quantized model had to be made again, and came out differently: what is known of it is of another."""

    def __init__(self, quantized: Quantized):
        super().__init__("the quantized model was made again and differs")
        self.quantized = quantized


@dataclass(frozen=True)
class Quantized:
    """What is known of a quantized model without its weights."""

    report: QuantReport
    model: str  # digest
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"report": self.report.to_dict(), "model": self.model, "notes": self.notes}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Quantized:
        return cls(QuantReport.from_dict(found["report"]), str(found["model"]), list(found["notes"]))


@dataclass(frozen=True)
class Subject:
    """A model to measure: what it is, and how to get it."""

    name: str
    facts: dict[str, Any]  # what it depends on
    described: DiffusionLM  # checkpoint, tokenizer and sampler; weights perhaps
    dtype: torch.dtype
    device: torch.device
    lm: Callable[[], DiffusionLM]  # with weights


class Subjects:
    """The models of a run, one of them in memory at a time: what is asked of full precision is asked first.

    Every call has to be made by all processes of the run. `timings` gets the seconds of loading.
    """

    def __init__(self, config: Config, once: Once, timings: dict[str, float]):
        self.config, self.once, self.timings = config, once, timings
        self.lm = describe_configured(config.model)
        self.method = build(config.method)
        self.device = pick_device(config.model.device)
        self.dtype = dtype_of(config.model.dtype) or self.lm.checkpoint.stored_dtype()
        self.pools = pools(config, self.lm.checkpoint.arch, self.dtype, self.device)
        self.fingerprint = self.lm.checkpoint.fingerprint()
        self.facts = keys.model_facts(
            fingerprint=self.fingerprint, model=config.model, dtype=self.dtype, device=self.device
        )
        self.seen: Sequence[CalibBatch] = ()  # what quantization reads
        self.key: Key  # of the quantized model, once that text is known
        self.known: Quantized | None = None
        self._loaded = ""  # full precision, quantized

    def described(self) -> dict[str, Any]:
        """The model as a record has it."""
        checkpoint = self.lm.checkpoint
        return {
            "name": self.config.model.name,
            "family": checkpoint.arch.family,
            "path": self.config.model.path,
            "fingerprint": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": checkpoint.parameters(),
            "sampler": self.lm.sampler.name,
        }

    @property
    def original(self) -> Subject:
        """The model at full precision."""
        return Subject("full precision", self.facts, self.lm, self.dtype, self.device, self.full_precision)

    @property
    def quantized(self) -> Subject:
        """The quantized model, once it is known."""
        assert self.known is not None
        facts = self.facts | {"quantization": self.key.facts, "model": self.known.model}
        return Subject("quantized", facts, self.lm, self.dtype, self.device, self.after_quantization)

    def full_precision(self) -> DiffusionLM:
        """The model as it was."""
        if self._loaded != "full precision":
            self._forget()
            self._say("loading the weights")
            started = time.perf_counter()
            self.lm.model = load_configured(self.config.model).model
            self.timings["load the model"] = self.timings.get("load the model", 0.0) + time.perf_counter() - started
            self._loaded = "full precision"
        return self.lm

    def quantize(self, seen: Sequence[CalibBatch]) -> tuple[Quantized, str]:
        """What is known of the quantized model, and whether that is `reused` or was `computed` now.

        `seen` is the calibration text that the method reads.
        """
        self.seen, self.key = seen, self._key(seen)
        known, source = self.once.value(self.key, Quantized.from_dict, self._make)
        self.known = known
        return known, source

    def after_quantization(self) -> DiffusionLM:
        """The quantized model, from the cache if it is there.

        Raises MadeAnew where it had to be made again and is another one than before; `known` is then of this one.
        """
        if self._loaded == "quantized":
            return self.lm
        with self.once.reading(self.key):
            found = self._restore()
        if not found:
            with self.once.alone(self.key):
                if not self._restore(alone=True):
                    before, self.known = self.known, self._make()
                    if before is None or before.model != self.known.model:
                        if processes().main:
                            self.once.store.write(self.key, self.known)
                        raise MadeAnew(self.known)
        return self.lm

    def save(self, folder: Path) -> None:
        """Write the quantized model to a folder that does not exist. Raises MadeAnew as `after_quantization` does."""
        model = self.after_quantization().model
        assert self.known is not None
        if processes().main:
            save_quantized(model, self.known.report, folder, method=self.method, bits=self.config.bits)

    def _key(self, seen: Sequence[CalibBatch]) -> Key:
        """What the quantized model depends on."""
        config = self.config
        facts = keys.quantization_facts(
            self.facts,
            method=config.method,
            bits=config.bits,
            calib=config.calib if seen else None,
            calibration=seen,
            seed=config.seed,
        )
        label = method_label(config.method.name, config.method.variant)
        return Key("quantized", f"{config.model.name}-{label}-{config.bits.name}", facts)

    def _make(self) -> Quantized:
        """Quantize, and keep the weights if they are worth it. The main process holds the lock."""
        from_disk = processes().broadcast(streams_from_disk(self.pools))
        report, notes = self._quantize_from_disk() if from_disk else self._quantize_in_memory()
        return Quantized(report, keys.model_digest(self.lm.model), notes)

    def _quantize_in_memory(self) -> tuple[QuantReport, list[str]]:
        config, lm, main = self.config, self.full_precision(), processes().main
        self._say("quantizing")
        self._loaded = "quantized"
        report = quantize(lm.model, self.method, config.bits, self.seen, seed=config.seed, progress=main)
        notes = one_model(lm.model, keys.model_digest)

        def write(folder: Path) -> None:
            save_quantized(lm.model, report, folder, method=self.method, bits=config.bits)

        if main and report.changed and self._is_kept():
            self.once.store.write_folder(self.key, write)
        return report, notes

    def _quantize_from_disk(self) -> tuple[QuantReport, list[str]]:
        """The main process writes the folder of the quantized model, from which all load it."""
        store, team = self.once.store, processes()
        folder, kept = store.folder_of(self.key), team.main and self._is_kept()
        self._forget()
        if team.main and not self._is_complete(folder):
            self._say("quantizing from disk, block by block")
            store.remove_folder(self.key)
            self._write_quantized(folder)
        team.broadcast(None)  # the others have waited
        self.lm.model, report = load_quantized(folder, self.device, verify=team.main)
        self._loaded = "quantized"
        team.gather(None)
        if team.main and not kept:
            store.remove_folder(self.key)
        return report, []

    def _write_quantized(self, folder: Path) -> None:
        """Quantize block by block, from where an earlier run stopped."""
        config, planted = self.config, self.config.model.outliers

        def write() -> None:
            quantize_checkpoint(
                self.lm.checkpoint,
                folder,
                self.method,
                config.bits,
                self.seen,
                seed=config.seed,
                loading=Loading(
                    dtype=dtype_of(config.model.dtype),
                    device=self.device,
                    planted=(planted.gain, planted.channels),
                    activations_gb=room_for_activations(self.pools) / GB,
                ),
            )

        if not self.once.reuse:
            shutil.rmtree(partial(folder), ignore_errors=True)
        try:
            write()
        except OtherSettings as error:  # of another version of a library
            self.once.store.warn(f"begun again: {error}")
            shutil.rmtree(partial(folder))
            write()

    def _is_complete(self, folder: Path) -> bool:
        """Whether an earlier run has written the whole folder, and was stopped before it could say so."""
        if not (self.once.reuse and folder.is_dir()):
            return False
        try:
            verify_shards(folder, read_recipe(folder))
        except CheckpointError:
            return False
        return True

    def _is_kept(self) -> bool:
        """Whether the weights are worth keeping, and there is room for them now."""
        config, store = self.config, self.once.store
        if not (self.seen and config.keep_quantized):
            return False
        needed = weight_bytes(self.lm.checkpoint.arch, self.dtype)
        if config.cache_max_gb is None or space.make_room(store, needed, int(config.cache_max_gb * GB)):
            return True
        store.warn(f"the quantized model was not kept: it is larger than cache_max_gb={config.cache_max_gb:g}")
        return False

    def _forget(self) -> None:
        """Free the weights before others are loaded: two models are never held."""
        self.lm.model, self._loaded = skeleton(self.lm.checkpoint.arch), ""
        gc.collect()
        trim()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _restore(self, *, alone: bool = False) -> bool:
        """Load the kept weights and see that they are those that are known.

        The main process holds the lock, for reading, or `alone`: then what is damaged is removed.
        """
        store, team = self.once.store, processes()
        folder, known = store.folder_of(self.key), self.known
        if known is None or not team.broadcast(self.once.reuse and folder.is_dir()):
            return False
        self._forget()
        self._say(f"loading the quantized weights from {folder}")
        try:
            model, _report = load_quantized(folder, self.device, verify=False)
            damage = "" if keys.model_digest(model) == known.model else "its content does not match its checksum"
        except ValueError as error:
            damage = str(error)
        found = next((reason for reason in team.gather(damage) if reason), "")
        if found:
            if alone and team.main:
                store.warn(f"{folder} is damaged and was computed again ({found})")
                store.remove_folder(self.key)
            return False
        store.touch(folder)
        self.lm.model, self._loaded = model, "quantized"
        return True

    def _say(self, what: str) -> None:
        if processes().main:
            log.info(f"  {what}")
