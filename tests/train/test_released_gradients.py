"""optimi's gradient release: weights that are updated within backward."""

import pytest
import torch
from kill_cases import Killed, kill_at, same_files
from safetensors.torch import load_file

from fluxfast.cli.plan import plan_report
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.train.events import read_metrics
from fluxfast.train.trainer import Trainer

OPTIMI = {"mixed_precision": "no", "optimizer": "optimi-stableadamw", "lora_dropout": 0.0}
RELEASED = OPTIMI | {"optimizer_release_gradients": True}


@pytest.mark.parametrize("name", ["optimi-stableadamw", "optimi-lion", "optimi-adamw"])
def test_a_run_trains_to_the_same(run, name):
    settings = {"optimizer": name, "max_grad_norm": 0.0}
    plain, _ = run(name="plain", **OPTIMI | settings)
    released, _ = run(name="released", **RELEASED | settings)
    ours, theirs = load_file(released), load_file(plain)
    for key, tensor in theirs.items():
        # the same sums in fp32; optimi's foreach and its single-tensor update round differently
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)
    norms = [
        [line["grad_norm"] for line in read_metrics(lora.parent / "metrics.jsonl")]
        for lora in (plain, released)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and all(norm > 0 for norm in norms[0])


@pytest.mark.parametrize("streams", [False, True])
def test_no_gradient_outlives_its_block(run, monkeypatch, streams):
    seen = []
    step = Trainer.train_step

    def watch(self, number):
        result = step(self, number)
        trained = [p for p in self.transformer.parameters() if p.requires_grad]
        seen.append((self.transformer.gradients, [p.grad for p in trained]))
        return result

    monkeypatch.setattr(Trainer, "train_step", watch)
    run(**RELEASED, max_train_steps=2, enable_group_offload=streams)
    assert len(seen) == 2
    for buffer, grads in seen:
        assert buffer is None and all(grad is None for grad in grads)


def test_a_killed_run_ends_with_the_same_bits(run, monkeypatch):
    whole, _ = run(name="whole", **RELEASED)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **RELEASED)
    killed, _ = run(name="killed", **RELEASED)
    assert same_files(whole, killed)


def test_what_it_can_not_go_with(write_config):
    for changes, told in (
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"optimizer": "optimi-adamw"}, "max_grad_norm"),
        ({"cuda_graphs": True}, "cuda_graphs"),
    ):
        with pytest.raises(ConfigError, match=f"optimizer_release_gradients.*{told}"):
            load_config(write_config(**RELEASED | changes))
    config = load_config(write_config(**RELEASED | {"optimizer": "torch-adamw"}))
    assert not config.releases_gradients
    assert any('"optimizer_release_gradients" has no effect' in note for note in config.notes)


def test_plan_counts_a_blocks_gradients(write_config):
    plans = [
        plan_report(load_config(write_config(**settings)), "RTX 4090")
        for settings in (OPTIMI, RELEASED)
    ]
    kept, released = (plan["vram"]["gradients"] for plan in plans)
    # three blocks, of which one has the most
    assert kept / 3 <= released < kept
    assert not plans[1]["chosen"]["graphs"] and plans[0]["chosen"]["graphs"]
