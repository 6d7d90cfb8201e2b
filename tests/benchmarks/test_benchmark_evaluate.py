"""The benchmark of evaluation: both paths give the same results, and its figures add up."""

import json
from dataclasses import replace

import pytest
import torch
from bundled.lengths import measure
from bundled.sizes import by_rule
from rich.console import Console

from dqx.benchmarks import evaluate, lengths, paths
from dqx.benchmarks.cases import MODELS
from dqx.benchmarks.evaluate import Figures
from dqx.benchmarks.lengths import TASKS, Lengths, read, spread
from dqx.benchmarks.paths import Comparison, Work
from dqx.common import accelerator
from dqx.config import compose
from dqx.report.terminal import rendered


def model(seed=0):
    return paths.random_model(paths.architecture(32, 2), seed, torch.device("cpu"), torch.float32)


# lengths


def test_tokens_are_counted_by_the_rule():
    assert by_rule("def f(x):\n    return 3.14") == 12  # nine in the first line and its break
    assert by_rule("Photosynthesis is 42.") == 6
    assert by_rule("") == 0


def test_the_lengths_are_of_the_real_tasks():
    suite = compose.suite(TASKS)
    for task in TASKS:
        documents = read(task)
        assert len(documents) == (164 if task == "humaneval" else lengths.SAMPLE)
        assert {len(d.targets) for d in documents} <= ({1} if suite[task].kind == "generation" else {3, 4, 5})
        assert [sum(d.targets) for d in documents] == sorted(sum(d.targets) for d in documents)
        assert all(d.prompt > 0 and min(d.targets) > 0 for d in documents)
    assert all(set(d.targets) == {1} for d in read("mmlu"))


def test_documents_are_spread_evenly():
    documents = [Lengths(1, (i,)) for i in range(12)]
    assert [d.targets[0] for d in spread(documents, 3)] == [2, 6, 10]
    assert spread(documents, 12) == documents


def test_lengths_of_a_task_are_measured_on_its_prompts():
    """On documents that come with dqx."""
    suite = compose.suite(["nano"])
    (facts, sums) = (next(spec for name, spec in suite.items() if kind in name) for kind in ("facts", "sums"))
    choices = measure(facts, ".")
    assert len(choices) == 192  # all of them
    assert {len(d.targets) for d in choices} == {4}
    assert {len(d.targets) for d in measure(sums, ".")} == {1}


# both paths


def test_the_head_has_its_share_of_the_work():
    real = MODELS["llada_8b"]
    assert evaluate.head_share(real) == pytest.approx(0.069, abs=5e-4)
    for scale, blocks in ((8, 4), (16, 4), (32, 2)):
        assert evaluate.head_share(paths.architecture(scale, blocks)) == pytest.approx(0.069, abs=1e-3)
    assert paths.architecture(1, 32) == replace(real, mask_token_id=126462, eos_token_id=126463)


def test_work_is_counted():
    net = model()
    arch, ids = net.arch, torch.zeros(3, 10, dtype=torch.long)
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[:, 8:] = True
    with paths.counted(net) as work:
        net.logits_where(ids, where)
    per_block = 4 * arch.hidden_size**2 + 3 * arch.hidden_size * arch.mlp_size
    assert (work.sequences, work.tokens) == (3, 30)
    whole = 30 * 2 * per_block + 3 * 4 * 10**2 * arch.hidden_size
    outward = 2 * (2 * arch.hidden_size**2 + 3 * arch.hidden_size * arch.mlp_size) + 4 * 10 * arch.hidden_size
    assert work.whole_blocks == len(net.blocks) * whole
    assert work.blocks == work.whole_blocks - 3 * (10 - 2) * outward  # the last one's output, for two columns of ten
    assert work.head * 5 == work.whole_head == 30 * 2 * arch.hidden_size * arch.vocab_size
    assert work.seconds > 0
    net.logits_where(ids, where)
    assert work.sequences == 3


@pytest.mark.parametrize("seed", [0, 1])
def test_answers_are_equal_and_stop_early(seed):
    spec = replace(compose.suite(["gsm8k"])["gsm8k"], gen_length=32, block_length=8, steps=16)
    both = paths.generate(model(seed), spec, [Lengths(20, (5,)), Lengths(31, (17,)), Lengths(12, (32,))], seed)
    assert both.equal == [True, True, True]
    assert both.plain.sequences == 3 * 16
    assert both.plain.head == both.plain.whole_head
    assert 4 + 12 + 16 - 6 <= both.dqx.sequences <= 4 + 12 + 16
    assert both.dqx.head < both.dqx.whole_head


def test_a_wrong_answer_is_seen(monkeypatch):
    spec = replace(compose.suite(["gsm8k"])["gsm8k"], gen_length=8, block_length=8, steps=8)
    generate = paths.Engine.generate
    monkeypatch.setattr(
        paths.Engine, "generate", lambda *args: [replace(a, ids=[0, *a.ids[1:]]) for a in generate(*args)]
    )
    assert paths.generate(model(), spec, [Lengths(9, (4,))], 0).equal == [False]


@pytest.mark.parametrize("seed", [0, 1])
def test_likelihoods_are_equal(seed):
    spec = replace(compose.suite(["arc_easy"])["arc_easy"], mc_samples=16)
    both = paths.score(model(seed), spec, [Lengths(15, (1, 1, 2, 9)), Lengths(12, (3, 1, 3, 4))], seed)
    assert both.error < 1e-5
    assert both.plain.sequences == 8 * 16
    assert both.greedy.sequences == 1 + 1 + 2 + 9 + 3 + 1 + 3 + 4
    assert both.dqx.sequences < both.plain.sequences / 2


# figures


def figures(kind="likelihood"):
    plain = Work(8, 80, 800, 900, 100, 900, 100)
    greedy, dqx = Work(2, 20, 200, 225, 25, 225, 25), Work(2, 30, 300, 320, 10, 400, 50)
    return Figures(
        "task", kind, 2, 0.0, Comparison(plain, greedy if kind == "likelihood" else Work(), dqx, [True], 1e-7)
    )


@pytest.mark.parametrize("kind", ["likelihood", "generation"])
def test_savings_multiply_to_the_ratio(kind):
    row = figures(kind)
    product = 1.0
    for factor in row.savings().values():
        product *= factor
    assert product == pytest.approx(row.ratio)
    if kind == "likelihood":
        assert (row.ratio, row.ratio_without_greedy) == (5, 4)
        assert list(row.savings().values()) == pytest.approx([1.25, 1000 / 450, 450 / 370, 370 / 330, 5 * 330 / 1250])
    else:
        assert row.ratio == row.ratio_without_greedy == 4
    whole = evaluate.together("both", [row, row])
    assert (whole.documents, whole.ratio, whole.dqx.sequences) == (4, row.ratio, 60)
    assert whole.ratio_without_greedy == row.ratio_without_greedy


def test_gsm8k_stops_after_110_tokens_on_average():
    suite = compose.suite(["gsm8k", "humaneval"])
    for count in (3, 6, 16):
        documents = evaluate.chosen("gsm8k", suite["gsm8k"], count)
        assert sum(d.targets[0] for d in documents) / count == pytest.approx(110, abs=1)
    assert evaluate.chosen("humaneval", suite["humaneval"], 164) == read("humaneval")


def test_command_line(capsys, monkeypatch):
    monkeypatch.setattr(accelerator, "kind", lambda: None)
    for wrong, said in (
        (["--tasks", "mmlu,piqa"], "piqa is unknown"),
        (["--scale", "3"], "scale=3"),
        (["--documents", "0"], "--documents=0 must be at least 1"),
        (["--tokens-per-step", "3"], "must divide a block"),
        (["--device", "cuda"], "finds no CUDA device"),
    ):
        with pytest.raises(SystemExit):
            evaluate.arguments(wrong)
        assert said in capsys.readouterr().err


def test_a_quick_run(tmp_path, capsys):
    file = tmp_path / "figures.json"
    evaluate.main(["--quick", "--tasks", "gsm8k,arc_easy,arc_challenge", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["task"] for row in rows] == ["gsm8k", "arc_easy", "arc_challenge"]
    assert rows[0]["settings"]["scale"] == 32
    assert rows[0]["outcome"]["equal"] == [True, True]
    assert max(row["outcome"]["error"] for row in rows[1:]) < 1e-5
    assert all(row["ratio_without_greedy"] < row["ratio"] for row in rows[1:])
    out = capsys.readouterr().out
    assert "2 of 2 equal" in out
    assert "arc, both" in out
    assert "% of peak" in out


def test_table():
    console = Console(width=130, record=True)
    console.print(rendered(evaluate.overview([figures()])))
    lines = [line.split() for line in console.export_text().splitlines()]
    ratios = ["10.00", "2.00", "2.00", "5.00", "4.00"]  # with the greedy pass and without
    assert lines[3] == ["task", "2", *ratios, "100", "30", "1.0k", "0.3k", "within", "1.0e-07"]
    assert lines[4] == ["no", "greedy", "pass", "1.25"]


def test_the_command_for_gpus_runs_in_16_bits(capsys):
    evaluate.main(["--quick", "--tasks", "humaneval,mmlu", "--dtype", "bfloat16", "--peak", "989"])
    out = capsys.readouterr().out
    assert "bfloat16" in out
    assert "989 TFLOP/s, as given" in out
