"""The bundled model of SDAR's architecture: its config, its training batches, what was committed."""

import json
from pathlib import Path

import torch

from bundled import generated
from bundled.hold import OutlierPlan, plant
from bundled.nano import BLOCK_DIFFUSION, Batches, accuracy, clean_and_noisy, config, loss_of
from dqx.config.compose import build, compose, resolve
from dqx.diffusion.samplers.sdar import SDARSampler
from dqx.models.checkpoint import inspect, load_weights
from dqx.models.families.sdar import architecture
from dqx.models.family import family_of
from dqx.models.transformer import MaskedDiffusionTransformer, initialise

MODEL = generated.ASSETS / "nano_block"
SDAR_CONFIG = Path(__file__).parents[1] / "golden3" / "sdar_tiny" / "config.json"


def test_config_has_the_keys_of_sdar() -> None:
    ours, theirs = config(generated.tokenizer(), "sdar"), json.loads(SDAR_CONFIG.read_text())
    assert ours.keys() - theirs.keys() == {"block_size", "mask_token_id"}  # which the published ones leave to scripts
    assert theirs.keys() <= ours.keys()
    for key in ("architectures", "auto_map", "model_type", "hidden_act", "rms_norm_eps", "attention_bias"):
        assert ours[key] == theirs[key]
    arch = architecture(ours)
    assert arch.block_length == BLOCK_DIFFUSION
    assert arch.n_heads * arch.head_size > arch.hidden_size
    assert all(arch.in_features(role) % 128 == 0 for role in ("q", "o", "down"))


def test_a_noisy_block_is_computed_as_the_sampler_computes_it() -> None:
    """A row's loss at a block is that of the block behind the stored clean text before it."""
    model = MaskedDiffusionTransformer(architecture(config(generated.tokenizer(), "sdar") | {"num_hidden_layers": 2}))
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    rows = torch.randint(0, 400, (3, 22), generator=generator)
    mask = model.arch.mask_token_id
    batch = clean_and_noisy(rows, 5, 8, mask, generator)
    assert torch.allclose(batch.weights.sum(1), torch.ones(3))
    with torch.no_grad():
        logits = model(batch.ids, layout=batch.layout)
        for row in range(3):
            noisy = batch.ids[row, 16:]
            for start in (0, 8, 16):
                block = noisy[start : start + 8]
                everything = torch.ones(1, len(block), dtype=torch.bool)
                store = model.empty_store(1, 24)
                if start:
                    before = rows[row : row + 1, :start]
                    known = store.feed(torch.ones(before.shape, dtype=torch.bool), [model.arch.attention], [True])
                    model.head_rows(before, torch.zeros(before.shape, dtype=torch.bool), known)
                    known.commit()
                feed = store.feed(everything, [model.arch.attention], [False])
                alone = model.head_rows(block[None], everything, feed)
                torch.testing.assert_close(logits[row, 16 + start :][: len(block)], alone, atol=1e-4, rtol=0)
                assert torch.equal(block == mask, batch.weights[row, 16 + start :][: len(block)] > 0)


def test_answers_are_filled_to_the_end_of_their_last_block() -> None:
    batches = Batches(generated.tokenizer(), 60, seed=1, model=family_of("sdar"))
    eos = generated.tokenizer().token_to_id(generated.EOS)
    for family in ("sums", "code"):
        for rows, _ in batches.groups[family]:
            assert rows.shape[1] % BLOCK_DIFFUSION == 0
            assert (rows[:, -1] == eos).all()
    batch = batches.draw("sums", 64, step=3)
    counts = (batch.weights > 0).sum(1)
    assert counts.min() >= 2
    assert counts.float().std() > 1


def test_a_few_steps_lower_the_loss_and_train_the_norms_of_heads() -> None:
    tokenizer = generated.tokenizer()
    model = MaskedDiffusionTransformer(architecture(config(tokenizer, "sdar") | {"num_hidden_layers": 2}))
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    held = plant(model, OutlierPlan(), tokenizer.token_to_id("Ċ"), generator)
    pair = [27, 59]
    batches = Batches(tokenizer, 50, seed=0, model=family_of("sdar"))
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
    gain = model.blocks[0].k_norm.weight
    assert gain[pair].eq(12).all()
    assert (gain[:27] != 1).any()


def test_committed_config_and_tokenizer_are_what_the_script_makes(tmp_path: Path) -> None:
    assert json.loads((MODEL / "config.json").read_text()) == config(generated.tokenizer(), "sdar")
    generated.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MODEL / path.name).read_bytes()
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 6e6


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


def test_it_is_used_with_the_blocks_it_was_trained_with() -> None:
    chosen = resolve(compose(["model=nano_block"])).model
    assert chosen.family == "sdar"
    assert build(chosen.sampler) == SDARSampler(block=BLOCK_DIFFUSION)
