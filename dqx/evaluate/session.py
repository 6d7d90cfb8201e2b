"""One session of a task's evaluation: the documents that are left, those of this process, and what they cost.

A run that is killed and started again takes several sessions, each with any number of processes. Documents are shared
by their requests alone, finished or not: with as many processes, a continued run has the batches of an undisturbed one.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm

from dqx.common.processes import processes, shares
from dqx.diffusion.batches import Request
from dqx.diffusion.scorer import Scorer
from dqx.diffusion.stopping import Question
from dqx.evaluate.journal import Journal, Line, Past


@dataclass(frozen=True)
class Document:
    """A document: its name, its requests by index, and a digest of their text."""

    name: str
    requests: Sequence[int]
    text: str


class EvaluationSession:
    """The requests of a task: which are answered, which this process answers, and all answers in the end.

    `work` is the estimated work of each request. `spent` counts what this process spends and `notes` says what a reader
    of the result should know; after `gather` they are those of all processes and sessions.
    """

    def __init__(self, documents: Sequence[Document], work: Sequence[float], journal: Journal | None = None):
        self.documents, self.journal, self.processes = documents, journal, processes()
        self.past: Past = self.processes.broadcast(journal.read() if journal and self.processes.main else Past())
        self.known: dict[int, Any] = {}
        for document in documents:
            line = self.past.lines.get(document.name)
            if line and line.text == document.text and len(line.responses) == len(document.requests):
                self.known.update(zip(document.requests, line.responses, strict=True))
        loads = [sum(work[i] for i in document.requests) for document in documents]
        share = shares(loads, self.processes.count)[self.processes.rank]
        self.mine = sorted(i for d in share for i in documents[d].requests)
        self._document = {i: documents[d] for d in share for i in documents[d].requests}
        self.answered: dict[int, Any] = {}
        self.spent: Counter[str] = Counter()
        self.notes: list[str] = []
        self._started = time.perf_counter_ns()
        self._kept: Counter[str] = Counter()  # what the journal has of `spent`

    @property
    def todo(self) -> list[int]:
        """The requests that this process still has to answer."""
        return [i for i in self.mine if i not in self.known and i not in self.answered]

    def spend(self, **amounts: int) -> None:
        """Count what was spent: `n_forwards`, `n_tokens`, `n_saved`, `tokens`."""
        self.spent.update(amounts)

    def note(self, notes: Iterable[str]) -> None:
        """Notes for the result, each once."""
        self.notes += [note for note in notes if note not in self.notes]

    def enter(self, answers: Mapping[int, Any]) -> None:
        """Note the answers to requests. Documents that they complete are kept in the journal."""
        self.answered.update(answers)
        touched = {document.name: document for document in map(self._document.__getitem__, answers)}
        complete = [d for d in touched.values() if all(i in self.answered for i in d.requests)]
        if self.journal and complete:
            lines = [Line(d.name, d.text, [self.answered[i] for i in d.requests]) for d in complete]
            self.spent["nanoseconds"] = time.perf_counter_ns() - self._started
            lines[0].spent.update(self.spent - self._kept)
            lines[0].notes.extend(self.notes)
            self._kept = Counter(self.spent)
            self.journal.append(lines)

    def gather(self) -> list[Any]:
        """The answers to all requests, in order, of all processes and sessions."""
        self.spent["nanoseconds"] = time.perf_counter_ns() - self._started
        answers, notes, spent = dict(self.known), list(self.past.notes), Counter(self.past.spent)
        parts = self.processes.gather((self.answered, self.notes, self.spent))
        slowest = max(part[2].pop("nanoseconds") for part in parts)
        for answered, noted, counted in parts:
            answers |= answered
            notes += noted
            spent += counted
        spent["nanoseconds"] += slowest
        before = sum(all(i in self.known for i in d.requests) for d in self.documents)
        if before:
            notes.append(f"continued: {before} of {len(self.documents)} documents were finished in earlier sessions")
        self.spent, self.notes = spent, list(dict.fromkeys(notes))
        return [answers[i] for i in range(len(answers))]


def score(
    scorer: Scorer,
    requests: Sequence[Request],
    session: EvaluationSession,
    questions: Sequence[Question] = (),
    *,
    answers: Callable[[dict[int, float]], Mapping[int, Any]] = dict,
    known: Callable[[Any], float] = float,
    label: str = "",
    shown: bool = False,
) -> None:
    """Answer a session's requests by their likelihoods; the progress bar says `label` and is drawn where `shown`.

    `answers` makes answers of likelihoods, by request, `known` a likelihood of an answer in the journal.
    """
    place = {i: at for at, i in enumerate(session.mine)}
    counted: Counter[str] = Counter()

    def count() -> None:
        total = Counter({f"draws {n}": times for n, times in scorer.draws.items()})
        total.update(n_forwards=scorer.n_forwards, n_tokens=scorer.n_tokens)
        session.spent.update(total - counted)
        counted.update(total - counted)
        session.note(scorer.notes)

    def finished(values: dict[int, float]) -> None:
        entered = answers({session.mine[at]: nats for at, nats in values.items()})
        count()
        session.enter(entered)

    mine = [requests[i] for i in session.mine]
    with progress_bar(sum(map(scorer.work, mine)), label, "tokens", shown=shown) as bar:
        scorer.score(
            mine,
            [Question([place[i] for i in q.requests], q.scales) for q in questions if q.requests[0] in place],
            known={place[i]: known(answer) for i, answer in session.known.items() if i in place},
            progress=bar.update,
            finished=finished,
        )
    count()


def progress_bar(total: int, label: str, unit: str, *, shown: bool) -> tqdm[NoReturn]:
    """The bar of a session, drawn by the main process alone. A log file keeps every update, so there they are few."""
    return tqdm(
        total=total,
        desc=label or None,
        disable=not (shown and processes().main),
        unit=f" {unit}",
        unit_scale=total >= 10_000,
        leave=not sys.stderr.isatty(),  # a terminal keeps results alone; a log file says what was done
        mininterval=1.0 if sys.stderr.isatty() else 60.0,
    )
