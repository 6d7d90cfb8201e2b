"""The Python interface on tiny checkpoints of both families, on the bundled model, and as the README shows it."""

import re
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import records
import torch

import dqx
from dqx.config.schema import CONF_DIR, ConfigProblems
from dqx.data.calibration import CalibBatch
from dqx.models.checkpoint import CheckpointError
from dqx.record.folder import RunFolder

FAMILIES = ["llada", "dream"]
README = CONF_DIR.parent / "README.md"


@pytest.fixture(params=FAMILIES)
def lm(request, tiny_checkpoint):
    return dqx.load(str(tiny_checkpoint(request.param)), device="cpu")


def test_logits_of_text_and_of_ids_agree(lm):
    assert torch.equal(lm.logits("hello"), lm.logits(lm.tokens("hello")[None]))


def test_generate_is_a_function_of_prompt_and_seed(lm):
    assert lm.generate("hello", gen_length=8) == lm.generate("hello", gen_length=8, seed=1)  # temperature 0
    assert lm.model(lm.tokens("a")[None]).shape[-1] == lm.model.arch.vocab_size


def test_generate_says_what_is_wrong(lm):
    with pytest.raises(ValueError, match="block_length"):
        lm.generate("hello", gen_length=8, block_length=3)


def test_likelihood_by_seed_and_by_masks(lm):
    seeded = lm.log_likelihood("question", " yes", samples=4, seed=3)
    assert seeded == pytest.approx(lm.log_likelihood("question", " yes", samples=4, seed=3, batch_size=1), rel=1e-5)
    one_by_one = torch.eye(4, dtype=torch.bool)
    given = lm.log_likelihood("question", " yes", masks=one_by_one)
    logits = []
    for i in range(4):
        ids = torch.cat((lm.tokens("question"), lm.tokens(" yes")))
        place = len(lm.tokens("question")) + i
        target = ids[place].item()
        ids[place] = lm.model.arch.mask_token_id
        logits.append(lm.logits(ids[None])[0, place].double().log_softmax(-1)[target].item())
    assert given == pytest.approx(sum(logits), rel=1e-5)


def test_masks_that_fit_no_target_are_refused(lm):
    with pytest.raises(ValueError, match=r"masks must be \[N, 4\]"):
        lm.log_likelihood("question", " yes", masks=torch.ones(1, 3, dtype=torch.bool))


def test_quantize_changes_the_model_in_place(lm):
    batches = [CalibBatch(torch.arange(64).view(2, 32), torch.zeros(2))]
    before = lm.logits("hello")
    report = lm.quantize("gptq", "w4a16", calib=batches, overrides=["bits.weight.group_size=32"])
    assert len(report.linears) == 7 * lm.model.arch.n_blocks
    assert 4 < report.average_bits < 5
    assert not torch.equal(lm.logits("hello"), before)


def test_a_pair_that_cannot_work_is_refused_before_anything_changes(lm):
    before = lm.logits("hello")
    with pytest.raises(ConfigProblems, match=r"bits\.weight\.group_size=128 does not divide"):
        lm.quantize("rtn", "w4a16")
    assert torch.equal(lm.logits("hello"), before)


# ---- lists and tensors alike ---------------------------------------------------------------------------------

PROMPTS = ["hello", "a much longer prompt than that", "x"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_in_a_list_are_written_as_they_are_alone(lm, temperature):
    lm.sampler = replace(lm.sampler, temperature=temperature)
    alone = [lm.generate(prompt, gen_length=8, seed=3) for prompt in PROMPTS]
    assert lm.generate(PROMPTS, gen_length=8, seed=3) == alone
    assert lm.generate([lm.tokens(prompt) for prompt in PROMPTS], gen_length=8, seed=3) == alone
    assert lm.generate([lm.tokens(prompt).tolist() for prompt in PROMPTS], gen_length=8, seed=3) == alone
    assert lm.generate(lm.tokens("hello").tolist(), gen_length=8, seed=3) == alone[0]
    assert lm.generate(torch.stack([lm.tokens("hello")] * 2), gen_length=8, seed=3) == alone[:1] * 2
    assert lm.generate([], gen_length=8) == []


def test_a_list_is_written_with_the_tokens_of_the_plain_sampler(lm):
    for prompt, text in zip(PROMPTS, lm.generate(PROMPTS, gen_length=8, block_length=8, steps=4), strict=True):
        plain = lm.sampler.generate(lm.model, lm.tokens(prompt)[None], gen_length=8, block_length=8, steps=4)
        assert text == lm.tokenizer.decode(plain.ids[0], skip_special_tokens=True)


def test_tokens_do_as_well_as_their_text(lm):
    ids = lm.tokens("hello")
    for same in (ids, ids[None], ids.tolist(), [ids.tolist()]):
        assert torch.equal(lm.logits(same), lm.logits("hello"))
    value = lm.log_likelihood("question", " yes", samples=4)
    assert lm.log_likelihood(lm.tokens("question"), lm.tokens(" yes").tolist(), samples=4) == value
    masks = [[True, False, False, False]]
    assert lm.log_likelihood("a", " yes", masks=masks) == lm.log_likelihood("a", " yes", masks=torch.tensor(masks))


def test_calibration_is_tokens_or_text(lm, tiny_checkpoint):
    other = dqx.load(tiny_checkpoint(lm.model.arch.family), device="cpu")
    width = ["bits.weight.group_size=32"]
    ids = [lm.tokens("some text to see"), lm.tokens("and some more of it").tolist()]
    report = lm.quantize("gptq", "w4a16", calib=ids, overrides=width)
    assert (report.calibration_sequences, report.calibration_tokens) == (2, 35)
    dqx.quantize(other.model, "gptq", "w4a16", ids, overrides=width)
    assert torch.equal(other.logits("hello"), lm.logits("hello"))


def test_chat_puts_the_template_around(lm):
    assert lm.generate("hi", gen_length=8, chat=True) == lm.generate("<user>hi<|eot_id|><assistant>", gen_length=8)
    lm.tokenizer.chat_template = None
    with pytest.raises(ConfigProblems, match="has no chat template; leave out chat=True"):
        lm.generate("hi", gen_length=8, chat=True)


# ---- saved and loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "duquant"])
def test_what_was_saved_is_loaded(lm, tmp_path, method):
    lm.sampler = replace(lm.sampler, temperature=0.5)
    lm.config.sampler["temperature"] = 0.5
    if method is not None:
        lm.quantize(method, "w4a4", calib=["some text"], overrides=["method.transforms.rotate.tile=16"])
    for folder in (tmp_path / "saved", tmp_path / "saved again"):
        lm.save(folder)
        with pytest.raises(FileExistsError, match="name a new folder"):
            lm.save(folder)
        again = dqx.load(folder, device="cpu")
        assert torch.equal(again.logits("hello"), lm.logits("hello"))
        assert again.generate("hello", gen_length=8) == lm.generate("hello", gen_length=8)
        assert repr(again) == repr(lm)
        lm = again


def test_a_model_says_what_it_is(lm):
    family = lm.model.arch.family
    assert repr(lm) == f"DiffusionLM({lm.config.name}: {family}, 0.2 M parameters, float32, cpu, full precision)"
    lm.quantize("rtn", "w4a16", overrides=["bits.weight.group_size=32"])
    assert repr(lm).endswith("float32, cpu, rtn w4a16, 4.62 bits per weight)")
    assert f"<tr><th>family</th><td>{family}</td></tr>" in lm._repr_html_()


# ---- mistakes ------------------------------------------------------------------------------------------------

MISTAKES = {
    "nano_lada is no name in conf/model and no folder; did you mean nano_llada": lambda lm: dqx.load("nano_lada"),
    "/nowhere/x does not exist": lambda lm: dqx.load(Path("/nowhere/x")),
    "model.dtyp is no setting; did you mean dtype": lambda lm: dqx.load("nano_llada", dtyp="float32"),
    "model.dtype=flot32 is unknown; did you mean float32": lambda lm: dqx.load("nano_llada", dtype="flot32"),
    "model.device=gpu is no device": lambda lm: dqx.load("nano_llada", device="gpu"),
    "method=gptqq is no choice; did you mean gptq": lambda lm: lm.quantize("gptqq", "w3a16"),
    "bits=w3a17 is no choice; did you mean w3a16": lambda lm: lm.quantize("gptq", "w3a17"),
    "method awq quantizes weights only": lambda lm: lm.quantize("awq", "w4a4"),
    "dampin is no setting": lambda lm: lm.quantize("gptq", "w3a16", overrides=["method.rounding.dampin=1"]),
    "task=nano_fact is no choice; did you mean nano_facts": lambda lm: lm.evaluate("nano_fact"),
    "block_length=3 ": lambda lm: lm.generate("a", gen_length=8, block_length=3),
    "^steps=0 is not a positive integer": lambda lm: lm.generate("a", gen_length=8, steps=0),
    "block_length=0 ": lambda lm: lm.generate("a", gen_length=8, block_length=0),
    "^gen_length=0 is not a positive": lambda lm: lm.generate("a", gen_length=0),
    "a prompt of 1000 tokens and gen_length=64 take 1064 positions, .* 1024 of .*; write gen_length=24 or less": (
        lambda lm: lm.generate(["a", "a" * 1000], gen_length=64)
    ),
    "gen_length=8 take 1108 positions, more than the 1024 of .*; shorten the prompt": (
        lambda lm: lm.generate("a" * 1100, gen_length=8)
    ),
    "^1100 tokens are more than the 1024 positions": lambda lm: lm.logits("a" * 1100),
    "^1101 tokens are more than the 1024 positions": lambda lm: lm.log_likelihood("a" * 1100, "b"),
    "^samples=0 is not a positive integer": lambda lm: lm.log_likelihood("a", "b", samples=0),
    "task.suite.nano_sums: steps=0 is not a positive integer": lambda lm: lm.evaluate("nano_sums", steps=0),
    "task.limit=0 leaves no documents": lambda lm: lm.evaluate("nano_sums", limit=0),
    "each needs at least one": lambda lm: lm.generate(["a", ""], gen_length=8),
    "5000 is no token of the model; ids go from 0 to 319": lambda lm: lm.logits([1, 5000]),
    "320 is no token of the model; ids go from 0 to 319": lambda lm: lm.generate([1, 320], gen_length=8),
    "-1 is no token of the model; ids go from 0 to 319": lambda lm: lm.log_likelihood([1], [-1]),
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_one_short_exception(lm, told):
    with pytest.raises((ConfigProblems, CheckpointError), match=told) as raised:
        MISTAKES[told](lm)
    error = raised.value
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert len("".join(traceback.format_exception(error))) < 1500


# ---- the package ---------------------------------------------------------------------------------------------


def test_the_package_shows_its_api_and_imports_nothing_heavy():
    code = "import sys, dqx; print(dir(dqx)); print('torch' in sys.modules, dqx.__version__, dqx.choices('bits')[:2])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF_DIR.parent)
    assert done.stdout.splitlines() == [
        "['DiffusionLM', '__version__', 'block_statistics', 'choices', 'load', 'quantize', 'runs']",
        f"False {dqx.__version__} ['fp8', 'fp8_w8a16']",
    ]


def test_the_readme_runs(tmp_path, monkeypatch):
    """From another folder, in which there is a run."""
    RunFolder(tmp_path / "runs" / "one").write(records.record())
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"## From Python\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, README.name, "exec"), names)
    assert names["report"].method == "gptq"
