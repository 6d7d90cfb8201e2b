"""Training that stops and resumes goes on as if it had not stopped."""

import torch

from bundled.state import load_state, save_state


def steps(model, optimiser, first, last):
    for step in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x).pow(2).mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def fresh():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_resumed_training_is_the_same(tmp_path):
    model, optimiser = fresh()
    steps(model, optimiser, 0, 3)
    save_state(tmp_path / "last.safetensors", model, optimiser, {"step": 3, "seconds": 0.1})
    steps(model, optimiser, 3, 6)

    again, restored = fresh()
    assert load_state(tmp_path / "last.safetensors", again, restored) == {"step": 3.0, "seconds": 0.1}
    steps(again, restored, 3, 6)
    assert torch.equal(again.weight, model.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]
