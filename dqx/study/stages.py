"""The stages of a run, each of them reused where nothing that it depends on differs.

What a stage needs is in the objects it works with, what its outcome depends on in `dqx.study.facts`. Weights are loaded
where something has to be computed on them, so a stage that is reused loads none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dqx.common.files import jsonable
from dqx.config.schema import ConfigProblems
from dqx.data.calibration import CalibBatch, calibration_windows
from dqx.data.hub import look_again
from dqx.data.masking import calibration_states
from dqx.diagnostics import activations, fidelity, passes
from dqx.diffusion.rollout import Rollout, State, schedule, spread, write
from dqx.diffusion.samplers.blockwise import BlockwiseSampler
from dqx.evaluate.journal import Journal
from dqx.evaluate.problems import hub_problems
from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.text import text_windows
from dqx.study import facts
from dqx.study.cache.artifacts import ArtifactCache
from dqx.study.cache.key import Key
from dqx.study.cache.store import Store
from dqx.study.costs import Costs
from dqx.study.experiment import Experiment
from dqx.study.subjects import Quantized, Subject, Subjects

Compute = Callable[[str, TaskSpec, Journal], TaskResult]


@dataclass(frozen=True)
class Watched:
    """What a model is shown while its activations are looked at."""

    windows: list[CalibBatch]
    states: list[State]


@dataclass(frozen=True)
class Asked:
    """What both models are asked, and what full precision says; its predictions are read where they are needed."""

    rollout: Rollout  # the answers that full precision has written
    questions: list[fidelity.Question]
    predictions: Callable[[], dict[str, Tensor]]
    steps: int  # of the answers' schedule

    @property
    def reference(self) -> fidelity.Reference:
        """What a quantized model is compared with."""
        predictions = fidelity.from_tensors(self.predictions())
        return fidelity.Reference(self.rollout, self.questions, predictions, self.steps)


@dataclass(frozen=True)
class Side:
    """What the model of one side of a run has shown."""

    results: dict[str, TaskResult]
    sources: dict[str, str]  # by task: computed or reused
    outliers: activations.OutlierStats | None  # None: not measured
    moved: dict[str, Any]  # its predictions against those of full precision; empty: not compared


class Stages:
    """What is done with the models of an experiment. Every call has to be made by all processes of the run."""

    def __init__(self, experiment: Experiment, costs: Costs):
        self.experiment, self.config, self.costs = experiment, experiment.config, costs
        self.cache = ArtifactCache(Store(self.config.cache_dir), reuse=self.config.reuse)
        self.subjects = Subjects(experiment, self.cache, costs.seconds)

    def data(self) -> Tensor | None:
        """The calibration text [N, T], None for runs that read none.

        What it and the tasks need from the hub is fetched here, before any weight is read. Raises ConfigProblems for
        what cannot be had.
        """
        look_again()
        config, tokenizer = self.config, self.subjects.lm.tokenizer
        windows, problems = None, []

        def told(where: str, error: Exception, *instead: str) -> None:
            offline = isinstance(error, ConnectionError)
            problems.append(f"{where}: {error}" + (f"; without a network, give {', or '.join(instead)}" * offline))

        try:
            if self.experiment.reads_text:
                windows = calibration_windows(config.calib, tokenizer, seed=config.seed, data_root=config.data_root)
        except (ValueError, OSError) as error:
            told(f"calib.text={config.calib.text}", error, "data_root=FOLDER with a copy", "calib.text=FILE")
        for name, spec in config.task.suite.items():
            if spec.kind == "text":
                try:
                    text_windows(name, spec, tokenizer, limit=config.task.limit, data_root=config.data_root)
                except (ValueError, OSError) as error:
                    told(f"task {name}", error, "data_root=FOLDER", f"task.suite.{name}.text=FILE")
        if config.data_root is None:
            problems += hub_problems(config.task.suite, limit=config.task.limit, chat=config.model.chat)
        if problems:
            raise ConfigProblems(problems)
        return windows

    def calibration(self, windows: Tensor | None) -> list[CalibBatch]:
        """The calibration states of the text. Only rollouts need the model's weights, and are kept."""
        if windows is None:
            return []
        config, lm, commitments = self.config, self.subjects.lm, self.experiment.asks_commitments

        def states() -> list[CalibBatch]:
            given = lm.model, lm.sampler, windows, config.calib
            return calibration_states(*given, seed=config.seed, commitments=commitments)

        def compute() -> dict[str, Tensor]:
            self.subjects.full_precision()
            kept = ((f"{name}.{i}", getattr(batch, name)) for i, batch in enumerate(states()) for name in names)
            return {name: tensor for name, tensor in kept if tensor is not None}

        names = ["ids", "mask_ratio", "passes", *(["committed"] if commitments else [])]
        with self.costs.stage("make the calibration states"):
            if not config.calib.rollout:
                return states()
            how = {"sampler": config.model.sampler, "calib": config.calib, "seed": config.seed, "kept": names}
            written = facts.measurement_facts(self.subjects.facts, tokens=windows, **how)
            tensors, _ = self.cache.tensors(self._key("calibration", written), compute)
        rows = [{name: tensors.get(f"{name}.{i}") for name in names} for i in range(len(windows))]
        return [CalibBatch(**row) for row in rows]  # type: ignore[arg-type]

    def reference(self) -> Asked | None:
        """What full precision says, for the quantized model to be compared with; None where nothing is compared.

        It is the answers that full precision writes after a few windows of text, and its predictions on their states.
        """
        settings, lm, seed = self.config.fidelity, self.subjects.lm, self.config.seed
        if not settings.samples:
            return None
        original = self.subjects.original
        with self.costs.stage("predictions, full precision"):
            tokens = fidelity.windows(lm.tokenizer, settings.samples, settings.length)
            prompts = tokens[:, : settings.length // 2]
            mask = self.experiment.arch.mask_token_id
            steps = lm.sampler.steps_for(settings.gen_length, schedule(settings.gen_length, self.config.steps.count))
            how = {"gen_length": settings.gen_length, "steps": steps, "seed": seed}
            sampler = self.config.model.sampler
            answers = facts.measurement_facts(original.facts, sampler=sampler, prompts=prompts, **how)

            def denoise() -> dict[str, Tensor]:
                model = original.load().model
                if isinstance(lm.sampler, BlockwiseSampler):
                    return passes.written(model, lm.sampler, prompts, **how)
                return {"ids": write(model, lm.sampler, prompts, **how).ids}

            written, _ = self.cache.tensors(self._key("denoising", answers), denoise)
            rollout = Rollout(written["ids"], prompts.shape[1], mask)
            if isinstance(lm.sampler, BlockwiseSampler):
                factorization = None if lm.sampler.likelihood_problems() else lm.sampler.factorization()
                questions = passes.ratio_questions(tokens, factorization, mask, seed=seed)
                questions += passes.state_questions(written, rollout, settings.steps, seed=seed)
            else:
                questions = fidelity.questions(tokens, rollout.states(settings.steps), mask, seed=seed)

            def predict() -> dict[str, Tensor]:
                model = original.load().model
                return fidelity.to_tensors(fidelity.predict(model, lm.sampler, questions, steps=steps, seed=seed))

            key = self._predictions("predictions", original, rollout, questions)
            return Asked(rollout, questions, self.cache.tensors_later(key, predict), steps)

    def watched(self, calibration: list[CalibBatch], asked: Asked | None) -> Watched:
        """A few calibration windows, and of the denoising states a few steps."""
        settings, total = self.config.outliers, len(calibration)
        windows = [calibration[i] for i in spread(min(settings.samples, total), total)]
        if asked is None or self.experiment.sampler.stores_final:  # the latter is told by `checks.sampler_notes`
            return Watched(windows, [])
        return Watched(windows, asked.rollout.states(settings.steps))

    def quantize(self, calibration: list[CalibBatch]) -> tuple[Quantized, str]:
        """What is known of the quantized model, and whether that is `reused` or was `computed` now."""
        with self.costs.stage("quantize"):
            return self.subjects.quantize(calibration if self.experiment.method.needs_data else [])

    def measure(self, subject: Subject, watched: Watched, asked: Asked | None = None) -> Side:
        """Everything that a run wants to know of a model; its weights are loaded where something is not known yet.

        With `asked` its predictions are compared with those of full precision.
        """
        statistics, moved = None, {}
        if watched.windows:
            with self.costs.stage(f"outliers, {subject.name}"):
                statistics = self.outliers(subject.simulation or subject, watched)
        if asked is not None:
            with self.costs.stage(f"predictions, {subject.name}"):
                moved = self.moved(subject, asked)
        with self.costs.stage(f"evaluate, {subject.name}"):
            return Side(*self.evaluate(subject), statistics, moved)

    def outliers(self, subject: Subject, watched: Watched) -> activations.OutlierStats:
        """The statistics, and the tensors that go with them: two artefacts, made and kept together."""
        settings, store = self.config.outliers, self.cache.store
        thresholds = activations.Thresholds(
            channel_ratio=settings.channel_ratio,
            massive_absolute=settings.massive_absolute,
            massive_relative=settings.massive_relative,
        )
        surfaces = settings.surfaces
        if surfaces is None:
            surfaces = activations.default_blocks(self.experiment.arch.n_blocks)
        shown = facts.outlier_facts(
            subject.facts, batches=watched.windows, thresholds=thresholds, states=watched.states, surfaces=surfaces
        )
        numbers, maps = self._key("outliers", shown), self._key("activations", shown)

        def read() -> activations.OutlierStats | None:
            tensors = store.read_tensors(maps)
            if tensors is None:
                return None
            return store.read(numbers, lambda content: activations.OutlierStats.from_dict(content, tensors))

        def compute() -> activations.OutlierStats:
            model = subject.load().model
            states = watched.states
            return activations.measure_activations(model, watched.windows, thresholds, states=states, surfaces=surfaces)

        def keep(statistics: activations.OutlierStats) -> None:
            store.write_tensors(maps, statistics.maps)
            store.write(numbers, statistics.to_dict())

        statistics, _ = self.cache.get(numbers, read, compute, keep)
        return statistics.with_token_texts(lambda token_id: str(self.subjects.lm.tokenizer.decode([token_id])))

    def moved(self, subject: Subject, asked: Asked) -> dict[str, Any]:
        """How far the predictions of a quantized model are from those of full precision."""
        experiment, seed = self.experiment, self.config.seed

        def compute() -> dict[str, Any]:
            reference = asked.reference  # before the quantized model is loaded: full precision may have to be asked
            residual_map = experiment.method.residual_map(self.config.bits, experiment.arch, seed=seed)
            return fidelity.measure_fidelity(
                subject.load().model, experiment.sampler, reference, seed=seed, residual_map=residual_map
            )

        key = self._predictions("fidelity", subject, asked.rollout, asked.questions)
        moved, _ = self.cache.value(key, dict[str, Any], compute)
        return moved

    def evaluate(self, subject: Subject) -> tuple[dict[str, TaskResult], dict[str, str]]:
        """The result of every task, and whether it was reused or computed."""
        config = self.config
        known = Results.of(self.experiment, self.cache, subject.facts)

        def compute(name: str, spec: TaskSpec, journal: Journal) -> TaskResult:
            return subject.load().evaluate_suite(
                {name: spec},
                limit=config.task.limit,
                steps=config.steps.count,
                seed=config.seed,
                data_root=config.data_root,
                likelihood=config.likelihood,
                journal=journal,
            )[name]

        results, sources = {}, {}
        for name, spec in config.task.suite.items():
            results[name], sources[name] = known.get(name, spec, compute)
        return results, sources

    def _predictions(self, kind: str, subject: Subject, rollout: Rollout, questions: list[fidelity.Question]) -> Key:
        """What a model says to the questions, or how far that is from what full precision says."""
        sampler, seed = self.config.model.sampler, self.config.seed
        asked = facts.prediction_facts(subject.facts, sampler=sampler, questions=questions, rollout=rollout, seed=seed)
        return self._key(kind, asked)

    def _key(self, kind: str, depends_on: Mapping[str, Any]) -> Key:
        return Key(kind, self.config.model.name, depends_on)


class Results:
    """Task results of one model: reused, continued where a run was killed, or computed.

    Task by task, so that runs with different suites share the tasks they have in common, and none is lost later.
    `model` has what all of them depend on (`dqx.study.facts.evaluation_facts`), `steps` is the run's own number of
    denoising steps, None the task's, `hub` says which datasets a task reads from there, in which version. Keys are
    asked for by all processes of a run.
    """

    def __init__(
        self,
        cache: ArtifactCache,
        model: Mapping[str, Any],
        *,
        steps: int | None = None,
        likelihood: LikelihoodSettings | None = None,
        hub: Callable[[TaskSpec], Mapping[str, str | None]] | None = None,
    ):
        self.cache, self.model, self.hub = cache, jsonable(model), hub
        self.steps, self.likelihood = steps, likelihood or LikelihoodSettings()

    @classmethod
    def of(cls, experiment: Experiment, cache: ArtifactCache, model: Mapping[str, Any] | None = None) -> Results:
        """Those of a run, at full precision or of the model with these facts."""
        config, own = experiment.config, facts.evaluation_facts(experiment)
        hub = partial(facts.hub_facts, chat=config.model.chat, limit=config.task.limit)
        return cls(
            cache,
            own | dict(model or {}),
            steps=config.steps.count,
            likelihood=config.likelihood,
            hub=hub if config.data_root is None else None,
        )

    def key(self, name: str, spec: TaskSpec) -> Key:
        """What the result of a task depends on."""
        task = facts.task_facts(name, spec, self.steps, self.likelihood)
        if self.hub is not None:
            team = self.cache.processes
            if commits := team.broadcast(self.hub(spec) if team.main else None):
                task["hub"] = commits
        return Key("results", name, self.model | {"task": task})

    def get(self, name: str, spec: TaskSpec, compute: Compute) -> tuple[TaskResult, str]:
        """The task's result, and whether it was `reused` or `computed`.

        `compute` finds finished documents in the journal, and leaves them there.
        """
        key, store = self.key(name, spec), self.cache.store

        def computed() -> TaskResult:
            team = self.cache.processes
            journal = store.journal(key, team.rank)
            if team.main and not self.cache.reuse:
                journal.remove()
            try:
                return compute(name, spec, journal)
            finally:
                journal.close()

        def keep(result: TaskResult) -> None:
            if store.write(key, result):
                store.journal(key).remove()

        return self.cache.get(key, lambda: store.read(key, TaskResult.from_dict), computed, keep)

    def finished(self, suite: Mapping[str, TaskSpec]) -> dict[str, int | None]:
        """By task, how many documents are there, None for all of them. Tasks of which nothing is there are left out."""
        counts: dict[str, int | None] = {}
        for name, spec in suite.items():
            key, store = self.key(name, spec), self.cache.store
            if store.read(key, TaskResult.from_dict) is not None:
                counts[name] = None
            elif count := len(store.journal(key).read().lines):
                counts[name] = count
        return counts
