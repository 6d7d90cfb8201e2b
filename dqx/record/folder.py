"""The record of a run: one folder that says what was run, on what, and everything that came out.

    config.yaml            the resolved configuration
    environment.json       versions, platform, device, by the schema in environment.schema.json
    results.json           the summary, by the schema in results.schema.json
    documents/TASK.jsonl   every document: prediction, score and likelihoods of both models
    outliers.json          outlier statistics per block and site, of both models
    activations.safetensors  channel maxima and activation surfaces, of both models
    quantization.json      one row per linear

Files appear whole or not at all. JSON has no NaN or infinity: such numbers are written as the strings "NaN",
"Infinity" and "-Infinity", which `float()` reads. `Record` is the same in memory; `RunFolder.read` gives it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import safe_open

from dqx.common.files import file_name, jsonable, write_json, write_text
from dqx.diagnostics import activations
from dqx.diagnostics.activations import OutlierStats
from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.record import deltas, words
from dqx.record.deltas import Delta
from dqx.record.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor  # takes a second to import, which reading a record does not need

SCHEMA = Path(__file__).with_name("results.schema.json")
SCHEMA_VERSION = 6
#: Version 1 had deltas without tests: computed again; 2 had no n_saved, and quantized no source; 3 had nothing by step;
#: 4 had words for levels, and called a difference worse whose interval held 0; 5 had no forwards. Levels and
#: verdicts are made anew.
READABLE = (1, 2, 3, 4, 5, 6)
#: What results.json has as `Record` has it; and what records of version 1 may lack.
KEPT = ("model", "timings", "choices", "command", "created", "warnings", "mirror")
ADDED = ("fidelity", "memory")
ACTIVATIONS = "activations.safetensors"
SIDES = ("full_precision", "quantized")


@dataclass(repr=False)
class Record:
    """Everything a run has to say. `deltas` and `forwards` are computed from the results where they are not given.

    `settings` is what was run, read from `config`.
    """

    config: dict[str, Any]  # resolved
    environment: dict[str, Any]
    model: dict[str, Any]  # at least name and fingerprint
    full_precision: dict[str, TaskResult]
    quantized: dict[str, TaskResult]
    quantization: dict[str, Any]  # QuantReport.to_dict()
    outliers: dict[str, OutlierStats] = field(default_factory=dict)  # by side; empty where not measured
    activations: Mapping[str, Tensor] = field(default_factory=dict)  # SIDE/BLOCK/SITE/channel_max [C] or surface [T, C]
    fidelity: dict[str, Any] = field(default_factory=dict)  # predictions against full precision; empty: not measured
    calibration_text: str | None = None  # fingerprint of the tokens of the calibration windows, before they are masked
    mask_ratio: float | None = None  # share of masked tokens in the calibration windows
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    memory: dict[str, Any] = field(default_factory=dict)  # bytes: limit, peak, and peak by stage
    sources: dict[str, dict[str, str]] = field(default_factory=dict)  # side -> task -> computed or reused
    choices: dict[str, str] = field(default_factory=dict)  # config group -> the file chosen
    command: str | None = None  # how to run it again
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    warnings: list[str] = field(default_factory=list)  # where the run could not do exactly what was asked
    mirror: dict[str, Any] = field(default_factory=lambda: {"state": "not written"})
    deltas: list[Delta] = field(default_factory=list)
    forwards: list[Delta] = field(default_factory=list)  # of forwards per token, where they depend on the model
    settings: RunSettings = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.settings = RunSettings.of(self.config)
        self.deltas = self.deltas or deltas.compare(self.full_precision, self.quantized)
        self.forwards = self.forwards or deltas.forwards(self.full_precision, self.quantized)

    def __repr__(self) -> str:
        first = deltas.headline(self.deltas)
        change = f"{words.difference(first.delta, first.metric)} {'nats' if first.lower_is_better else 'points'}"
        return f"Record({words.title(self)}, seed {self.settings.seed}; {', '.join(self.quantized)}: {change})"

    @property
    def average_bits(self) -> float | None:
        return self.quantization.get("average_bits")

    def results(self) -> dict[str, Any]:
        """What results.json says."""
        tasks = {}
        for name, before in self.full_precision.items():
            sides = {
                side: _cost(getattr(self, side)[name]) | {"source": self.sources.get(side, {}).get(name, "computed")}
                for side in SIDES
            }
            tasks[name] = {"category": before.category, "metric": before.metric, "n": before.n, **sides}
        run = self.settings
        calibration = {"fingerprint": self.calibration_text, "mask_ratio": self.mask_ratio}
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "command": self.command,
            "choices": self.choices,
            "model": self.model,
            "method": run.method,
            "variant": run.variant or None,
            "bits": run.bits,
            "average_bits": self.average_bits,
            "calibration": self.config["calib"] | calibration if run.calibration else None,
            "steps": run.steps,
            "limit": run.limit,
            "seed": run.seed,
            "tasks": tasks,
            "deltas": [asdict(row) for row in self.deltas],
            "forwards": [asdict(row) for row in self.forwards],
            "outliers": {side: activations.summary(stats) for side, stats in self.outliers.items()},
            "fidelity": self.fidelity,
            "quantization": {k: v for k, v in self.quantization.items() if k != "linears"},
            "timings": self.timings,
            "memory": self.memory,
            "warnings": self.warnings,
            "mirror": self.mirror,
        }


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def start(self, config: Any, environment: Mapping[str, Any]) -> None:
        """Write config.yaml and environment.json, so that a run that fails later has left what it was.

        Results that an earlier run has left here are removed: they are not of this one.
        """
        (self.path / "results.json").unlink(missing_ok=True)
        text = yaml.safe_dump(jsonable(config), sort_keys=False, allow_unicode=True)
        write_text(self.path / "config.yaml", text)
        write_json(self.path / "environment.json", environment)

    def write(self, record: Record) -> None:
        """Write every file of the record; results.json last, so that it stands for a finished run."""
        self.start(record.config, record.environment)
        for name, before in record.full_precision.items():
            rows = map(_document, deltas.paired(before, record.quantized[name]))
            lines = [json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
            write_text(self.path / "documents" / f"{file_name(name)}.jsonl", "".join(lines))
        write_json(self.path / "outliers.json", {side: stats.to_dict() for side, stats in record.outliers.items()})
        write_json(self.path / "quantization.json", record.quantization)
        if record.activations:
            from dqx.common.tensors import write_tensors  # torch, which only a run that measured something has loaded

            write_tensors(self.path / ACTIVATIONS, record.activations)
        else:
            (self.path / ACTIVATIONS).unlink(missing_ok=True)
        self.write_results(record)

    def write_results(self, record: Record) -> None:
        """Write results.json alone, again where it exists (after the mirror has reported)."""
        write_json(self.path / "results.json", record.results())

    def read(self, documents: bool = True) -> Record:
        """The record that `write` wrote, without its documents where a table is all that is wanted.

        Raises OSError or ValueError for a folder without a finished run.
        """
        if not (self.path / "results.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no finished run: there is no results.json")
        results = self._json("results.json")
        version = results.get("schema_version")
        if version not in READABLE:
            raise ValueError(
                f"{self.path / 'results.json'} has schema version {version}; "
                f"this version of dqx reads {' and '.join(map(str, READABLE))}"
            )
        sides: dict[str, dict[str, TaskResult]] = {side: {} for side in SIDES}
        sources: dict[str, dict[str, str]] = {side: {} for side in SIDES}
        for name, task in results["tasks"].items():
            rows = self._rows(name) if documents or version == 1 else []
            for side, tasks in sides.items():
                told = {key: task[key] for key in ("category", "metric", "n")} | task[side]
                told |= {"name": name, "value": float(told["value"])}
                sources[side][name] = told.pop("source", "computed")
                told.pop("tokens_per_forward", None)  # follows from the others
                tasks[name] = TaskResult(**told, documents=[DocumentRow.from_dict(row | row[side]) for row in rows])
        calibration = results["calibration"] or {}
        return Record(
            config=yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")),
            environment=self._json("environment.json"),
            quantization=self._json("quantization.json"),
            outliers={side: OutlierStats.from_dict(stats) for side, stats in self._json("outliers.json").items()},
            activations=TensorFile(self.path / ACTIVATIONS) if (self.path / ACTIVATIONS).is_file() else {},
            calibration_text=calibration.get("fingerprint"),
            mask_ratio=calibration.get("mask_ratio"),
            sources=sources,
            deltas=[deltas.renewed(Delta(**row)) for row in results["deltas"]] if version > 1 else [],
            forwards=[deltas.renewed(Delta(**row)) for row in results.get("forwards", [])],
            full_precision=sides["full_precision"],
            quantized=sides["quantized"],
            **{key: results[key] for key in KEPT},
            **{key: results.get(key, {}) for key in ADDED},
        )

    def _rows(self, task: str) -> list[dict[str, Any]]:
        lines = (self.path / "documents" / f"{file_name(task)}.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def _json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


class TensorFile(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file by name, each read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118  the file object itself cannot be searched
                raise KeyError(name)
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.path, framework="pt") as file:
            return iter(list(file.keys()))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _cost(result: TaskResult) -> dict[str, Any]:
    fields = ("value", "seconds", "n_forwards", "n_tokens", "n_saved", "tokens", "notes")
    per_forward = result.tokens / result.n_forwards if result.tokens and result.n_forwards else None
    return {k: getattr(result, k) for k in fields} | {"tokens_per_forward": per_forward}


def _document(rows: tuple[DocumentRow, DocumentRow]) -> dict[str, Any]:
    """A document of both sides, as documents/TASK.jsonl has it."""
    own = ("score", "prediction", "answer", "log_likelihoods", "forwards", "tokens")
    shared = {key: getattr(rows[0], key) for key in ("doc_id", "target", "truncated")}
    return shared | {side: {key: getattr(row, key) for key in own} for side, row in zip(SIDES, rows, strict=True)}
