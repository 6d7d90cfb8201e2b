"""How large the benchmarks are, for estimates made without their data.

Documents and answers are those of the evaluated split, prompts those that lm-eval builds. Their tokens are counted
(`count_sizes.py`) with the bundled tokenizer for the bundled tasks, for others with a rule of thumb instead of a
model's own: words of up to seven letters, single digits, marks and line breaks count one each. Expect some 20 %
between the two. MATH is a guess from similar texts. A chat template adds about 20 tokens to a prompt.
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
    "winogrande": BenchmarkSize(1267, question=17, example=24, answers={
        1: (68, 68), 2: (12, 12), 3: (370, 370), 4: (466, 466), 5: (364, 364), 6: (342, 342), 7: (276, 276),
        8: (212, 212), 9: (164, 164), 10: (100, 100), 11: (84, 84), 12: (28, 28), 13: (4, 4), 14: (18, 18),
        15: (8, 8), 16: (6, 6), 19: (12, 12)
    }),
    "piqa": BenchmarkSize(1838, question=14, example=38, answers={
        1: (3, 2), 2: (25, 19), 3: (92, 68), 4: (110, 86), 5: (158, 120), 6: (200, 152), 7: (207, 156), 8: (177, 133),
        9: (162, 123), 10: (168, 121), 11: (126, 102), 12: (136, 103), 13: (133, 102), 14: (119, 91), 15: (89, 71),
        16: (83, 66), 20: (576, 459), 28: (368, 295), 39: (374, 294), 56: (165, 130), 76: (146, 116), 109: (43, 36),
        155: (12, 11), 216: (4, 4)
    }),
    "arc_easy": BenchmarkSize(2376, question=31, example=37, answers={
        1: (1254, 553), 2: (2052, 899), 3: (1167, 629), 4: (825, 502), 5: (729, 459), 6: (608, 418), 7: (631, 421),
        8: (588, 381), 9: (462, 329), 10: (355, 253), 11: (282, 198), 12: (191, 146), 13: (132, 95), 14: (81, 61),
        15: (34, 23), 16: (32, 24), 19: (72, 57), 28: (6, 6)
    }),
    "arc_challenge": BenchmarkSize(1172, question=35, example=42, answers={
        1: (349, 139), 2: (543, 249), 3: (413, 222), 4: (344, 214), 5: (403, 255), 6: (374, 252), 7: (470, 305),
        8: (386, 274), 9: (359, 248), 10: (307, 220), 11: (223, 155), 12: (173, 123), 13: (114, 81), 14: (74, 57),
        15: (51, 38), 16: (26, 22), 19: (57, 43), 27: (15, 9), 36: (6, 4)
    }),
    "hellaswag": BenchmarkSize(10042, question=52, example=86, answers={
        2: (2, 2), 3: (8, 8), 4: (27, 26), 5: (279, 259), 6: (500, 438), 7: (789, 666), 8: (942, 786), 9: (951, 831),
        10: (1042, 904), 11: (1027, 904), 12: (921, 828), 13: (822, 754), 14: (755, 695), 15: (668, 611),
        16: (628, 577), 21: (4451, 4229), 29: (6949, 6618), 40: (14280, 13571), 54: (4637, 4520), 69: (490, 485)
    }),
    "mmlu": BenchmarkSize(14042, question=138, example=110, answers={1: (56168, 14042)}),
    "gsm8k": BenchmarkSize(1319, question=65, example=196, answers={
        42: (9, 9), 59: (90, 90), 81: (306, 306), 112: (317, 317), 156: (426, 426), 216: (130, 130), 289: (39, 39),
        439: (2, 2)
    }),
    "dqx_math": BenchmarkSize(5000, question=90, example=250, answers={
        60: (1000, 1000), 120: (1500, 1500), 200: (1500, 1500), 350: (1000, 1000)
    }),
    "dqx_humaneval": BenchmarkSize(164, question=151, answers={
        6: (1, 1), 7: (2, 2), 8: (1, 1), 9: (1, 1), 10: (2, 2), 12: (1, 1), 13: (1, 1), 14: (5, 5), 15: (2, 2),
        20: (12, 12), 29: (18, 18), 40: (27, 27), 55: (27, 27), 79: (34, 34), 113: (18, 18), 150: (10, 10),
        194: (1, 1), 271: (1, 1)
    }),
    "dqx_mbpp": BenchmarkSize(500, question=153, example=196, answers={
        13: (1, 1), 16: (1, 1), 21: (27, 27), 29: (56, 56), 39: (130, 130), 56: (102, 102), 77: (95, 95),
        110: (43, 43), 156: (30, 30), 224: (12, 12), 311: (3, 3)
    }),
    "nano_facts": BenchmarkSize(192, question=12, example=15, answers={1: (380, 95), 2: (388, 97)}),
    "nano_sums": BenchmarkSize(128, question=20, example=24, answers={16: (128, 128)}),
    "nano_code": BenchmarkSize(128, question=27, example=55, answers={21: (41, 41), 29: (53, 53), 35: (34, 34)}),
}
# fmt: on

#: Tokens of texts, by `TaskSpec.text`.
TEXT_TOKENS = {"Salesforce/wikitext": 290_000, "nano": 52_817}
