"""How large the benchmarks are, for estimates made without their data.

Documents and choices are those of the evaluated split. Tokens are means over the prompts that lm-eval builds, counted
with a rule of thumb instead of a tokenizer (words of up to seven letters, single digits and marks count one each), so
expect some 20 % between them and a model's own; MATH is a guess from similar texts. A chat template adds about 20.
"""

from __future__ import annotations

from dataclasses import dataclass

from dqx.evaluate.spec import TaskSpec


@dataclass(frozen=True)
class BenchmarkSize:
    """Of one lm-eval task or group."""

    documents: int
    question: int  # tokens of a prompt without examples
    example: int = 0  # tokens that one few-shot example adds
    choices: int = 1  # answers whose likelihood is asked for
    target: int = 0  # tokens of an answer; 0: it is generated

    def prompt(self, spec: TaskSpec) -> int:
        """Tokens of a prompt with the task's examples."""
        return self.question + spec.fewshot * self.example


#: By `TaskSpec.harness`.
SIZES = {
    "winogrande": BenchmarkSize(1267, question=18, example=25, choices=2, target=6),
    "piqa": BenchmarkSize(1838, question=14, example=36, choices=2, target=23),
    "arc_easy": BenchmarkSize(2376, question=29, example=34, choices=4, target=5),
    "arc_challenge": BenchmarkSize(1172, question=33, example=40, choices=4, target=7),
    "hellaswag": BenchmarkSize(10042, question=51, example=83, choices=4, target=32),
    "mmlu": BenchmarkSize(14042, question=120, example=110, choices=4, target=1),
    "gsm8k": BenchmarkSize(1319, question=65, example=195),
    "dqx_math": BenchmarkSize(5000, question=90, example=250),
    "dqx_humaneval": BenchmarkSize(164, question=161),
    "dqx_mbpp": BenchmarkSize(500, question=146, example=199),
    "nano_facts": BenchmarkSize(192, question=12, choices=4, target=2),
    "nano_sums": BenchmarkSize(128, question=20),
    "nano_code": BenchmarkSize(128, question=27),
}

#: Tokens of texts, by `TaskSpec.text`.
TEXT_TOKENS = {"Salesforce/wikitext": 290_000, "nano": 52_817}
