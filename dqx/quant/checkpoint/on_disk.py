"""Quantize a checkpoint on disk into a quantized checkpoint, with one block in memory at a time.

Embedding, final norm and head are loaded first, changed by the method's model transforms, used to embed the calibration
text, written and freed; then each block in turn. Every number is the one that `quantize` gives in memory.

After each block the folder `OUTPUT.partial` holds all that the next one depends on: the files of the finished blocks
and, for methods that read activations, the inputs of the next block. The same call continues from there. The folder
takes the output's name when everything is done. Processes that may write the same output at the same time need a lock
of their own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqx.common.environment import package_version
from dqx.common.files import jsonable, write_json
from dqx.common.memory import GB, trim
from dqx.formats.bits import BitsConfig
from dqx.models.checkpoint import Checkpoint, load_block, load_outer, skeleton
from dqx.models.plant import plant_in_block
from dqx.models.transformer import Block
from dqx.quant.activations_store import ActivationStore, Row, Shelf
from dqx.quant.checkpoint import PARTIAL
from dqx.quant.checkpoint import folder as saved
from dqx.quant.home import Home, Progress
from dqx.quant.loop import Assignment, Batches, commitments, layouts, quantize_blocks, token_ids
from dqx.quant.method import Method
from dqx.quant.report import LinearRow, QuantReport

PROGRESS = "progress.json"
VERSIONS = ("dqx", "torch", "safetensors")


class OtherSettings(ValueError):
    """An unfinished folder belongs to a call with other settings."""


@dataclass(frozen=True)
class Loading:
    """How the blocks of a checkpoint are loaded, and how much of the calibration text's activations stay in RAM."""

    dtype: torch.dtype | None = None  # of the weights; None: as stored
    device: torch.device | str = "cpu"
    planted: tuple[float, int] = (1.0, 0)  # gain and number of the channels of `plant_outliers`
    activations_gb: float | None = None  # 10^9 bytes; what is beyond them lies in files; None: all in RAM


def quantize_checkpoint(
    source: Checkpoint,
    output: str | Path,
    method: Method,
    bits: BitsConfig,
    batches: Batches = (),
    *,
    loading: Loading | None = None,
    seed: int = 0,
    progress: bool = True,
) -> QuantReport:
    """Quantize a checkpoint into a new folder. A call that was interrupted, after any block, is continued by the same.

    Args:
        source: what `inspect` gives.
        output: the folder, which `load_quantized` reads.
        loading: precision, device and memory; None: as stored, on the CPU, all activations in RAM.
        method, bits, batches, seed, progress: as `quantize` takes them, which returns the same report.

    Raises:
        ValueError: as `quantize` does, and where `output` exists.
        OtherSettings: where an unfinished folder belongs to a call with other settings.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already; remove it, or write elsewhere")
    asked = Assignment(method, bits, token_ids(batches), seed, progress, commitments(batches), layouts(batches))
    home = OnDisk(source, partial(output), asked, loading or Loading())
    report = quantize_blocks(home, asked)
    home.finish(output, report)
    return report


def partial(output: Path) -> Path:
    """Where what will be the folder `output` is written."""
    return output.with_name(output.name + PARTIAL)


class OnDisk(Home):
    """A model whose blocks come from one checkpoint and go to the folder of another."""

    from_disk = True

    def __init__(self, source: Checkpoint, folder: Path, asked: Assignment, loading: Loading):
        limit = None if loading.activations_gb is None else int(loading.activations_gb * GB)
        self.rows = folder / "activations"
        super().__init__(skeleton(source.arch), torch.device(loading.device), ActivationStore(self.rows, limit))
        self.source, self.folder, self.asked, self.loading = source, folder, asked, loading
        self.settings: dict[str, Any] = json.loads(json.dumps(jsonable(self._settings())))
        self.shards: dict[str, Any] = {}
        self.progress = self._continue()

    def _settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        passes = [table for table in self.asked.passes if table is not None]
        return {
            "checkpoint": self.source.fingerprint(),
            "architecture": asdict(self.source.arch),
            "method": saved.described(self.asked.method),
            "bits": asdict(self.asked.bits),
            "calibration": _digest([*self.asked.ids, *self.asked.committed, *passes]),
            "seed": self.asked.seed,
            "dtype": str(self.loading.dtype),
            "device": self.device.type,
            "planted": self.loading.planted,
            "versions": {name: package_version(name) for name in VERSIONS},
        }

    @contextmanager
    def outer(self) -> Iterator[None]:
        load_outer(self.model, self.source, self.loading.dtype, self.device)
        yield
        self.shards |= saved.write_outer(self.folder, self.model)
        self._free_outer()

    def take(self, index: int) -> Block:
        block = load_block(self.source, index, self.loading.dtype, self.device)
        plant_in_block(block, *self.loading.planted)
        return block

    def put(self, index: int, block: Block) -> None:
        self.shards |= saved.write_block(self.folder, index, block)
        if index + 1 == self.source.arch.n_blocks:
            self.shards |= saved.write_norm(self.folder, self.model)
        self.model.blocks[index] = block.to("meta")

    def note(self, progress: Progress) -> None:
        inputs = {name: _entry(row) for name, row in progress.inputs.items()}
        weights = None if progress.weights is None else _entry(progress.weights)
        state = {"job": self.settings, **vars(progress), "inputs": inputs, "weights": weights, "shards": self.shards}
        write_json(self.folder / PROGRESS, state)
        self._remove_rows(_named(state))
        trim()

    def finish(self, output: Path, report: QuantReport) -> None:
        """Complete the folder and give it its name."""
        asked = self.asked
        saved.write_recipe(self.folder, self.source.arch, report, self.shards, method=asked.method, bits=asked.bits)
        self._remove_rows(set())
        self.folder.rename(output)
        (output / PROGRESS).unlink()

    def _continue(self) -> Progress | None:
        """What an earlier attempt left; the folder is emptied where it left nothing to continue from."""
        path = self.folder / PROGRESS
        if not path.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            return None
        state = json.loads(path.read_text(encoding="utf-8"))
        if others := [key for key in self.settings if state["job"].get(key) != self.settings[key]]:
            raise OtherSettings(
                f"{self.folder} is an unfinished quantization with another {', '.join(others)}; remove it, or repeat "
                "the call that began it"
            )
        self.shards = state["shards"]
        saved.read_outer(self.folder, self.model, "cpu")
        self.model.norm.to(self.device)
        self._free_outer()
        for index in range(state["blocks"]):
            self.model.blocks[index] = saved.read_block(self.folder, index, self.source.arch, "cpu").to("meta")
        self._remove_rows(_named(state))
        inputs = {name: self._shelf(entry) for name, entry in state["inputs"].items()}
        weights = None if state["weights"] is None else self._shelf(state["weights"])
        rows = [LinearRow.from_dict(row) for row in state["rows"]]
        return Progress(state["blocks"], rows, inputs, weights, state["seconds"], state["peak_ram"], state["peak_gpu"])

    def _shelf(self, entry: Mapping[str, Any]) -> Shelf:
        """The row that `_entry` tells of."""
        folder = self.rows / entry["row"]
        return Shelf(self.store, folder, keep=True, device=self.device, length=entry["length"])

    def _remove_rows(self, wanted: set[str]) -> None:
        """Delete all activations on disk but these rows."""
        for path in self.rows.iterdir() if self.rows.is_dir() else ():
            if path.name not in wanted:
                shutil.rmtree(path)
        if not wanted:
            shutil.rmtree(self.rows, ignore_errors=True)

    def _free_outer(self) -> None:
        tied = self.model.head.weight is self.model.embed.weight
        for module in (self.model.embed, self.model.head):  # the final norm is small, and a correction may want it
            module.to("meta")
        if tied:
            self.model.head.weight = self.model.embed.weight


def _entry(row: Row) -> dict[str, Any]:
    """Where a row lies, for `progress.json`."""
    assert isinstance(row, Shelf)
    return {"row": row.folder.name, "length": len(row)}


def _named(state: Mapping[str, Any]) -> set[str]:
    """The folders of all rows that a state of progress needs."""
    return {entry["row"] for entry in (*state["inputs"].values(), state["weights"]) if entry is not None}


def _digest(ids: Sequence[Tensor]) -> str:
    """SHA-256 over the calibration tokens [B, T] and what is known of them, sequence by sequence."""
    digest = hashlib.sha256()
    for row in (row for batch in ids for row in batch.cpu()):
        digest.update(json.dumps(row.tolist()).encode())
    return digest.hexdigest()
