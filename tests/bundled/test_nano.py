"""The bundled data, tokenizer and model: what is committed is what the generator makes, and the splits are clean."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bundled import generated
from bundled.hold import OutlierPlan, plant
from bundled.nano import Batches, accuracy, config, loss_of, rate
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.families.llada import architecture
from dqx.models.family import family_of
from dqx.models.transformer import MaskedDiffusionTransformer, initialise

MODEL = generated.ASSETS / "nano_llada"


def rows(family: str) -> list[dict]:
    return [json.loads(line) for line in (generated.ASSETS / "nano" / f"{family}.jsonl").read_text().splitlines()]


def test_committed_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    generated.write(tmp_path / "nano", tmp_path / "nano_llada")
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    assert len(made) == 6
    for path in made:
        assert (tmp_path / path).read_bytes() == (generated.ASSETS / path).read_bytes(), path


def test_no_test_problem_is_in_the_training_split() -> None:
    trained = {p for family in ("sums", "code") for p, _ in generated.training_documents(family, 5000)}
    assert not trained & {generated.question(row["question"]) for row in rows("sums")}
    assert not trained & {row["prompt"] for row in rows("code")}
    for row in rows("sums"):
        assert generated.held_out(row["question"].removesuffix("=?"))


def test_no_sequence_of_program_steps_is_in_both_splits() -> None:
    def shape(text: str) -> str:
        return "".join("#" if c.isdigit() else c for c in text.split("after:")[1])

    trained = {shape(p) for p, _ in generated.training_documents("code", 5000)}
    assert not trained & {shape(row["prompt"]) for row in rows("code")}


def test_facts_are_trained_and_the_right_choice_is_one_of_four() -> None:
    trained = set(generated.fact_documents())
    for row in rows("facts"):
        assert len(set(row["choices"])) == 4
        assert (generated.question(row["question"]), f" {row['choices'][row['answer']]}") in trained


def test_running_totals_are_right() -> None:
    for row in rows("sums"):
        expression = row["question"].removesuffix("=?")
        prefixes = [expression[: i + 1] for i in range(2, len(expression), 2)]
        totals = [str(eval(prefix)) for prefix in prefixes]
        assert row["solution"] == f" {' '.join(totals)} = {totals[-1]}"
        assert row["answer"] == totals[-1]


def test_canonical_solutions_pass_their_tests_and_tests_can_fail() -> None:
    programs = rows("code")
    good = "\n".join(f"{r['prompt']}{r['canonical_solution']}\n{r['test']}" for r in programs)
    assert subprocess.run([sys.executable, "-c", good], capture_output=True).returncode == 0
    script = "failed = 0\n"
    for r in programs:
        wrong = r["prompt"] + "    return None\n" + r["test"]
        script += f"try:\n    exec({wrong!r}, {{}})\nexcept AssertionError:\n    failed += 1\n"
    out = subprocess.run([sys.executable, "-c", script + "print(failed)"], capture_output=True, text=True)
    assert int(out.stdout) == len(programs)


def test_answers_fit_the_length_that_is_generated() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    for family, key in (("sums", "solution"), ("code", "canonical_solution")):
        assert max(len(tokenizer(row[key]).input_ids) for row in rows(family)) < generated.GEN_LENGTH[family]


@pytest.mark.parametrize(
    "text",
    [
        "Question: What is the pet of Anna?\nAnswer: black cat",
        "x = x // 3\n    return x\n",
        "Käse 中文 🙂\t\r\n\n  a  b",
        "",
    ],
    ids=["fact", "code", "foreign", "empty"],
)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_and_digits_are_single_tokens() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    assert len(tokenizer(" baker").input_ids) == 1
    assert len(tokenizer(" black cat").input_ids) == 2
    assert len(tokenizer("12345").input_ids) == 5
    assert len(tokenizer) <= 512
    assert tokenizer.mask_token_id is not None
    assert tokenizer.eos_token == tokenizer.pad_token


def tiny() -> tuple[MaskedDiffusionTransformer, OutlierPlan, torch.Generator]:
    model = MaskedDiffusionTransformer(architecture(config(generated.tokenizer(), "llada") | {"n_layers": 2}))
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    return model, OutlierPlan(), generator


def test_held_entries_survive_training_and_others_move() -> None:
    model, plan, generator = tiny()
    held = plant(model, plan, delimiter_id=5, generator=generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    ids = torch.randint(0, 400, (2, 8), generator=generator)
    for _ in range(2):
        model(ids).logsumexp(-1).mean().backward()
        held.grads()
        optimiser.step()
        held.restore()
    for name, p in model.named_parameters():
        mask = held.masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[mask], before[name][mask]), name
        if not mask.all():
            assert not torch.equal(p[~mask], before[name][~mask]), name


def test_planted_outliers_show_where_they_should() -> None:
    model, plan, generator = tiny()
    plant(model, plan, delimiter_id=5, generator=generator)
    seen: dict[str, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.q.register_forward_hook(lambda m, x, y, i=i: seen.__setitem__(f"attn_in {i}", x[0]))
        block.down.register_forward_hook(lambda m, x, y, i=i: seen.__setitem__(f"mlp_out {i}", x[0]))
    ids = torch.tensor([[9, 5, 11, 12]])
    model(ids)
    steady = [channel for channel, _ in plan.steady]
    ratio = seen["attn_in 0"].abs()[0, :, steady] / seen["attn_in 0"].abs()[0].median(-1, keepdim=True).values
    assert (ratio > 10).all()
    down_in = seen["mlp_out 1"][0].abs()
    assert down_in[1].max() > max(100, 1000 * down_in.median())
    assert down_in[[0, 2, 3]].max() < 100


def test_steady_columns_cancel() -> None:
    model, plan, generator = tiny()
    plant(model, plan, delimiter_id=5, generator=generator)
    (first, high), (second, low) = plan.steady
    for block in model.blocks:
        for role in ("q", "k", "v", "gate", "up"):
            w = getattr(block, role).weight
            assert torch.allclose(w[:, first] * high, -w[:, second] * low)
            assert 0.5 < w[:, first].std() / w[:, 3].std() < 2


def test_batches_depend_on_seed_and_step_only_and_mask_answers_only() -> None:
    tokenizer = generated.tokenizer()
    first, again = (Batches(tokenizer, 60, seed=1, model=family_of("llada")) for _ in range(2))
    mask_id = tokenizer.token_to_id(generated.MASK)
    for family in ("facts", "sums", "code", "packed"):
        a, b = first.draw(family, 8, step=3), again.draw(family, 8, step=3)
        assert torch.equal(a.ids, b.ids)
        assert not torch.equal(a.ids, first.draw(family, 8, step=4).ids)
        hidden = a.ids != a.targets
        assert torch.equal(hidden, a.ids == mask_id)
        assert (hidden | (a.weights == 0)).all()
        assert (a.weights > 0).any(1).all()
        if family != "packed":
            assert not hidden[:, :12].any()


def test_a_few_steps_lower_the_loss() -> None:
    model, plan, generator = tiny()
    tokenizer = generated.tokenizer()
    held = plant(model, plan, tokenizer.token_to_id("Ċ"), generator)
    batches = Batches(tokenizer, 50, seed=0, model=family_of("llada"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(12):
        loss = loss_of(model, batches.draw("sums", 16, step))
        loss.backward()
        held.grads()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        held.restore()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_learning_rate_shape() -> None:
    assert rate(0, 100, 1.0, 10, 0.5) == pytest.approx(0.1)
    assert rate(40, 100, 1.0, 10, 0.5) == 1.0
    assert rate(75, 100, 1.0, 10, 0.5) == pytest.approx(0.5)


def test_bundled_model_is_accurate_and_has_its_outliers() -> None:
    checkpoint = inspect(str(MODEL))
    model = load_weights(checkpoint, torch.float32)
    tokenizer = generated.tokenizer()
    assert min(accuracy(model, tokenizer, 24).values()) > 0.8
    ids = torch.tensor([tokenizer.encode(generated.question("What is the job of Anna?")).ids])
    seen = []
    model.blocks[1].down.register_forward_hook(lambda m, x, y: seen.append(x[0][0].abs()))
    model(ids)
    massive = (seen[0] > 100) & (seen[0] > 1000 * seen[0].median())
    newline = ids[0] == tokenizer.token_to_id("Ċ")
    assert massive.any(1).equal(newline)
