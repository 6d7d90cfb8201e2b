"""The Python interface on tiny checkpoints of both families."""

import pytest
import torch

import dqx
from dqx.config.schema import ConfigProblems
from dqx.data.calibration import CalibBatch

FAMILIES = ["llada", "dream"]


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
    report = lm.quantize("gptq", "w4a16", batches=batches, overrides=["bits.weight.group_size=32"])
    assert len(report.linears) == 7 * lm.model.arch.n_blocks
    assert 4 < report.average_bits < 5
    assert not torch.equal(lm.logits("hello"), before)


def test_a_pair_that_cannot_work_is_refused_before_anything_changes(lm):
    before = lm.logits("hello")
    with pytest.raises(ConfigProblems, match=r"bits\.weight\.group_size=128 does not divide"):
        lm.quantize("rtn", "w4a16")
    assert torch.equal(lm.logits("hello"), before)


def test_names_come_from_conf():
    with pytest.raises(Exception, match="nano_lada"):
        dqx.load("nano_lada")
