"""Bad inputs, each answered before a weight is read by a message that says what is wrong and what to write instead.

Three tables: configurations, checkpoints, data. In every row the run is started as launch.py starts it, with a
`load_weights` that fails the test if it is ever reached.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqx.config.compose import build, compose, resolve
from dqx.config.schema import ConfigProblems
from dqx.diffusion.samplers import LLaDASampler
from dqx.study import checks, experiment, subjects
from dqx.study.run import run

DATA = Path(__file__).parents[1] / "data"
WIDE = {"d_model": 128, "mlp_hidden_size": 256}  # widths that the study's group size of 128 divides
Problems = Callable[..., list[str]]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llada", **WIDE)


@pytest.fixture
def problems(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Problems]:
    """What a run on a tiny checkpoint with these overrides says instead of starting; [] where it would start."""
    text = tmp_path / "text.txt"
    text.write_text("Some text to calibrate on. " * 100)

    class WeightsWereRead(Exception):
        pass

    def load_weights(*_: object, **__: object) -> None:
        raise WeightsWereRead

    monkeypatch.setattr(subjects, "load_weights", load_weights)

    def answer(*overrides: str) -> list[str]:
        base = [f"model.path={checkpoint}", f"calib.text={text}", "calib.length=64", "task=nano_sums"]
        base += [f"cache_dir={tmp_path / 'cache'}"]
        keys = {o.split("=")[0].lstrip("+") for o in overrides}
        try:
            run(resolve(compose([*(b for b in base if b.split("=")[0] not in keys), *overrides])), tmp_path / "run")
        except ConfigProblems as error:
            return error.problems
        except WeightsWereRead:
            return []
        raise AssertionError("the run went past the weights without reading them")

    yield answer
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_good_run_starts(problems: Problems) -> None:
    """The run that every row below spoils has nothing wrong with it."""
    assert problems() == []


# ---- configurations ------------------------------------------------------------------------------------------

LENGTHS = ["task.suite.nano_sums.gen_length=64", "task.suite.nano_sums.block_length=32"]
LONG = ["task.suite.nano_sums.gen_length=1024", "task.suite.nano_sums.block_length=1024"]
CONFIGURATIONS = [
    # names
    ("unknown method", ["method=gptx"], "method=gptx is no choice; did you mean gptq"),
    ("unknown model", ["model=llada_8b_bas"], "model=llada_8b_bas is no choice; did you mean llada_8b_base"),
    ("unknown width", ["bits=9"], "bits=w9 is no choice"),
    ("unknown task", ["task=gsm9k"], "task=gsm9k is no choice; did you mean gsm8k"),
    ("unknown task in a list", ["task=gsm8k,hellswag"], "task=hellswag is no choice; did you mean hellaswag"),
    ("unknown masking", ["calib=mcx"], "calib=mcx is no choice; did you mean mcs"),
    ("unknown experiment", ["experiment=quik"], "experiment=quik is no choice; did you mean quick"),
    ("unknown group", ["bitz=3"], "bitz is no setting; did you mean bits"),
    (
        "unknown key",
        ["method.rounding.dampin=0.1"],
        "method.rounding.dampin is no setting; did you mean method.rounding.damping",
    ),
    (
        "another sampler's setting",
        ["model=nano_dream", "model.sampler.threshold=0.9"],
        "model.sampler.threshold is no setting of this sampler; .*model.sampler=llada, .* have it",
    ),
    (
        "forced unknown key",
        ["+model.dtyp=x"],
        "model.dtyp is no setting, so nothing would read it; did you mean model.dtype",
    ),
    ("forced unknown group", ["+foo=1"], "foo is no setting"),
    ("forced unknown option", ["+model.sampler.temprature=1"], "no option of LLaDASampler; did you mean temperature"),
    ("a list of widths", ["bits=[w3,w4]"], "write it without brackets"),
    ("several values for one run", ["seed=1,2"], "seed=1,2 gives several values for one run; add -m"),
    ("no value", ["method"], "method cannot be read; it is not NAME=VALUE"),
    # types
    ("text for a number", ["seed=abc"], "seed=abc is no whole number; write one"),
    ("text for a width", ["bits.weight.bits=four"], "bits.weight.bits=four is no whole number; write one"),
    ("null for a number", ["calib.length=null"], "calib.length: it cannot be null"),
    ("text for an option", ["model.sampler.temperature=hot"], "model.sampler.temperature='hot' is not of type float"),
    ("a number for a part", ["method.rounding=5"], "method.rounding=5 is not of type Rounding or null"),
    (
        "a class that is not there",
        ["method.rounding._target_=dqx.quant.rounding.gptq.GPTX"],
        r"_target_=dqx.quant.rounding.gptq.GPTX cannot be imported",
    ),
    # ranges
    ("negative seed", ["seed=-1"], "seed=-1 must be 0 or more"),
    ("more words than there are", ["verbose=3"], r"verbose=3 must be 0 \(one line per run\), 1 or 2"),
    ("no samples", ["calib.samples=0"], "calib.samples=0 must be 1 or more"),
    ("no documents", ["task.limit=0"], "task.limit=0 leaves no documents"),
    ("no steps", ["steps=0"], "steps.count=0 must be 1 or more"),
    ("no gain", ["model.outliers.gain=0"], "model.outliers.gain=0.0 must be a number above 0"),
    (
        "no such block",
        ["outliers.surfaces=[0,9]"],
        r"outliers.surfaces=\[0, 9\] names blocks that the model has not: 9; it has 0 to 2",
    ),
    ("negative steps", ["outliers.steps=-1"], "outliers.steps=-1 must be 0 or more"),
    (
        "negative temperature",
        ["model.sampler.temperature=-1"],
        r"model.sampler.temperature=-1 is not a number at least 0",
    ),
    ("negative damping", ["method.rounding.damping=-1"], "method.rounding.damping=-1 must lie in 0"),
    ("clip ratio of zero", ["method.activation.clip_ratio=0"], "method.activation.clip_ratio=0 must lie above 0"),
    ("width that does not exist", ["bits.weight.bits=9"], "bits.weight.bits=9 is no width dqx has"),
    ("windows longer than the model", ["calib.length=4096"], "calib.length=4096 is longer than the model's 1024"),
    (
        "no room for a prompt",
        ["calib=trajectory", "calib.gen_length=64"],
        "calib.gen_length=64 leaves no room for a prompt in windows of calib.length=64",
    ),
    (
        "steps that the calibration's blocks do not divide",
        ["calib=trajectory", "calib.block_length=16", "calib.steps=33"],
        r"calib.steps=33 cannot be shared equally by 2 blocks \(gen_length=32, block_length=16\); 32 or 34 can",
    ),
    ("a setting of another masking", ["calib=mcs", "calib.steps=8"], "calib.steps=8 does nothing with calib.masking"),
    (
        "mask outside the vocabulary",
        ["model.mask_token_id=320"],
        "mask_token_id=320 lies outside the vocabulary of 320",
    ),
    (
        "unknown remasking",
        ["model.sampler.remasking=best"],
        "model.sampler.remasking='best' is not one of low_confidence",
    ),
    (
        "unknown meaning of bits",
        ["method.quantizes=all", "bits=4"],
        "method.quantizes=all is unknown; it is one of weights",
    ),
    ("empty path", ["model.path="], "model.path is empty"),
    ("unknown dtype", ["model.dtype=float31"], "model.dtype=float31 is unknown; did you mean float32"),
    ("unknown device", ["model.device=gpu"], "model.device=gpu is no device; write auto, cpu, cuda"),
    ("unknown W&B mode", ["wandb.mode=onlin"], "wandb.mode=onlin is unknown; did you mean online"),
    (
        "unknown metric",
        ["task.suite.nano_sums.metric=acc"],
        "task.suite.nano_sums.metric='acc' is no metric of nano_sums",
    ),
    (
        "a W&B team in the project",
        ["wandb.project=team/proj"],
        "wandb.project=team/proj names a team and a project; write wandb.entity=team wandb.project=proj",
    ),
    ("a W&B project's name", ["wandb.project=a#b/"], "wandb.project=a#b/ has a /, .*; write for example a-b-"),
    ("no W&B project", ["wandb.project="], "wandb.project has 0 characters; W&B takes 1 to 128"),
    ("a long W&B tag", [f"wandb.tags=[ok,{'x' * 65}]"], "wandb.tags: 'x*' has 65 characters; W&B takes 1 to 64"),
    (
        "an answer longer than the model",
        [*LONG, "steps=default"],
        "gen_length=1024 leaves no room for a prompt in .* 1024",
    ),
    (
        "a section as a switch",
        ["wandb=false"],
        "wandb=false: wandb stands for several settings; .*wandb.mode=disabled",
    ),
    ("a setting without its section", ["limit=4"], "limit is no setting; did you mean task.limit"),
    ("a setting misspelled", ["task.limt=4"], "task.limt is no setting; did you mean task.limit"),
    (
        "a part of a model's name",
        ["model=llada"],
        "did you mean llada_1_5, llada_8b_base, llada_8b_instruct or nano_llada",
    ),
    ("capitals", ["method=GPTQ"], "method=GPTQ is no choice; did you mean gptq"),
    ("a hub id as a choice", ["model=GSAI-ML/LLaDA-8B-Base"], "for example model=llada_8b_base model.path=GSAI-ML/"),
    ("a number that is no width", ["bits=4.5"], "bits=4.5 is no choice; there are fp8"),
    ("text for a limit", ["task.limit=all"], "task.limit=all is no whole number; write one, or null"),
    ("text for a switch", ["reuse=maybe"], "reuse=maybe is neither true nor false"),
    ("text for a list", ["parts=mine"], "parts is a list; write its items in brackets"),
    (
        "an added setting that is there",
        ["+seed=1"],
        r"\+seed adds a setting, but seed is one already; leave out the \+",
    ),
    ("a path with odd characters", ["model.path=/no/my(model)=x"], r"/no/my\(model\)=x does not exist"),
    ("a path beyond ASCII", ["data_root=/größe/#1"], "data_root=/größe/#1 is no folder"),
    # pairs that cannot be
    ("fp16 with a width", ["method=fp16", "bits=w4a16"], "bits=w4a16: fp16 quantizes nothing; bits must be w16a16"),
    (
        "weight-only with 4-bit activations",
        ["method.activation=null", "bits=w4a4"],
        "quantizes weights only; write bits=w4a16",
    ),
    (
        "group size",
        ["bits.weight.group_size=256"],
        "group_size=256 does not divide 128, the inputs of q, k, v, o, gate, up",
    ),
    ("group size of zero", ["bits.weight.group_size=0"], "group_size=0 is no number of inputs; for this model 128"),
    (
        "what a sampler's cache stores, without one",
        ["method.kv=per_head", "method.kv.when=commit", "bits.kv.bits=4"],
        "this sampler has none; write model.sampler.cache=prefix, or method.kv.when=always",
    ),
    (
        "what a sampler's cache stores, of a sampler that has no such setting",
        ["method.kv=per_head", "method.kv.when=commit", "bits.kv.bits=4", "model.sampler=dream"],
        "write model.sampler.cache=prefix model.sampler=llada, or",
    ),
    (
        "what a sampler's cache stores, and no answers",
        [
            "method.kv=per_head",
            "method.kv.when=commit",
            "bits.kv.bits=4",
            "model.sampler.cache=dual",
            "task=nano_facts",
        ],
        r"none of the tasks \(nano_facts\) has answers written by it",
    ),
    ("width of keys", ["method.kv=per_head", "bits.kv.keys=1"], "bits.kv.keys=1 is no width dqx has"),
    ("width of values", ["bits.kv.values=4"], "bits.kv.values=4, but method .* leaves keys and values in 16 bit"),
    ("steps that blocks do not divide", ["steps=63", *LENGTHS], "steps=63 cannot be shared equally by"),
    (
        "blocks that the answer does not hold",
        [LENGTHS[0], "task.suite.nano_sums.block_length=24"],
        "block_length=24 does not divide",
    ),
    ("chat without a template", ["model.chat=true"], "model.chat=true, but .* has no chat template"),
    (
        "another family",
        ["model=dream_7b_base"],
        "model.family=dream, but .* is of family llada; .* model=llada_8b_base",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), [pytest.param(o, m, id=i) for i, o, m in CONFIGURATIONS])
def test_configuration(problems: Problems, checkpoint: Path, overrides: list[str], message: str) -> None:
    if overrides == ["model.chat=true"]:
        (checkpoint / "tokenizer_config.json").write_text("{}")
    found = problems(*overrides)
    assert len(found) == 1, found
    assert re.search(message, found[0]), found


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_cuda_that_is_not_there(problems: Problems) -> None:
    (found,) = problems("model.device=cuda:1")
    assert "model.device=cuda:1, but torch" in found
    assert "write cpu or auto" in found


def test_all_problems_at_once(problems: Problems) -> None:
    """One of each kind: number, name, part, sampler, task, calibration, checkpoint, method."""
    found = problems(
        "seed=-1",
        "model.dtype=int4",
        "+method.rounding.chunks=2",
        "model.sampler.cfg_scale=-2",
        "task.limit=0",
        "calib.text=missing.txt",
        "model.mask_token_id=999999",
    )
    expected = (
        "seed",
        "model.dtype",
        "method.rounding.chunks",
        "model.sampler.cfg_scale",
        "task.limit",
        "calib.text",
        "model.mask",
    )
    assert sorted(next((e for e in expected if p.startswith(e)), p) for p in found) == sorted(expected)
    pair = problems("bits=w4a4", "bits.weight.group_size=96", "method.activation=null")
    assert len(pair) == 3, "one per width, and the pair of method and bits"
    assert any("group_size=96" in p for p in pair)
    assert any("quantizes weights only" in p for p in pair)


def test_a_hub_model_is_not_fetched_for_a_run_that_cannot_start(
    problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("fetched from the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = problems("model.path=GSAI-ML/LLaDA-8B-Base", "seed=-1")
    assert found[0] == "seed=-1 must be 0 or more"
    assert "was not looked at" in found[1]


@pytest.mark.parametrize("name", ["a", "", "a b", "größe", "x" * 128, "x" * 129, *(f"a{c}b" for c in "/\\#?%:-_.(")])
def test_names_are_refused_that_wandb_refuses(name: str) -> None:
    import wandb

    def is_refused(**settings: object) -> bool:
        try:
            wandb.Settings(**settings)
        except Exception:  # of several kinds
            return True
        return False

    project, tags = resolve(compose()), resolve(compose())
    project.wandb.project, tags.wandb.tags = name, [name]
    assert bool(checks.setting_problems(project)) == (is_refused(project=name) or not name)
    assert bool(checks.setting_problems(tags)) == is_refused(run_tags=[name])


# ---- checkpoints ---------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, name: str, replacement: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors | ({name: replacement} if replacement is not None else {}), path)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garble_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\x00" * 8 + path.read_bytes()[8:])


def shard(folder: Path) -> None:
    """Split into two files and an index, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({n: tensors[n] for n in members}, folder / file)
    weight_map = {n: file for file, members in halves.items() for n in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_the_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def break_the_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


QUERY = "model.transformer.blocks.1.q_proj.weight"
CHECKPOINTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no folder", shutil.rmtree, "does not exist; give a folder, or a hub id"),
    ("no config.json", lambda f: (f / "config.json").unlink(), "config.json is missing"),
    ("config.json is no JSON", lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    (
        "unknown model_type",
        lambda f: edit_config(f, model_type="llama"),
        "model_type is 'llama'; dqx has 'Dream', 'Fast_dLLM_Qwen', 'llada', ",
    ),
    ("a key is missing", lambda f: edit_config(f, d_model=...), "config.json: key 'd_model' is missing"),
    ("mask id outside the vocabulary", lambda f: edit_config(f, mask_token_id=320), "mask_token_id=320 lies outside"),
    ("heads that do not divide", lambda f: edit_config(f, n_heads=5, n_kv_heads=5), "5 heads do not divide"),
    ("another attention", lambda f: edit_config(f, alibi=True), "alibi=True is not supported"),
    (
        "another depth",
        lambda f: edit_config(f, n_layers=9),
        "tensors of .* are missing, first 'model.transformer.blocks.3",
    ),
    ("truncated file", truncate, "model.safetensors is corrupt or truncated"),
    ("garbled header", garble_header, "model.safetensors is corrupt or truncated"),
    ("a tensor is missing", lambda f: edit_tensors(f, QUERY, None), f"1 tensors of .* are missing, first '{QUERY}'"),
    (
        "a tensor of another shape",
        lambda f: edit_tensors(f, QUERY, torch.zeros(128, 64)),
        rf"'{QUERY}' is \[128, 64\], ",
    ),
    (
        "a tensor too many",
        lambda f: edit_tensors(f, "lora.weight", torch.zeros(1)),
        "no place for, first 'lora.weight'",
    ),
    (
        "a shard is missing",
        lose_a_shard,
        "model-00002-of-00002.safetensors' is named in .*index.json, but there is no such file",
    ),
    ("shards without an index", lose_the_index, "holds 2 safetensors files but no model.safetensors.index.json"),
    ("an index without a map", break_the_index, "is no safetensors index"),
    ("pickled weights only", pickle_only, "pytorch_model.bin is pickled and is never read, convert it"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer: put tokenizer.json there"),
]


@pytest.mark.parametrize(("spoil", "message"), [pytest.param(s, m, id=i) for i, s, m in CHECKPOINTS])
def test_checkpoint(problems: Problems, checkpoint: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(checkpoint)
    found = problems()
    assert len(found) == 1, found
    assert re.search(message, found[0]), found
    assert str(checkpoint) in found[0], "the message names the file"


def test_shards_with_an_index_are_fine(problems: Problems, checkpoint: Path) -> None:
    shard(checkpoint)
    assert problems() == []


def test_python_files_in_a_checkpoint_are_never_imported(problems: Problems, checkpoint: Path) -> None:
    bomb = checkpoint / "exploded"
    for name in ("modeling_llada.py", "configuration_llada.py", "tokenization_llada.py", "__init__.py"):
        (checkpoint / name).write_text(f"open({str(bomb)!r}, 'w').close()\n")
    edit_config(checkpoint, auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    assert problems() == []
    assert not bomb.exists()


# ---- data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    shutil.copytree(DATA / "allenai" / "ai2_arc", root / "allenai" / "ai2_arc")
    return root


def arc(problems: Problems, data_root: Path) -> list[str]:
    return problems("task=arc_challenge", f"data_root={data_root}")


def test_good_local_data(problems: Problems, data_root: Path) -> None:
    assert arc(problems, data_root) == []


def damage(root: Path) -> None:
    file = next((root / "allenai" / "ai2_arc" / "ARC-Challenge").glob("test*.parquet"))
    file.write_bytes(file.read_bytes()[:100])


def lose_the_test_split(root: Path) -> None:
    next((root / "allenai" / "ai2_arc" / "ARC-Challenge").glob("test*.parquet")).unlink()


DATA_FOLDERS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no folder", shutil.rmtree, "data_root=.* is no folder; give the folder that holds the dataset copies"),
    ("no dataset", lambda r: shutil.rmtree(r / "allenai"), "ai2_arc does not exist; copy the dataset there"),
    ("a damaged file", damage, "test.*parquet is no readable Parquet file .*; copy it again"),
    ("a split is missing", lose_the_test_split, "ai2_arc"),
]


@pytest.mark.parametrize(("spoil", "message"), [pytest.param(s, m, id=i) for i, s, m in DATA_FOLDERS])
def test_data(problems: Problems, data_root: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(data_root)
    found = arc(problems, data_root)
    assert len(found) == 1, found
    assert re.search(message, found[0]), found


CALIBRATION = [
    ("no file", "missing.txt", None, "missing.txt: the file does not exist"),
    ("empty file", "empty.txt", "", "empty.txt: the file is empty"),
    ("neither name nor dataset", "wikitext3", None, "wikitext3 is neither one of .*wikitext2.*, nor a local file"),
]


@pytest.mark.parametrize(("text", "content", "message"), [pytest.param(t, c, m, id=i) for i, t, c, m in CALIBRATION])
def test_calibration_text(problems: Problems, tmp_path: Path, text: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / text).write_text(content)
        text = str(tmp_path / text)
    (found,) = problems(f"calib.text={text}")
    assert re.search(message, found), found


def test_calibration_text_shorter_than_a_window(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    (found,) = problems(f"calib.text={tmp_path / 'short.txt'}")
    assert "only 5 tokens, fewer than one window of calib.length=64; choose less" in found


def test_text_that_nothing_reads_may_be_missing(problems: Problems) -> None:
    assert problems("method=rtn", "outliers.samples=0", "calib.text=nowhere.txt") == []
    assert len(problems("method=rtn", "calib.text=nowhere.txt")) == 1
    assert len(problems("method=gptq", "outliers.samples=0", "calib.text=nowhere.txt")) == 1


def test_no_network_and_no_copy(problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    text, task = problems("task=[nano_sums,gsm8k,hellaswag]", "calib.text=wikitext2")
    assert "calib.text=wikitext2: Couldn't reach 'Salesforce/wikitext'" in text
    assert "task gsm8k: openai/gsm8k cannot be had from the hub" in task
    assert all("give data_root=FOLDER" in found for found in (text, task))


def test_calibration_dataset_that_data_root_lacks(problems: Problems, data_root: Path) -> None:
    (found,) = problems("task=arc_challenge", f"data_root={data_root}", "calib.text=wikitext2")
    assert "Salesforce/wikitext does not exist; put a copy of the dataset there" in found


def test_problems_are_told_of_what_hydra_composes() -> None:
    assert any(p.startswith("seed=-1") for p in experiment.problems(compose(["seed=-1", "task=nano_sums"])))


def test_what_is_rounded_in_a_cache_alone_is_noted():
    told = []
    for more in ([], ["method.kv.when=commit"], ["method.kv.when=commit", "bits.kv.bits=16"]):
        config = resolve(compose(["method=rtn", "bits=w16a16", "method/kv=per_head", "bits.kv.bits=4", *more]))
        told.append(checks.reuse_notes(config, build(config.method)))
    assert told[0] == told[2] == []
    assert "likelihoods, outlier statistics and divergences are of forwards without a cache" in told[1][0]


class Final(LLaDASampler):
    """As if each block were stored once, when it is final."""

    has_cache = stores_final = True


def test_what_looks_at_a_sequence_beside_a_sampler_that_stores_blocks_once():
    def told(*more):
        config = resolve(compose(["method=rtn", "bits=w16a16", "method/kv=per_head", "bits.kv.bits=4", *more]))
        return checks.reuse_problems(config, build(config.method), Final())

    assert told() == told("method.kv.when=commit", "method.kv.center=mean", "method.kv.keys=channel") == []
    (problem,) = told("method.kv.center=mean")
    assert "computes them block by block; write method.kv.when=commit" in problem
    (problem,) = told("method.kv.when=commit", "method.kv.recent=32")
    assert "method.kv.recent=32 leaves the last tokens in 16 bit, but this sampler stores each block once" in problem
