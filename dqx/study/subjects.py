"""The two models of a run: loaded, or made, when something has to be computed on them and not before.

A quantized model is known from the cache without its weights: what was done (its report) and what came out (the digest
of the model, of which its results are kept). The weights are kept too where calibration text was read to make them.
Other methods (rtn) make them again in little more time than reading takes.

A model that does not fit into memory together with what quantizing it needs, by estimate or as it turns out, is
quantized from disk, block by block, straight into the folder of the cache. When a run was killed meanwhile, the next
one goes on after the last finished block. The numbers are the same.
"""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dqx.api import DiffusionLM, Quantization
from dqx.common import accelerator
from dqx.common.devices import dtype_of
from dqx.common.memory import GB, trim
from dqx.common.names import method_label
from dqx.common.processes import one_model, processes
from dqx.data.calibration import CalibBatch
from dqx.models.checkpoint import CheckpointError, load_weights, skeleton
from dqx.models.plant import plant_outliers
from dqx.models.tokenizer import load_tokenizer
from dqx.quant import QuantReport, load_quantized, quantize, quantize_checkpoint, save_quantized
from dqx.quant.backends.choice import install
from dqx.quant.checkpoint.folder import read_recipe, verify_shards
from dqx.quant.checkpoint.on_disk import Loading, OtherSettings, partial
from dqx.study import engine, facts
from dqx.study.cache import space
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.key import Key
from dqx.study.estimate.memory import quantized_bytes, room_for_activations, streams_from_disk
from dqx.study.experiment import Experiment

TOO_SMALL = "the model was quantized from disk, block by block: the device's memory was too small to do it in one piece"

log = logging.getLogger(__name__)


class ModelChanged(Exception):
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
    def from_dict(cls, content: Mapping[str, Any]) -> Quantized:
        return cls(QuantReport.from_dict(content["report"]), str(content["model"]), list(content["notes"]))


@dataclass(frozen=True)
class Subject:
    """A model to measure: what it is, and how to get it."""

    name: str
    facts: dict[str, Any]  # what it depends on
    load: Callable[[], DiffusionLM]
    simulation: Subject | None = None  # of one in an engine: the model whose activations can be looked at


class Subjects:
    """The models of a run, one of them in memory at a time: what is asked of full precision is asked first.

    Every call has to be made by all processes of the run. `timings` gets the seconds of loading.
    """

    def __init__(self, experiment: Experiment, cache: ArtifactCache, timings: dict[str, float]):
        self.experiment, self.config, self.cache, self.timings = experiment, experiment.config, cache, timings
        self.method, self.device, checkpoint = experiment.method, experiment.device, experiment.checkpoint
        tokenizer = load_tokenizer(checkpoint)
        self.lm = DiffusionLM(
            skeleton(checkpoint.arch), tokenizer, checkpoint, experiment.sampler, experiment.config.model
        )  # its weights come and go
        self.facts = facts.model_facts(experiment)
        self.seen: Sequence[CalibBatch] = ()  # what quantization reads
        self.key: Key  # of the quantized model, once that text is known
        self.known: Quantized | None = None
        self._loaded = ""  # full precision, quantized, with the backend

    def described(self) -> dict[str, Any]:
        """The model as a record has it."""
        experiment, model = self.experiment, self.config.model
        return {
            "name": model.name,
            "family": experiment.arch.family,
            "path": model.path,
            "fingerprint": experiment.fingerprint,
            "dtype": str(experiment.dtype).removeprefix("torch."),
            "parameters": experiment.checkpoint.parameters(),
            "sampler": experiment.sampler.name,
        }

    @property
    def original(self) -> Subject:
        """The model at full precision."""
        return Subject("full precision", self.facts, self.full_precision)

    @property
    def quantized(self) -> Subject:
        """The quantized model, once it is known."""
        assert self.known is not None
        own = self.facts | {"quantization": self.key.facts, "model": self.known.model}
        if self.config.backend == engine.LLAMA_CPP:
            simulation = Subject("quantized", own, self.after_quantization)
            in_engine = own | {"engine": engine.facts(self.config.export)}
            return Subject("quantized", in_engine, self.with_backend, simulation)
        kernels = {"kernels": self.experiment.kernels} if self.experiment.kernels else {}
        return Subject("quantized", own | kernels, self.with_backend)

    def full_precision(self) -> DiffusionLM:
        """The model as it was."""
        if self._loaded != "full precision":
            self._forget()
            self._say("loading the weights")
            started = time.perf_counter()
            model = self.config.model
            self.lm.model = load_weights(self.lm.checkpoint, dtype_of(model.dtype), self.device)
            plant_outliers(self.lm.model, model.outliers.gain, model.outliers.channels)
            self.timings["load the model"] = self.timings.get("load the model", 0.0) + time.perf_counter() - started
            self._loaded = "full precision"
        return self.lm

    def quantize(self, seen: Sequence[CalibBatch]) -> tuple[Quantized, str]:
        """What is known of the quantized model, and whether that is `reused` or was `computed` now.

        `seen` is the calibration text that the method reads.
        """
        self.seen, self.key = seen, self._key(seen)
        known, source = self.cache.value(self.key, Quantized.from_dict, self._make)
        self.known = known
        return known, source

    def after_quantization(self) -> DiffusionLM:
        """The quantized model, from the cache if it is there.

        Raises ModelChanged where it had to be made again and is another one than before; `known` is then of this one.
        """
        if self._loaded == "quantized":
            return self.lm
        with self.cache.reading(self.key):
            restored = self._restore()
        if not restored:
            with self.cache.alone(self.key):
                if not self._restore(alone=True):
                    before, self.known = self.known, self._make()
                    if before is None or before.model != self.known.model:
                        if processes().main:
                            self.cache.store.write(self.key, self.known)
                        raise ModelChanged(self.known)
        return self.lm

    def with_backend(self) -> DiffusionLM:
        """The quantized model as `backend` computes it: from its codes, or from its file. Raises as the other does."""
        if self._loaded != "with the backend":
            self.after_quantization()
            if self.config.backend == engine.LLAMA_CPP:
                self._say("writing the file for llama.cpp")
                self.lm.model = engine.in_llama_cpp(self.finished(), self.config.export)
                self._loaded = "with the backend"
            elif self.experiment.kernels:
                install(self.lm.model, self.experiment.kernels)
                self._loaded = "with the backend"
        return self.lm

    def finished(self) -> DiffusionLM:
        """The quantized model with how that was done; at full precision where nothing was. Raises as the others do."""
        assert self.known is not None
        if not self.known.report.changed:
            return self.full_precision()
        lm, report = self.after_quantization(), self.known.report
        return replace(lm, quantization=Quantization(self.method, self.config.bits, report))

    def save(self, folder: Path) -> None:
        """Write the quantized model to a folder that does not exist yet. Raises as `after_quantization` does."""
        self.after_quantization()
        assert self.known is not None
        if processes().main:
            self._write(self.known.report, folder)

    def _key(self, seen: Sequence[CalibBatch]) -> Key:
        """What the quantized model depends on."""
        config = self.config
        depends_on = facts.quantization_facts(
            self.facts,
            method=config.method,
            bits=config.bits,
            calib=config.calib if seen else None,
            calibration=seen,
            seed=config.seed,
        )
        label = method_label(config.method.name, config.method.variant)
        return Key("quantized", f"{config.model.name}-{label}-{config.bits.name}", depends_on)

    def _make(self) -> Quantized:
        """Quantize, and keep the weights if they are worth it. The main process holds the lock."""
        begun = self.cache.reuse and partial(self.cache.store.folder_of(self.key)).is_dir()
        report, notes = None, list[str]()
        if not processes().broadcast(begun or streams_from_disk(self.experiment.pools)):
            report, notes = self._quantize_in_memory()
        if report is None:
            report = self._quantize_from_disk()
        return Quantized(report, facts.model_digest(self.lm.model), notes)

    def _quantize_in_memory(self) -> tuple[QuantReport | None, list[str]]:
        """The report, None where the device of any process is too small for it, and notes."""
        config, lm, main = self.config, self.full_precision(), processes().main
        self._say("quantizing")
        self._loaded = "quantized"
        report = None
        with suppress(torch.OutOfMemoryError):
            report = quantize(lm.model, self.method, config.bits, self.seen, seed=config.seed, progress=main)
        if not all(processes().gather(report is not None)):
            return None, [TOO_SMALL]
        assert report is not None
        notes = one_model(lm.model, facts.model_digest)
        if main and report.changed and self._is_kept():
            self.cache.store.write_folder(self.key, lambda folder: self._write(report, folder))
        return report, notes

    def _write(self, report: QuantReport, folder: Path) -> None:
        save_quantized(self.lm.model, report, folder, method=self.method, bits=self.config.bits)

    def _quantize_from_disk(self) -> QuantReport:
        """The main process writes the folder of the quantized model, from which all load it."""
        store, team = self.cache.store, processes()
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
        return report

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
                    activations_gb=room_for_activations(self.experiment.pools) / GB,
                ),
            )

        if not self.cache.reuse:
            shutil.rmtree(partial(folder), ignore_errors=True)
        try:
            write()
        except OtherSettings as error:  # of another version of a library
            self.cache.store.warn(f"begun again: {error}")
            shutil.rmtree(partial(folder))
            write()

    def _is_complete(self, folder: Path) -> bool:
        """Whether an earlier run has written the whole folder, and was stopped before it could say so."""
        if not (self.cache.reuse and folder.is_dir()):
            return False
        try:
            verify_shards(folder, read_recipe(folder))
        except CheckpointError:
            return False
        return True

    def _is_kept(self) -> bool:
        """Whether the weights are worth keeping, and there is room for them now."""
        config, store = self.config, self.cache.store
        if not (self.seen and config.keep_quantized):
            return False
        needed = quantized_bytes(self.experiment.arch, self.experiment.dtype, self.method, config.bits)
        if config.cache_max_gb is None or space.make_room(store, needed, int(config.cache_max_gb * GB)):
            return True
        store.warn(f"the quantized model was not kept: it is larger than cache_max_gb={config.cache_max_gb:g}")
        return False

    def _forget(self) -> None:
        """Free the weights before others are loaded: two models are never held."""
        self.lm.model, self._loaded = skeleton(self.lm.checkpoint.arch), ""
        gc.collect()
        trim()
        accelerator.empty_cache(self.device)

    def _restore(self, *, alone: bool = False) -> bool:
        """Load the kept weights and see that they are those that are known.

        The main process holds the lock, for reading, or `alone`: then what is damaged is removed.
        """
        store, team = self.cache.store, processes()
        folder, known = store.folder_of(self.key), self.known
        if known is None or not team.broadcast(self.cache.reuse and folder.is_dir()):
            return False
        self._forget()
        self._say(f"loading the quantized weights from {folder}")
        try:
            model, _report = load_quantized(folder, self.device, verify=False)
            damage = "" if facts.model_digest(model) == known.model else "its content does not match its checksum"
        except ValueError as error:
            damage = str(error)
        damage = next((reason for reason in team.gather(damage) if reason), "")
        if damage:
            if alone and team.main:
                store.warn(f"{folder} is damaged and was computed again ({damage})")
                store.remove_folder(self.key)
            return False
        store.touch(folder)
        self.lm.model, self._loaded = model, "quantized"
        return True

    def _say(self, what: str) -> None:
        if processes().main:
            log.debug(f"  {what}")
