"""The bundled data: three small task families that mirror the study's categories, all a pure function of the seed.

- facts (general): 96 invented people with four attributes each; multiple choice, memorised.
- sums (math): a chain of six additions and subtractions of single digits, the running totals (0 to 9) written
  out one by one; the test problems never occur in training.
- code: a Python function from a specification of two or three steps; the sequences of step kinds in the
  test set never occur in training.

`PYTHONPATH=tests python -m bundled.generated` writes the evaluation files, the calibration text and the tokenizer under
`dqx/assets`.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dqx.common.files import ASSETS

SEED = 0
EOS, MASK, EOT = "<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>"
GEN_LENGTH = {"sums": 16, "code": 40}
HELD_OUT = 8  # one problem (sums) or step sequence (code) of this many is for testing only

PEOPLE = """Anna Bella Clara Diana Elena Freya Greta Hanna Irina Julia Karla Laura Maria Nadia Olga Paula Rita Sofia
Tanja Ursula Vera Wanda Xenia Yara Zelda Alma Berta Carmen Dora Edith Flora Gilda Heidi Isolde Judith Katja Lydia
Marta Norma Odette Petra Ramona Sabine Thea Ulla Viola Wilma Zoe Adam Boris Carl David Emil Felix Georg Hugo Ivan
Jakob Karl Leo Martin Noah Oskar Peter Quentin Robert Simon Thomas Ulrich Viktor Walter Xaver Yuri Zeno Anton Bruno
Conrad Dieter Erik Franz Gustav Henry Igor Jonas Konrad Lukas Marco Nils Otto Paul Rafael Stefan Tobias Uwe
Vincent Willi""".split()  # noqa: SIM905
JOBS = """baker farmer doctor lawyer pilot painter singer writer teacher plumber sailor judge nurse dancer miner
tailor butcher barber cook soldier""".split()  # noqa: SIM905
CITIES = """Paris London Berlin Madrid Rome Vienna Oslo Dublin Athens Warsaw Prague Lisbon Tokyo Cairo Lima Boston
Delhi Sydney Moscow Havana""".split()  # noqa: SIM905
COLOURS = ["black", "white", "brown", "grey", "red", "blue", "green", "yellow"]
PETS = ["cat", "dog", "rabbit", "parrot", "horse", "turtle", "hamster", "goat"]
CARS = ["truck", "van", "taxi", "bus", "jeep", "wagon", "tractor", "scooter"]
ATTRIBUTES: dict[str, list[str]] = {
    "job": JOBS,
    "city": CITIES,
    "pet": [f"{c} {p}" for c in COLOURS for p in PETS],
    "car": [f"{c} {p}" for c in COLOURS for p in CARS],
}
PHRASINGS = ("What is the {attribute} of {person}?", "Tell me the {attribute} of {person}.")


@dataclass(frozen=True)
class Fact:
    """A question, its four choices and the index of the right one."""

    question: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Sum:
    """A chain of operations, the final total, and the full answer text."""

    question: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Program:
    """A HumanEval-like problem; `test` holds assert statements that call `entry_point`."""

    prompt: str
    test: str
    entry_point: str
    canonical_solution: str


def question(text: str) -> str:
    """The prompt of a question; the answer follows after one space."""
    return f"Question: {text}\nAnswer:"


# facts


def fact_table(seed: int = SEED) -> dict[tuple[str, str], str]:
    """Value by (person, attribute): 384 facts."""
    rng = random.Random(f"facts/{seed}")
    return {(person, name): rng.choice(values) for person in PEOPLE for name, values in ATTRIBUTES.items()}


def fact_documents(seed: int = SEED) -> list[tuple[str, str]]:
    """(prompt, answer) of every fact in every phrasing."""
    return [
        (question(text.format(attribute=attribute, person=person)), f" {value}")
        for (person, attribute), value in fact_table(seed).items()
        for text in PHRASINGS
    ]


def fact_tests(n: int, seed: int = SEED) -> list[Fact]:
    """`n` facts with three wrong values of the same attribute each."""
    rng = random.Random(f"fact tests/{seed}")
    facts = []
    for (person, attribute), value in rng.sample(sorted(fact_table(seed).items()), n):
        choices = [value, *rng.sample([v for v in ATTRIBUTES[attribute] if v != value], 3)]
        rng.shuffle(choices)
        facts.append(Fact(PHRASINGS[0].format(attribute=attribute, person=person), choices, choices.index(value)))
    return facts


# sums

LARGEST_TOTAL = 9
N_OPERATIONS = 6


def held_out(key: str) -> bool:
    """True where a problem belongs to the test set."""
    return zlib.crc32(key.encode()) % HELD_OUT == 0


def sums(seed: int, test: bool) -> Iterator[Sum]:
    """Endless problems of the training or of the test split."""
    rng = random.Random(f"sums/{seed}/{test}")
    while True:
        total = rng.randint(0, LARGEST_TOTAL)
        text, totals = str(total), []
        for _ in range(N_OPERATIONS):
            digit = rng.choice([d for d in range(1, 10) if total + d <= LARGEST_TOTAL or total >= d])
            sign = rng.choice([s for s in (1, -1) if 0 <= total + s * digit <= LARGEST_TOTAL])
            total += sign * digit
            text += f"{'+' if sign > 0 else '-'}{digit}"
            totals.append(str(total))
        if held_out(text) == test:
            yield Sum(f"{text}=?", totals[-1], f" {' '.join(totals)} = {totals[-1]}")


# code


@dataclass(frozen=True)
class Step:
    """One kind of step: its words, its line of code, and the constants `{n}` may take."""

    words: str
    code: str
    constants: range = range(1)


INT_STEPS = {
    "add": Step("add {n}", "x = x + {n}", range(1, 10)),
    "subtract": Step("subtract {n}", "x = x - {n}", range(1, 10)),
    "multiply": Step("multiply by {n}", "x = x * {n}", range(2, 10)),
    "divide": Step("divide by {n}", "x = x // {n}", range(2, 10)),
    "remainder": Step("take the remainder by {n}", "x = x % {n}", range(2, 10)),
    "negate": Step("negate", "x = -x"),
    "square": Step("square", "x = x * x"),
    "absolute": Step("make positive", "x = abs(x)"),
    "at least": Step("raise to at least {n}", "x = max(x, {n})", range(1, 10)),
    "at most": Step("lower to at most {n}", "x = min(x, {n})", range(1, 10)),
}
LIST_STEPS = {
    "add each": Step("add {n} to each", "xs = [v + {n} for v in xs]", range(1, 10)),
    "multiply each": Step("multiply each by {n}", "xs = [v * {n} for v in xs]", range(2, 10)),
    "above": Step("keep those above {n}", "xs = [v for v in xs if v > {n}]", range(0, 7)),
    "below": Step("keep those below {n}", "xs = [v for v in xs if v < {n}]", range(3, 10)),
    "sort": Step("sort", "xs = sorted(xs)"),
    "reverse": Step("reverse", "xs = xs[::-1]"),
    "drop first": Step("drop the first", "xs = xs[1:]"),
    "drop last": Step("drop the last", "xs = xs[:-1]"),
    "take": Step("take the first {n}", "xs = xs[:{n}]", range(2, 5)),
    "repeat": Step("repeat twice", "xs = xs + xs"),
}
LAST_STEPS = {  # only at the end of a list program
    "sum": Step("sum up", "xs = sum(xs)"),
    "count": Step("count", "xs = len(xs)"),
    "largest": Step("find the largest", "xs = max(xs)"),
    "smallest": Step("find the smallest", "xs = min(xs)"),
}
FUNCTIONS = ["solve", "compute", "convert", "change", "process", "update", "handle", "apply"]
INT_INPUTS: list[int] = [-13, -4, 0, 3, 7, 12, 28]
LIST_INPUTS: list[list[int]] = [[3, 1, 2, 5], [-4, 8, 0, 7, 7], [9, -2, 6, 1, 4, 3], [5, 5, 2, 8, -1]]


def programs(seed: int, test: bool) -> Iterator[Program]:
    """Endless problems of the training or of the test split (the split is by the sequence of step kinds)."""
    rng = random.Random(f"code/{seed}/{test}")
    while True:
        on_list = rng.random() < 0.5
        steps = LIST_STEPS if on_list else INT_STEPS
        kinds = rng.sample(sorted(steps), rng.choice((2, 3, 3)))
        if on_list and rng.random() < 0.4:
            kinds[-1] = rng.choice(sorted(LAST_STEPS))
            if kinds[-1] in ("largest", "smallest") and {"above", "below"} & set(kinds):
                continue  # nothing may be left
        if held_out("list" * on_list + "|".join(kinds)) != test:
            continue
        chosen = [(LAST_STEPS | steps)[kind] for kind in kinds]
        constants = [rng.choice(step.constants) for step in chosen]
        words = [step.words.format(n=n) for step, n in zip(chosen, constants, strict=True)]
        order = ("first", "then", "last") if len(words) == 3 else ("first", "last")
        name, argument = rng.choice(FUNCTIONS), "xs" if on_list else "x"
        spec = ", ".join(f"{o} {w}" for o, w in zip(order, words, strict=True))
        lines = [step.code.format(n=n) for step, n in zip(chosen, constants, strict=True)]
        solution = "".join(f"    {line}\n" for line in [*lines, f"return {argument}"])
        if 2 + 13 * len(lines) > 40 and sum(" for " in line for line in lines) > 1:
            continue  # longer than the answer may be
        prompt = f'def {name}({argument}):\n    """Return {argument} after: {spec}."""\n'
        yield Program(prompt, tests_of(prompt + solution, name, on_list), name, solution)


def tests_of(source: str, name: str, on_list: bool) -> str:
    """Assert statements with what `source` (our own reference program) gives on the fixed inputs."""
    scope: dict[str, object] = {}
    exec(source, scope)
    function = scope[name]
    assert callable(function)
    inputs = LIST_INPUTS if on_list else INT_INPUTS
    return "".join(f"assert {name}({value!r}) == {function(value)!r}\n" for value in inputs)


# text


def training_documents(family: str, n: int, seed: int = SEED) -> list[tuple[str, str]]:
    """The first `n` (prompt, answer) pairs of a family's training split."""
    if family == "facts":
        return fact_documents(seed)[:n]
    if family == "sums":
        return [(question(s.question), s.solution) for s, _ in zip(sums(seed, test=False), range(n), strict=False)]
    return [(p.prompt, p.canonical_solution) for p, _ in zip(programs(seed, test=False), range(n), strict=False)]


def corpus(n: int, seed: int = SEED) -> str:
    """`n` documents of the training split, a third per family, shuffled, with blank lines between: to calibrate on."""
    rng = random.Random(f"corpus/{seed}")
    families = [training_documents(family, 3000, seed + 1) for family in ("sums", "code")]
    families.append(fact_documents(seed))
    texts = [p + a for documents in families for p, a in rng.sample(documents, n // 3)]
    rng.shuffle(texts)
    return "\n\n".join(text.rstrip("\n") for text in texts) + "\n"


def tokenizer(seed: int = SEED) -> Tokenizer:
    """Byte-level tokenizer: every word of the data (with its space) and every single digit is one token.

    Words that are not in the data fall into bytes, so any text survives the round trip.
    """
    pattern = r"\n| {4}| ?[A-Za-z_]+|\d| ?[^\sA-Za-z_\d]+|\s"
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    documents = [p + a for family in ("facts", "sums", "code") for p, a in training_documents(family, 3000, seed)]
    words = {word for text in documents for word, _ in pre.pre_tokenize_str(text)}
    lexicon = [f" {value}" for values in (*ATTRIBUTES.values(), PEOPLE) for value in values]
    words |= {word for text in lexicon for word, _ in pre.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [EOS, MASK, EOT, *alphabet, *sorted(words - set(alphabet))]
    model = models.BPE({word: i for i, word in enumerate(vocabulary)}, [], ignore_merges=True)
    result = Tokenizer(model)
    result.pre_tokenizer = pre
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([EOS, MASK, EOT])
    return result


def write(data_folder: Path, model_folder: Path, seed: int = SEED) -> None:
    """Write the evaluation files and the corpus to `data_folder`, the tokenizer to `model_folder`."""
    data_folder.mkdir(parents=True, exist_ok=True)
    families: dict[str, Sequence[Fact | Sum | Program]] = {
        "facts": fact_tests(192, seed),
        "sums": list(islice(sums(seed, test=True), 128)),
        "code": list(islice(programs(seed, test=True), 128)),
    }
    for name, rows in families.items():
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        (data_folder / f"{name}.jsonl").write_text(text)
    (data_folder / "corpus.txt").write_text(corpus(1500, seed))
    write_tokenizer(model_folder, seed)


def write_tokenizer(folder: Path, seed: int = SEED) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(seed).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "additional_special_tokens": [EOT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets nano/, nano_llada/ and nano_dream/")
    out = parser.parse_args().out
    write(out / "nano", out / "nano_llada")
    write_tokenizer(out / "nano_dream")
