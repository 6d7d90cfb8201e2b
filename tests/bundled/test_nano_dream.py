"""The bundled model in Dream's architecture: its config, its training batches, what was committed."""

import json
from pathlib import Path

import torch

from bundled import generated
from bundled.hold import OutlierPlan, plant
from bundled.nano import Batches, accuracy, config, loss_of
from dqx.config.compose import build, compose, resolve
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.families.dream import architecture
from dqx.models.family import family_of
from dqx.models.transformer import MaskedDiffusionTransformer, initialise

MODEL = generated.ASSETS / "nano_dream"
DREAM_CONFIG = Path(__file__).parents[1] / "golden" / "dream_tiny" / "config.json"


def test_config_has_the_keys_of_dream() -> None:
    ours, theirs = config(generated.tokenizer(), "dream"), json.loads(DREAM_CONFIG.read_text())
    assert ours.keys() == theirs.keys()
    for key in ("architectures", "auto_map", "model_type", "hidden_act", "rms_norm_eps", "full_attn_mask"):
        assert ours[key] == theirs[key]
    arch = architecture(ours)
    assert arch.n_kv_heads < arch.n_heads
    assert all(arch.in_features(role) % 128 == 0 for role in ("q", "down"))


def test_answers_are_masked_at_random_and_windows_keep_their_first_token() -> None:
    batches = Batches(generated.tokenizer(), 60, seed=1, model=family_of("dream"))
    for family in ("facts", "sums", "code", "packed"):
        batch = batches.draw(family, 64, step=3)
        hidden = batch.ids != batch.targets
        assert torch.equal(hidden, batch.weights > 0)  # every masked token is scored: no state of a block sampler
        assert hidden.any(1).all()
        assert not hidden[:, 0].any()
    shares = batches.draw("code", 64, step=3).weights[:, -40:].gt(0).float().mean(1)
    assert torch.allclose(shares.sort().values, (torch.arange(64) + 0.5) / 64, atol=0.05)  # t is spread evenly


def test_a_few_steps_lower_the_loss_and_train_the_biases() -> None:
    tokenizer = generated.tokenizer()
    model = MaskedDiffusionTransformer(architecture(config(tokenizer, "dream") | {"num_hidden_layers": 2}))
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    held = plant(model, OutlierPlan(), tokenizer.token_to_id("Ċ"), generator)
    batches = Batches(tokenizer, 50, seed=0, model=family_of("dream"))
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
    assert all(model.blocks[0].linears()[role].bias.abs().max() > 0 for role in ("q", "k", "v"))


def test_committed_config_and_tokenizer_are_what_the_script_makes(tmp_path: Path) -> None:
    assert json.loads((MODEL / "config.json").read_text()) == config(generated.tokenizer(), "dream")
    generated.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MODEL / path.name).read_bytes()


def test_bundled_model_is_accurate_and_has_its_outliers() -> None:
    model = load_weights(inspect(str(MODEL)), torch.float32)
    tokenizer = generated.tokenizer()
    assert min(accuracy(model, tokenizer, 16).values()) > 0.75
    ids = torch.tensor([tokenizer.encode(generated.question("What is the job of Anna?")).ids])
    seen: list[torch.Tensor] = []
    model.blocks[1].down.register_forward_hook(lambda m, x, y: seen.append(x[0][0].abs()))
    model(ids)
    massive = (seen[0] > 100) & (seen[0] > 1000 * seen[0].median())
    assert massive.any(1).equal(ids[0] == tokenizer.token_to_id("Ċ"))


def test_it_is_used_as_it_was_measured_in_training() -> None:
    chosen = resolve(compose(["model=nano_dream"])).model
    assert chosen.family == "dream"
    assert build(chosen.sampler) == build(family_of("dream").sampler)
