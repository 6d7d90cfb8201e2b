"""All tasks of the suite, on a few real documents, through lm-eval's prompts, filters and metrics."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from conftest import DATA, TinyCheckpoint
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.config.group import AggMetricConfig
from sympy.parsing.latex import parse_latex

from dqx.diffusion.engine import Answer, Prompt
from dqx.diffusion.samplers import DreamSampler, LLaDASampler
from dqx.evaluate import tasks as suites
from dqx.evaluate.catalogue import leaves
from dqx.evaluate.harness import DiffusionHarness, HarnessTask
from dqx.evaluate.local_task import build
from dqx.evaluate.problems import task_problems
from dqx.evaluate.results import TaskResult
from dqx.evaluate.scorers.math_check import equal_answers
from dqx.evaluate.settings import EvaluationSettings
from dqx.evaluate.spec import TaskSpec
from dqx.evaluate.tasks import chosen, in_turn
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.tokenizer import load_tokenizer

CONF = Path(__file__).parents[2] / "conf" / "task"
GENERAL = ("winogrande", "piqa", "arc_challenge", "arc_easy", "hellaswag", "mmlu")
MATH_CODE = ("gsm8k", "math", "humaneval", "mbpp")
NANO = ("nano_facts", "nano_sums", "nano_code")


def spec(name: str, **changes: Any) -> TaskSpec:
    (entry,) = yaml.safe_load((CONF / f"{name}.yaml").read_text())["suite"].values()
    return replace(TaskSpec(**entry), **changes)


def short(name: str, **changes: Any) -> TaskSpec:
    """The task with answers of 4 tokens, or 2 draws per choice."""
    if spec(name).kind == "generation":
        return spec(name, **{"gen_length": 4, "block_length": 2, "steps": 4, **changes})
    return spec(name, **{"mc_samples": 2, **changes})


@pytest.fixture
def parts(tiny_checkpoint: TinyCheckpoint) -> dict[str, Any]:
    checkpoint = inspect(str(tiny_checkpoint("llada", max_sequence_length=192, n_layers=1)))
    return {
        "model": load_weights(checkpoint),
        "tokenizer": load_tokenizer(checkpoint),
        "sampler": LLaDASampler(),
        "data_root": str(DATA),
        "progress": False,
    }


def evaluate(model: Any, tokenizer: Any, suite: Any, *, sampler: Any, **settings: Any) -> dict[str, TaskResult]:
    return suites.evaluate(model, tokenizer, suite, sampler=sampler, settings=EvaluationSettings(**settings))


def widen(parts: dict[str, Any]) -> None:
    """Let prompts of any length in (where answers do not come from the model)."""
    parts["model"].arch = replace(parts["model"].arch, max_length=10**5)


class WellRead:
    """An engine that knows the answer to each prompt, or says something else."""

    def __init__(self, tokenizer: Any, answers: list[str]):
        self.tokenizer, self.answers, self.prompts = tokenizer, answers, []

    def __call__(self, model: object, sampler: object, **_: object) -> WellRead:
        return self

    notes = ()

    def stream(self, prompts: list[Prompt]) -> Iterator[tuple[int, Answer]]:
        for i, prompt in enumerate(prompts):
            self.prompts.append(self.tokenizer.decode(prompt.ids))
            ids = self.tokenizer(self.answers[i], add_special_tokens=False).input_ids
            yield i, Answer([*ids, 256], n_written=len(ids), n_forwards=1, n_saved=0, n_tokens=1)


@pytest.fixture
def well_read(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], WellRead]:
    """From now on answers are the given ones, in the order of the requests."""

    def make(answers: list[str]) -> WellRead:
        engine = WellRead(parts["tokenizer"], answers)
        monkeypatch.setattr("dqx.evaluate.harness.engine_for", lambda sampler: engine)
        return engine

    return make


# settings


def test_settings_are_the_studys() -> None:
    """arXiv 2508.14896: shots, draws, lengths, blocks and steps."""
    for name in GENERAL:
        s = spec(name)
        assert (s.kind, s.category, s.metric) == ("likelihood", "general", "acc")
        assert (s.fewshot, s.mc_samples) == ((5, 1) if name == "mmlu" else (0, 128))
    published = {
        "gsm8k": (4, 256, 256, 32),
        "math": (0, 256, 256, 64),
        "humaneval": (0, 512, 512, 32),
        "mbpp": (3, 512, 512, 32),
    }
    for name, settings in published.items():
        s = spec(name)
        assert (s.fewshot, s.gen_length, s.steps, s.block_length) == settings
        assert s.category == ("math" if name in ("gsm8k", "math") else "code")


@pytest.mark.parametrize(("suite", "members"), [("nano", NANO), ("general", GENERAL), ("math_code", MATH_CODE)])
def test_suites_list_their_tasks(suite: str, members: tuple[str, ...]) -> None:
    assert tuple(yaml.safe_load((CONF / f"{suite}.yaml").read_text())["defaults"]) == members


# every benchmark runs


@pytest.mark.parametrize("name", [*GENERAL, *MATH_CODE, *NANO])
def test_task_runs_on_local_data(name: str, parts: dict[str, Any]) -> None:
    result = evaluate(**parts, suite={name: short(name)}, limit=2)[name]
    assert (result.name, result.n, len(result.documents)) == (name, 2, 2)
    assert result.value == sum(d.score for d in result.documents) / 2
    assert result.category == spec(name).category
    assert len({d.doc_id for d in result.documents}) == 2
    if spec(name).kind == "generation":
        assert (result.tokens, result.n_forwards) == (8, 8)
        assert all(d.log_likelihoods is None and d.prediction is not None for d in result.documents)
    else:
        assert result.tokens == 0
        n_choices = 2 if name in ("winogrande", "piqa") else 4
        for d in result.documents:
            assert d.log_likelihoods is not None
            assert len(d.log_likelihoods) == n_choices
            assert all(math.isfinite(x) and x < 0 for x in d.log_likelihoods)
            assert (d.prediction == d.target) == (d.score == 1.0)
    if spec(name).category == "code":
        assert any(note.startswith("programs ran in a sandbox of limits") for note in result.notes)


def test_dream_runs_all_ten(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = inspect(str(tiny_checkpoint("dream", max_position_embeddings=192)))
    results = evaluate(
        load_weights(checkpoint),
        load_tokenizer(checkpoint),
        {name: short(name) for name in (*GENERAL, *MATH_CODE)},
        sampler=DreamSampler(),
        limit=2,
        data_root=str(DATA),
        progress=False,
    )
    assert {name: r.n for name, r in results.items()} == dict.fromkeys((*GENERAL, *MATH_CODE), 2)
    assert all(math.isfinite(x) for r in results.values() for d in r.documents for x in d.log_likelihoods or [0.0])
    assert results["math"].notes == ["block_length=2 is not used: Dream's sampler writes the whole answer at once"]


# right answers score 1


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("gsm8k", "She sells 9 eggs for 9 * 2 = 18 dollars.\n#### 18", "#### 19"),
        ("math", "We get $3x = 15$ and so $x = \\boxed{5}$.", "$\\boxed{6}$"),
        ("humaneval", None, "    return 7"),
        ("mbpp", None, "def remove_Occ(s, ch): return s"),
        ("nano_sums", None, " 01 02 = 21"),
        ("nano_code", None, "    return None"),
    ],
)
def test_right_answers_score_one(name: str, right: str | None, wrong: str, parts: dict[str, Any], well_read) -> None:
    widen(parts)
    task = build(leaves(spec(name).harness)[0], spec(name), data_root=str(DATA), steps=None)
    doc = task.eval_docs[0]
    if right is None:
        right = {"mbpp": doc.get("code"), "nano_sums": doc.get("solution")}.get(name) or doc["canonical_solution"]
    for answer, score in ((right, 1.0), (wrong, 0.0), ("", 0.0)):
        well_read([answer])
        assert evaluate(**parts, suite={name: spec(name)}, limit=1)[name].value == score


def test_gsm8k_filters_differ(parts: dict[str, Any], well_read) -> None:
    values = {}
    for name in ("flexible-extract", "strict-match"):
        well_read(["The answer is 18"])
        result = evaluate(**parts, suite={"gsm8k": short("gsm8k", filter=name, gen_length=20, steps=20)}, limit=1)[
            "gsm8k"
        ]
        values[result.metric] = result.value
    assert values == {"exact_match,flexible-extract": 1.0, "exact_match,strict-match": 0.0}


@pytest.mark.parametrize(
    ("solution", "answer", "equal"),
    [
        ("so $\\boxed{\\frac{1}{2}}$", "The answer is $0.5$.", True),
        ("\\boxed{x^2+1}", "\\boxed{1+x^2}", True),
        ("\\boxed{2\\sqrt{2}}", "$\\sqrt{8}$", True),
        ("\\boxed{\\frac{\\pi}{3}}", "so $\\theta = \\pi/3$", True),
        ("\\boxed{\\left(0, \\frac{1}{2}\\right]}", "$(0, 0.5]$", True),
        ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "$\\begin{pmatrix}1\\\\2\\end{pmatrix}$", True),
        ("\\boxed{x^2+1}", "$x^2-1$", False),
        ("\\boxed{3}", "It is 4", False),
        ("\\boxed{3}", "", False),
        ("\\boxed{3}", "$9^{9^{9^9}}$", False),
        ("\\boxed{2}", "$2$", True),  # after the helper had to be stopped
    ],
)
def test_mathematical_answers(solution: str, answer: str, equal: bool) -> None:
    assert equal_answers(solution, answer, timeout=1 if "9^9" in answer else 20) is equal


def test_mathematics_is_read_with_hydras_antlr() -> None:
    """Hydra pins 4.9.3: lm-eval's own MATH refuses it, sympy reads no LaTeX with it, math_verify does, as above."""
    assert version("antlr4-python3-runtime") == "4.9.3"
    with pytest.raises(ImportError, match="antlr4"):
        parse_latex("1")
    with pytest.raises(AssertionError, match=r"antlr4-python3-runtime==4\.11"):
        importlib.import_module("lm_eval.tasks.minerva_math.utils")


# prompts


def prompt_of(name: str, parts: dict[str, Any], well_read, chat: bool = False, **changes: Any) -> str:
    widen(parts)
    engine = well_read([""])
    evaluate(**parts, suite={name: short(name, **changes)}, limit=1, chat=chat)
    return engine.prompts[0]


def test_prompts(parts: dict[str, Any], well_read) -> None:
    gsm8k = prompt_of("gsm8k", parts, well_read)
    assert gsm8k.count("Question: ") == 5
    assert gsm8k.count("\n#### ") == 4
    assert gsm8k.endswith("How much in dollars does she make every day at the farmers' market?\nAnswer:")
    mbpp = prompt_of("mbpp", parts, well_read)
    assert mbpp.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to find the similar elements "
        "from the given two tuple lists. Your code should pass these tests:\n\nassert similar_elements("
    )
    assert mbpp.count("\n[BEGIN]\n") == 4
    assert mbpp.count("\n[DONE]\n\n") == 3
    assert mbpp.endswith('assert remove_Occ("PHP","P") == "H"\n[BEGIN]\n')
    assert prompt_of("humaneval", parts, well_read).startswith("from typing import List\n\n\ndef has_close_elements(")
    assert prompt_of("math", parts, well_read) == "Problem:\nSolve $3x + 5 = 20$ for $x$.\n\nSolution:"


def test_chat_models_get_their_template_and_a_begun_answer(parts: dict[str, Any], well_read) -> None:
    gsm8k = prompt_of("gsm8k", parts, well_read, chat=True, fewshot=1)
    assert gsm8k.startswith("<user>Question: ")
    assert gsm8k.count("<|eot_id|>") == 3  # one example is two turns
    assert gsm8k.endswith("Answer:<|eot_id|><assistant>")
    humaneval = prompt_of("humaneval", parts, well_read, chat=True)
    assert humaneval.startswith("<user>Write a solution to the following problem")
    assert "<assistant>Here is the completed function:\n```python\nfrom typing" in humaneval
    assert prompt_of("mbpp", parts, well_read, chat=True).endswith("<|eot_id|><assistant>\n```python\n")


def test_examples_come_from_validation_where_train_is_missing(parts: dict[str, Any]) -> None:
    widen(parts)
    suite = {"piqa": short("piqa", fewshot=1)}
    result = evaluate(**parts, suite=suite, limit=2)["piqa"]
    assert "piqa: the data has no split 'train'; examples come from another one" in result.notes
    assert evaluate(**parts, suite={"piqa": short("piqa")}, limit=1)["piqa"].notes == []


# independence


def test_documents_do_not_depend_on_limit_or_order_of_tasks(parts: dict[str, Any]) -> None:
    parts["sampler"] = LLaDASampler(temperature=1.0)
    a, b = {"arc_easy": short("arc_easy")}, {"gsm8k": short("gsm8k", fewshot=1)}
    first = evaluate(**parts, suite=a | b, limit=2)
    second = evaluate(**parts, suite=b | a, limit=2)
    fewer = evaluate(**parts, suite=b | a, limit=1)
    for name in ("arc_easy", "gsm8k"):
        assert first[name].documents == second[name].documents
        assert first[name].documents[:1] == fewer[name].documents
    other = evaluate(**parts, suite=a, limit=1, seed=1)["arc_easy"]
    assert other.documents[0].log_likelihoods != first["arc_easy"].documents[0].log_likelihoods


def test_a_groups_documents_are_taken_in_turn(parts: dict[str, Any]) -> None:
    assert in_turn([3, 1, 2], 5) == [2, 1, 2]
    assert in_turn([3, 1, 2], 100) == [3, 1, 2]
    assert in_turn([3, 1, 2], 2) == [1, 1, 0]
    ids = [d.doc_id for d in evaluate(**parts, suite={"mmlu": short("mmlu")}, limit=3)["mmlu"].documents]
    assert ids == ["mmlu_abstract_algebra/0", "mmlu_anatomy/0", "mmlu_astronomy/0"]


def test_steps_of_the_run_replace_the_tasks(parts: dict[str, Any]) -> None:
    assert evaluate(**parts, suite={"math": short("math")}, limit=1, steps=2)["math"].n_forwards == 2


def test_values_are_those_of_lm_eval(parts: dict[str, Any], well_read) -> None:
    """A single task, and a group weighted by size."""
    harness = DiffusionHarness(
        parts["model"],
        parts["tokenizer"],
        LLaDASampler(),
        EvaluationSettings(progress=False),
        HarnessTask(mc_samples=2),
    )

    def build_all(name: str, n: int) -> dict[str, Any]:
        built = [build(leaf, short(name), data_root=str(DATA), steps=None) for leaf in leaves(spec(name).harness)[:n]]
        return {task.task_name: task for task in built}

    task = build_all("arc_easy", 1)
    theirs = evaluator.evaluate(harness, {"tasks": task}, bootstrap_iters=0)["results"]["arc_easy"]["acc,none"]
    ours = evaluate(**parts, suite={"arc_easy": short("arc_easy")})["arc_easy"]
    assert (ours.value, ours.n) == (theirs, 3)

    tasks = build_all("math", 7)  # 2 + 6 x 1 documents
    group = Group("math", aggregate_metric_list=[AggMetricConfig("math_verify", weight_by_size=True)])
    for member in tasks.values():
        group.add(member)
    right = {"dqx_math_algebra": [1.0, 1.0]}
    metrics = {
        name: {"math_verify,none": sum(right.get(name, [0.0])) / len(right.get(name, [0.0])), "sample_len": n}
        for name, n in ((name, len(task.eval_docs)) for name, task in tasks.items())
    }
    well_read(["$5$", "$12$"] + ["no"] * 6)
    mine = evaluate(**parts, suite={"math": short("math")})["math"]
    assert mine.value == pytest.approx(2 / 8)
    assert mine.value == pytest.approx(group.aggregate(metrics)["math_verify,none"])


# problems


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_the_recorded_choice_is_the_one_that_was_scored(metric: str, parts: dict[str, Any]) -> None:
    suite = {"hellaswag": spec("hellaswag", metric=metric, mc_samples=2)}
    documents = evaluate(**parts, suite=suite)["hellaswag"].documents
    assert len(documents) > 2
    assert [row.score == 1 for row in documents] == [row.prediction == row.target for row in documents]


def test_what_each_metric_chooses_is_what_lm_eval_chooses() -> None:
    likelihoods, choices = [-8.0, -5.0, -6.0], ["a long answer", "b", "\u00e9\u00e9\u00e9\u00e9"]
    lengths = [[1.0] * 3, [len(c) for c in choices], [len(c.encode()) for c in choices]]
    for metric, length in zip(("acc", "acc_norm", "acc_bytes"), lengths, strict=True):
        expected = int(np.argmax(np.array(likelihoods) / np.array(length)))
        assert chosen(metric, likelihoods, choices, []) == expected
    assert chosen("acc_mutual_info", likelihoods, choices, [-7.0, -1.0, -9.0]) == 2
    assert chosen("acc_norm", [-5.0, -1.0], ["x", ""], []) == 0  # nothing is never chosen
    assert chosen("acc", [-1.0, -1.0], ["x", "y"], []) == 0


def test_a_good_suite_has_no_problems() -> None:
    suite = {name: spec(name) for name in (*GENERAL, *MATH_CODE, *NANO)}
    assert task_problems(suite, data_root=str(DATA), sampler=LLaDASampler(), limit=3) == []


@pytest.mark.parametrize(
    ("name", "changes", "run", "message"),
    [
        ("gsm8k", {"harness": "gsm8kk"}, {}, "'gsm8kk' is no task of lm-eval 0.4.13 nor of dqx; did you mean gsm8k"),
        ("gsm8k", {"metric": "accuracy"}, {}, "metric='accuracy' is no metric of gsm8k, which has exact_match"),
        ("gsm8k", {"filter": "none"}, {}, "no answer filter of gsm8k, which has strict-match, flexible-extract"),
        (
            "gsm8k",
            {"kind": "likelihood", "mc_samples": 1},
            {},
            "whose requests are generate_until; set kind=generation",
        ),
        ("gsm8k", {"kind": "guess"}, {}, "kind='guess' is none of likelihood, generation"),
        ("gsm8k", {"category": "sport"}, {}, "category='sport' is none of general, math, code"),
        ("gsm8k", {"fewshot": -1}, {}, "task.suite.gsm8k.fewshot=-1 is negative"),
        ("gsm8k", {"gen_length": None}, {}, "gen_length is not set; a generation task needs it"),
        ("gsm8k", {"block_length": 48}, {}, "task.suite.gsm8k: block_length=48 does not divide gen_length=256"),
        ("gsm8k", {}, {"steps": 100}, "task.suite.gsm8k: steps=100 cannot be shared equally by 8 blocks"),
        ("arc_easy", {"mc_samples": 0}, {}, "task.suite.arc_easy.mc_samples=0 must be 1 or more"),
        ("arc_easy", {"mc_samples": None}, {}, "mc_samples is not set; a likelihood task needs it"),
        ("arc_easy", {}, {"limit": 0}, "task.limit=0 leaves no documents"),
        ("arc_easy", {}, {"data_root": "/no/such"}, "data_root=/no/such is no folder"),
        ("wikitext2", {"harness": "wikitext"}, {}, "perplexity tasks cannot be run with a masked diffusion model"),
        ("humaneval", {"harness": "humaneval"}, {}, "without a sandbox; use dqx_humaneval"),
        ("math", {"harness": "minerva_math_algebra"}, {}, "cannot be loaded (AssertionError"),
    ],
)
def test_problem(name: str, changes: dict[str, Any], run: dict[str, Any], message: str) -> None:
    known = "arc_easy" if name == "wikitext2" else name
    suite = {name: spec(known, **changes)}
    found = task_problems(suite, **{"data_root": str(DATA), "sampler": LLaDASampler(), **run})
    assert any(message in problem for problem in found), found


def test_problems_come_all_at_once() -> None:
    suite = {"gsm8k": spec("gsm8k", fewshot=-1, block_length=48), "mmlu": spec("mmlu", mc_samples=0)}
    assert len(task_problems(suite, sampler=LLaDASampler(), limit=-1)) == 4
    assert task_problems({}) == ["task.suite is empty; choose tasks, for example task=nano"]


def test_problems_of_local_data(tmp_path: Path) -> None:
    def problems(name: str) -> list[str]:
        return task_problems({name: spec(name)}, data_root=str(tmp_path), limit=1)

    (missing,) = problems("gsm8k")
    assert missing.startswith(
        f"task gsm8k: {tmp_path}/openai/gsm8k does not exist; copy the dataset there (hf download"
    )
    copy = tmp_path / "openai" / "gsm8k"
    shutil.copytree(DATA / "openai" / "gsm8k", copy)
    assert problems("gsm8k") == []
    file = copy / "main" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    (damaged,) = problems("gsm8k")
    assert f"{file} is no readable Parquet file" in damaged
    shutil.copytree(DATA / "allenai" / "ai2_arc", tmp_path / "allenai" / "ai2_arc")
    readme = tmp_path / "allenai" / "ai2_arc" / "README.md"
    readme.write_text(readme.read_text().replace("ARC-Easy", "ARC-Simple", 1))
    (unnamed,) = problems("arc_easy")
    assert "cannot be used for configuration 'ARC-Easy'" in unnamed
    assert "ARC-Simple" in unnamed


def test_another_copy_of_the_data_is_read_anew(tmp_path: Path) -> None:
    leaf = leaves("gsm8k")[0]
    copy = tmp_path / "openai" / "gsm8k"
    shutil.copytree(DATA / "openai" / "gsm8k", copy)
    file = copy / "main" / "test-00000-of-00001.parquet"
    rows = pyarrow.parquet.read_table(file)
    for n in (3, 2, 1):
        pyarrow.parquet.write_table(rows.slice(0, n), file)
        assert len(build(leaf, spec("gsm8k"), data_root=str(tmp_path), steps=None).eval_docs) == n
    assert len(build(leaf, spec("gsm8k"), data_root=str(DATA), steps=None).eval_docs) == 3


def test_evaluate_refuses_a_suite_with_problems(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fewshot=-1 is negative.*\n2\. .*mc_samples=0"):
        evaluate(**parts, suite={"arc_easy": short("arc_easy", fewshot=-1, mc_samples=0)})
