"""Families: what each file says fits together, and asking about them costs no torch."""

import subprocess
import sys

import pytest

from dqx.common.parts import build_part
from dqx.config.compose import build, compose, resolve
from dqx.config.schema import ConfigProblems
from dqx.models.family import families, family_of


@pytest.mark.parametrize("family", families().values(), ids=families())
def test_a_config_is_read_as_the_architecture_it_was_written_for(family):
    _, arch = family.published
    assert family.architecture(family.config(arch)) == arch
    assert all(family.config(arch).get(key) in values for key, values in family.required.items())


@pytest.mark.parametrize("family", families().values(), ids=families())
def test_a_folder_is_sampled_as_the_example_choice(family):
    model = resolve(compose([f"model={family.example}"])).model
    assert model.family == family.name
    assert build_part(family.sampler) == build(model.sampler)


def test_names_cover_every_linear():
    for family in families().values():
        norms = {"attn_norm", "mlp_norm"} | ({"q_norm", "k_norm"} if family.published[1].head_norm else set())
        assert set(family.block_names) == {*family.published[1].roles, *norms}


def test_unknown_families_and_traits_are_told():
    with pytest.raises(ValueError, match=r"model\.family=gpt is unknown; it is one of dream, fast_dllm, llada"):
        family_of("gpt")
    with pytest.raises(ConfigProblems, match="no family has the trait tall"):
        resolve(compose(["method=awq_as_published", "method.transforms.scale.judge=${by_trait:llada,tall,a,b}"]))


def test_families_are_known_without_torch():
    asked = "import sys; from dqx.config.compose import compose; compose(['method=gptq_as_published']).method.rounding"
    names = "('torch', 'transformers')"
    told = subprocess.run(
        [sys.executable, "-c", f"{asked}; print([n for n in {names} if n in sys.modules])"], stdout=subprocess.PIPE
    )
    assert told.stdout.strip() == b"[]"


def test_a_checkpoint_is_inspected_without_dynamo():
    asked = "import sys; from dqx.models.checkpoint import inspect; inspect('pkg://dqx/assets/nano_llada')"
    told = subprocess.run(
        [sys.executable, "-c", f"{asked}; print('torch._dynamo' in sys.modules)"], stdout=subprocess.PIPE
    )
    assert told.stdout.strip() == b"False"
