"""`dqx doctor`: every line is made of what a run records, and says what is missing and what to do."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from huggingface_hub import constants

from dqx.common import accelerator
from dqx.common.environment import environment
from dqx.common.files import PACKAGE
from dqx.evaluate.scorers.sandbox_child import landlock
from dqx.study import doctor, surroundings
from dqx.study.doctor import examined, shortened, unmet

DATA = Path(__file__).parents[1] / "data"
SCHEMA = json.loads((PACKAGE / "record" / "environment.schema.json").read_text())
TOPICS = ["versions", "devices", "memory", "bfloat16", "determinism", "sandbox", "hub cache", "W&B", "Slurm"]


def recorded() -> dict[str, Any]:
    return environment("cpu") | surroundings.surroundings()


def line(topic: str, **changes: Any) -> str:
    """A topic's line where facts are changed; `hub={"offline": True}` changes one of several."""
    facts = recorded()
    for name, value in changes.items():
        facts[name] = facts[name] | value if isinstance(value, dict) else value
    return next(str(found) for found in examined(facts, "~/hub") if found.topic == topic)


def test_the_facts_fit_the_schema_of_the_record() -> None:
    """All of today's are there; records of earlier versions, which lack some, are valid too."""
    checker = jsonschema.Draft202012Validator(SCHEMA)
    checker.check_schema(SCHEMA)
    facts = recorded()
    checker.validate(facts)
    assert set(facts) == set(SCHEMA["properties"]) - {"fused"}  # which a run knows when it is done
    old = sorted(DATA.glob("records/schema*/environment.json"))
    assert len(old) >= 4
    for path in old:
        checker.validate(json.loads(path.read_text()))
    for name in SCHEMA["required"]:
        assert not checker.is_valid({key: value for key, value in facts.items() if key != name})


def test_the_record_names_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    facts = recorded()
    assert facts["hub"]["writable"]
    assert str(tmp_path) not in json.dumps(facts)
    assert shortened(surroundings.hub_cache()) == str(tmp_path / "not" / "there")
    assert shortened(Path.home() / ".cache") == "~/.cache"


def test_it_prints_a_line_for_each_topic(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text[2:16].rstrip() for text in lines] == TOPICS
    assert f"torch {metadata.version('torch')}" in lines[0]


def test_the_pages_show_what_it_prints() -> None:
    """Figures and versions apart, word for word, on a machine with what the page's has."""
    kept = recorded() | {
        "accelerators": [],
        "cores": 2,
        "capability": "AVX512",
        "bf16": "native",
        "sandbox": {"layers": ["limits", "network", "user", "files", "calls"], "landlock": 7},
        "hub": {"offline": False, "writable": True, "free": 81e9},
        "wandb": {"login": False, "mode": "offline"},
        "slurm": {"job": False, "sbatch": False, "submitit": True},
    }
    kept["determinism"] |= {"threads": 1}
    now = [re.sub(r"\d+(\.\d+)*(\+\w+)?", "N", str(line)) for line in examined(kept, "~/.cache/huggingface/hub")]
    for page in ("dqx/study/README.md", "README.md"):
        shown = re.findall(r"^[ !-] (?:devices|memory|W&B|versions|bfloat16|determinism|sandbox|hub|Slurm) .*$",
                           (PACKAGE.parent / page).read_text(), re.M)  # fmt: skip
        assert len(shown) == (9 if "study" in page else 3)
        assert {re.sub(r"\d+(\.\d+)*(\+\w+)?", "N", text) for text in shown} <= set(now)


GPU = {"device": "H", "accelerators": ["H", "H"], "capability": "sm_75", "cuda": "12.8", "cores": 8}
CUDA = {"cudnn_benchmark": False, "cublas_workspace": None}


@pytest.mark.parametrize(
    ("topic", "changes", "said"),
    [
        ("devices", GPU | {"memory": {"device": 80 * 10**9}}, r"  devices +2 x H, 80 GB of memory, sm_75, CUDA"),
        ("bfloat16", GPU | {"bf16": "emulated"}, "- bfloat16 +the H emulates it, slowly; model.dtype=float32"),
        ("bfloat16", {"bf16": None}, "  bfloat16 +the CPU does not say"),
        ("determinism", {"determinism": CUDA}, "- .*; export CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        ("determinism", {"determinism": {"float32_matmul_precision": "high"}}, "- .*precision high, .*all digits"),
        ("determinism", {"determinism": CUDA | {"cublas_workspace": ":4096:8"}}, "  determinism [^;]*$"),
        ("sandbox", {"sandbox": {"layers": ["limits", "user", "calls", "network"]}}, "- sandbox .*Landlock"),
        ("sandbox", {"sandbox": {"layers": []}}, "- sandbox +cannot be set up here; "),
        ("hub cache", {"hub": {"offline": True}}, r"- hub cache +~/hub, .*offline \(HF_HUB_OFFLINE\); what is not"),
        ("hub cache", {"hub": {"offline": False, "writable": False}}, "- .*read-only; set HF_HOME"),
        ("hub cache", {"hub": {"offline": False, "writable": True, "free": 10**9}}, "- .*1.0 GB free; LLaDA-8B takes"),
        ("W&B", {"wandb": {"login": True, "mode": "online"}}, "  W&B +a login, copies of runs are online$"),
        ("W&B", {"wandb": {"login": False, "mode": "online"}}, "- .*WANDB_MODE=online needs `wandb login`"),
        ("Slurm", {"slurm": {"job": True}}, "  Slurm +inside a job"),
        ("Slurm", {"slurm": {"job": False, "sbatch": True, "submitit": False}}, "- .*pip install"),
    ],
)  # fmt: skip
def test_what_a_line_says(topic: str, changes: dict[str, Any], said: str) -> None:
    assert re.match(said, line(topic, **changes)), line(topic, **changes)


def test_a_version_that_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(unmet()) == []
    installed = metadata.version

    def version(name: str) -> str:
        if name == "tqdm":
            raise metadata.PackageNotFoundError
        return "1.0" if name == "torch" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    assert [re.split("[<> ]", text)[0] for text in unmet()] == ["torch", "tqdm"]
    assert doctor.main([]) == 1
    assert re.match(r"! versions .*; dqx needs torch.* \(here 1.0\), tqdm", capsys.readouterr().out)


def test_how_a_cpu_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for there, said in (
        ({"avx512_bf16": False, "amx_bf16": True}, "native"),
        ({"bf16": False}, "emulated"),
        ({}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: there, raising=False)
        assert accelerator.bf16(cpu) == said


def test_landlock_is_asked_and_not_entered() -> None:
    assert landlock() == landlock() >= 0
    assert Path(__file__).read_text()  # this process may read on
