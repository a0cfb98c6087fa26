"""Runs whose gradients are in one buffer: the same LoRA as where autograd hands them out."""

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import BF16, FP32, TREAD, Killed, kill_at

from fluxfast.train import trainer
from fluxfast.train.events import read_metrics

NO_DROPOUT = {"lora_dropout": 0.0}
STREAMED = {"enable_group_offload": True, "group_offload_use_stream": True}
VALUE = {"grad_clip_method": "value", "max_grad_norm": 1e-4}


class ByAutograd:
    """In the place of `FlatGradients`: each parameter's `.grad` is what autograd made of it."""

    def __init__(self, transformer, *, accumulates):
        self._parameters = [p for p in transformer.parameters() if p.requires_grad]
        self.buffers = []

    def take(self):
        pass

    def hand_over(self):
        self.buffers = [p.grad for p in self._parameters if p.grad is not None]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def both(run):
    """Runs a config with a flat buffer and without; returns both LoRAs' paths."""

    def run_both(**mode):
        flat, _ = run(name="flat", **mode)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "FlatGradients", ByAutograd)
            by_autograd, _ = run(name="by_autograd", **mode)
        return flat, by_autograd

    return run_both


@pytest.mark.parametrize(
    "mode",
    [
        FP32 | VALUE | {"gradient_accumulation_steps": 3},
        BF16 | VALUE | TREAD,
        BF16 | {"max_grad_norm": 1e9, "gradient_accumulation_steps": 3},
        FP32 | {"max_grad_norm": 0.0} | STREAMED,
        FP32 | VALUE | {"flux_lora_target": "mmdit", "gradient_checkpointing": False},
    ],
    ids=["fp32-value-3", "bf16-tread", "bf16-3", "streamed", "mmdit"],
)
def test_the_same_lora(both, mode):
    flat, by_autograd = both(**mode)
    assert flat.read_bytes() == by_autograd.read_bytes()
    metrics = [read_metrics(path.parent / "metrics.jsonl") for path in (flat, by_autograd)]
    assert [m["loss"] for m in metrics[0]] == [m["loss"] for m in metrics[1]]
    # a sum of squares in another order
    norms = [[m["grad_norm"] for m in each] for each in metrics]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipping_by_norm(both, accumulation):
    """The factor differs where the norm does, by the order of a sum."""
    mode = FP32 | {"max_grad_norm": 1e-3, "gradient_accumulation_steps": accumulation}
    flat, by_autograd = (load_file(path) for path in both(**mode))
    for name, tensor in flat.items():
        # AdamW divides by the gradients' size, so that a rounding of theirs stays one
        torch.testing.assert_close(tensor, by_autograd[name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run(run, monkeypatch):
    mode = BF16 | NO_DROPOUT | {"gradient_accumulation_steps": 2}
    whole, _ = run(name="whole", **mode)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **mode)
    killed, _ = run(name="killed", **mode)
    assert whole.read_bytes() == killed.read_bytes()
