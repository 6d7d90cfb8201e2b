"""What an evaluation hands on: one `TaskResult` per task, one `DocumentRow` per document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from dqx.evaluate.spec import NLL


@dataclass(frozen=True)
class DocumentRow:
    """One document's outcome. `doc_id` is `subtask/index`: the same document has the same id in every run."""

    doc_id: str
    score: float  # of the task's metric; 0 or 1 where the metric is a decision
    prediction: str | None = None  # the generated text, or the chosen answer
    target: str | None = None
    log_likelihoods: list[float] | None = None  # nats, one per answer choice; None for generation
    answer: str | None = None  # what the task's filter read out of a generated text, the part that is scored
    truncated: int = 0  # tokens cut from the left of a prompt that did not fit into the model
    forwards: int | None = None  # sequences that its answer took; None where the sampler's schedule alone decides that
    tokens: int | None = None  # tokens written in them

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DocumentRow:
        """The row that `to_dict` wrote. Raises KeyError or TypeError where it is none."""
        likelihoods = data["log_likelihoods"]
        return cls(
            doc_id=str(data["doc_id"]),
            score=float(data["score"]),
            prediction=data["prediction"],
            target=data["target"],
            log_likelihoods=None if likelihoods is None else [float(x) for x in likelihoods],
            answer=data.get("answer"),
            truncated=int(data.get("truncated", 0)),
            forwards=data.get("forwards"),
            tokens=data.get("tokens"),
        )


@dataclass(frozen=True)
class TaskResult:
    """One task of one model: the metric, what it cost, and every document."""

    name: str
    category: str  # general, math or code
    metric: str
    value: float  # the metric over all documents, a fraction
    n: int  # documents
    documents: list[DocumentRow] = field(default_factory=list)
    seconds: float = 0.0
    n_forwards: int = 0  # sequences that went through the model
    tokens: int = 0  # tokens generated; prompts never count
    n_tokens: int = 0  # tokens of those sequences that were computed
    n_saved: int = 0  # sequences that were not needed because an answer's text was settled
    notes: list[str] = field(default_factory=list)  # what a reader of the number should know, in plain words

    @property
    def shown(self) -> str:
        """The value with its unit: `97.9 % exact_match`, `1.234 nats per token`."""
        return f"{self.value:.4g} nats per token" if self.metric == NLL else f"{100 * self.value:.1f} % {self.metric}"

    def __repr__(self) -> str:
        return f"TaskResult({self.name}: {self.shown}, n={self.n}, {self.seconds:.1f} s)"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("task", "value", "n", "seconds"))
        row = "".join(f"<td>{escape(str(x))}</td>" for x in (self.name, self.shown, self.n, f"{self.seconds:.1f}"))
        return f"<table><tr>{head}</tr><tr>{row}</tr></table>"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """The result that `to_dict` wrote. Raises KeyError or TypeError where it is none."""
        return cls(
            name=str(data["name"]),
            category=str(data["category"]),
            metric=str(data["metric"]),
            value=float(data["value"]),
            n=int(data["n"]),
            documents=[DocumentRow.from_dict(row) for row in data["documents"]],
            seconds=float(data["seconds"]),
            n_forwards=int(data["n_forwards"]),
            tokens=int(data["tokens"]),
            n_tokens=int(data.get("n_tokens", 0)),
            n_saved=int(data.get("n_saved", 0)),
            notes=[str(note) for note in data.get("notes", [])],
        )
