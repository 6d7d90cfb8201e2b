"""How large the benchmarks are, for estimates made without their data.

Documents and answers are those of the evaluated split, prompts those that lm-eval builds. Their tokens are counted
(`tests/bundled/sizes.py`) with the bundled tokenizer for the bundled tasks, for others with a rule of thumb
instead of a model's own: words of up to nine letters, single digits, marks and line breaks count one each.
Vocabularies of 100,000 tokens agree within 5 % on multiple choice; those that pack digits need up to a fifth less for
GSM8K. MATH is a guess from similar texts. A chat template adds about 20 tokens to a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dqx.evaluate.spec import TaskSpec


@dataclass(frozen=True)
class BenchmarkSize:
    """Of one lm-eval task or group.

    `answers` has for each number of tokens how many answers have it, and after how many different prompts: the choices
    whose likelihood is asked for, or, where an answer is generated, those that the data give, with the token that ends
    them. Lengths above 16 stand for similar ones.
    """

    documents: int
    question: int  # mean tokens of a prompt without examples
    example: int = 0  # tokens that one few-shot example adds
    answers: Mapping[int, tuple[int, int]] = field(default_factory=dict, hash=False)

    def prompt(self, spec: TaskSpec) -> int:
        """Tokens of a prompt with the task's examples."""
        return self.question + spec.fewshot * self.example


# fmt: off
#: By `TaskSpec.harness`.
SIZES = {
    "winogrande": BenchmarkSize(1267, question=16, example=23, answers={
        1: (68, 68), 2: (16, 16), 3: (442, 442), 4: (490, 490), 5: (364, 364), 6: (374, 374), 7: (244, 244),
        8: (208, 208), 9: (134, 134), 10: (88, 88), 11: (50, 50), 12: (18, 18), 13: (2, 2), 14: (16, 16), 15: (6, 6),
        16: (4, 4), 18: (10, 10)
    }),
    "piqa": BenchmarkSize(1838, question=13, example=36, answers={
        1: (4, 2), 2: (28, 19), 3: (108, 74), 4: (122, 91), 5: (167, 126), 6: (205, 151), 7: (209, 153), 8: (192, 144),
        9: (167, 123), 10: (143, 105), 11: (155, 116), 12: (139, 105), 13: (112, 88), 14: (107, 82), 15: (81, 64),
        16: (88, 70), 20: (592, 458), 28: (362, 273), 39: (343, 267), 56: (183, 139), 77: (120, 96), 107: (35, 29),
        156: (12, 11), 221: (2, 2)
    }),
    "arc_easy": BenchmarkSize(2376, question=28, example=34, answers={
        1: (1821, 657), 2: (1937, 849), 3: (1136, 591), 4: (756, 456), 5: (710, 432), 6: (651, 424), 7: (666, 426),
        8: (559, 363), 9: (385, 277), 10: (312, 223), 11: (221, 149), 12: (139, 101), 13: (56, 49), 14: (43, 33),
        15: (29, 20), 16: (26, 18), 19: (49, 37), 29: (5, 5)
    }),
    "arc_challenge": BenchmarkSize(1172, question=32, example=38, answers={
        1: (467, 172), 2: (552, 245), 3: (417, 226), 4: (357, 216), 5: (456, 278), 6: (442, 296), 7: (444, 298),
        8: (430, 277), 9: (340, 235), 10: (251, 179), 11: (196, 132), 12: (121, 91), 13: (78, 62), 14: (33, 28),
        15: (34, 23), 16: (13, 12), 19: (41, 31), 27: (9, 5), 35: (6, 4)
    }),
    "hellaswag": BenchmarkSize(10042, question=49, example=81, answers={
        2: (2, 2), 3: (8, 8), 4: (32, 31), 5: (356, 324), 6: (584, 507), 7: (898, 740), 8: (992, 828), 9: (1056, 904),
        10: (1069, 931), 11: (1054, 926), 12: (896, 808), 13: (841, 758), 14: (734, 658), 15: (662, 605),
        16: (605, 558), 21: (4917, 4696), 29: (7934, 7543), 39: (13925, 13236), 54: (3392, 3317), 68: (211, 210)
    }),
    "mmlu": BenchmarkSize(14042, question=125, example=102, answers={1: (56168, 14042)}),
    "gsm8k": BenchmarkSize(1319, question=62, example=191, answers={
        31: (1, 1), 43: (8, 8), 58: (95, 95), 82: (320, 320), 112: (316, 316), 156: (421, 421), 218: (125, 125),
        291: (31, 31), 422: (2, 2)
    }),
    "dqx_math": BenchmarkSize(5000, question=90, example=250, answers={
        60: (1000, 1000), 120: (1500, 1500), 200: (1500, 1500), 350: (1000, 1000)
    }),
    "dqx_humaneval": BenchmarkSize(164, question=146, answers={
        6: (1, 1), 7: (2, 2), 8: (2, 2), 10: (2, 2), 12: (1, 1), 13: (1, 1), 14: (6, 6), 15: (1, 1), 20: (12, 12),
        29: (19, 19), 41: (30, 30), 55: (23, 23), 78: (34, 34), 113: (19, 19), 151: (9, 9), 194: (1, 1), 271: (1, 1)
    }),
    "dqx_mbpp": BenchmarkSize(500, question=150, example=192, answers={
        13: (1, 1), 16: (2, 2), 21: (29, 29), 29: (59, 59), 40: (128, 128), 56: (99, 99), 77: (96, 96), 110: (41, 41),
        155: (30, 30), 222: (12, 12), 308: (3, 3)
    }),
    "nano_facts": BenchmarkSize(192, question=12, example=15, answers={1: (380, 95), 2: (388, 97)}),
    "nano_sums": BenchmarkSize(128, question=20, example=24, answers={16: (128, 128)}),
    "nano_code": BenchmarkSize(128, question=27, example=55, answers={21: (41, 41), 29: (53, 53), 35: (34, 34)}),
}
# fmt: on

#: Tokens of texts, by `TaskSpec.text`.
TEXT_TOKENS = {"Salesforce/wikitext": 290_000, "nano": 52_817}
