"""The moving average of the trained weights."""

import pytest
import torch
from kill_cases import Killed, kill_at, same_files
from safetensors.torch import load_file
from torch.nn import Parameter

from config_helpers import load
from fluxfast.cli.plan import plan_report
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.train import ema
from fluxfast.train.ema import WeightAverage
from fluxfast.train.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


FP32 = {"mixed_precision": "no", "optimizer": "torch-adamw"}
# far from its limit in a few steps, so that average and weights differ
EMA = {"use_ema": True, "ema_decay": 0.5, "learning_rate": 0.01}


def weights(seed, shapes=((3, 5), (63,), (1000, 7), (1,))):
    g = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=g) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("together", [1, 70, 1 << 22])
def test_values_against_the_formula_in_fp64(monkeypatch, together):
    monkeypatch.setattr(ema, "_TOGETHER", together)
    named = {name: Parameter(t.to(torch.bfloat16)) for name, t in weights(0).items()}
    average = WeightAverage(named, decay=0.9, interval=2, device=CPU)
    expected = {name: p.detach().double() for name, p in named.items()}
    for step in range(1, 40):
        for name, t in weights(step).items():
            named[name].data.copy_(t)
        average.update(step)
        if step % 2 == 0:
            decay = min((1 + step) / (10 + step), 0.9)
            for name, p in named.items():
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, t in average.state().items():
        # 20 sums in fp32
        torch.testing.assert_close(t.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_the_decay():
    named = {"a": Parameter(torch.zeros(2))}
    average = WeightAverage(named, decay=0.995, device=CPU)
    assert average.decay_at(1) == 2 / 11 and average.decay_at(10_000) == 0.995
    warmed = WeightAverage(named, decay=0.995, warmup_steps=5, device=CPU)
    assert [warmed.decay_at(s) for s in (1, 5, 6)] == [0.0, 0.0, 0.995]


def test_in_place_and_back():
    named = {name: Parameter(t.to(torch.bfloat16)) for name, t in weights(0).items()}
    average = WeightAverage(named, decay=0.9, device=CPU)
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.data += 1
    average.update(1)
    trained = {name: p.detach().clone() for name, p in named.items()}
    with average.in_place():
        for name, p in named.items():
            assert torch.equal(p, average.state()[name].to(torch.bfloat16))
            assert not torch.equal(p, before[name]) and not torch.equal(p, trained[name])
    assert all(torch.equal(p, trained[name]) for name, p in named.items())
    with pytest.raises(ValueError, match="other weights"):
        average.load_state({"w0": torch.zeros(3, 5)})


def test_a_run_keeps_saves_and_resumes_it(run, monkeypatch, tmp_path):
    plain, _ = run(name="plain", **{**EMA, "use_ema": False}, **FP32)
    whole, _ = run(name="whole", **EMA, **FP32)
    # the weights that are trained know nothing of it
    assert same_files(plain, whole)
    folder = whole.parent / "ema"
    averaged, trained = load_file(folder / whole.name), load_file(whole)
    assert averaged.keys() == trained.keys()
    assert all(not torch.equal(averaged[name], trained[name]) for name in trained)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **EMA, **FP32)
    killed, _ = run(name="killed", **EMA, **FP32)
    for name in (whole.name, f"ema/{whole.name}"):
        assert same_files(whole.parent / name, killed.parent / name)
    last = tmp_path / "killed" / "checkpoint-6"
    state = load_file(last / "average.safetensors")
    assert all(t.dtype == torch.float32 for t in state.values())
    assert (last / "ema" / whole.name).exists()


def test_it_may_start_with_another_loras_values(run, tmp_path, monkeypatch):
    other, _ = run(name="other", **EMA, **FP32)
    start = str(other.parent / "ema" / other.name)
    # weights that hardly move, and an average that never takes them in
    still = {**EMA, "learning_rate": 1e-30, "ema_update_interval": 100, "init_lora_ema": start}
    lora, _ = run(name="first", **still, **FP32)
    averaged = load_file(lora.parent / "ema" / lora.name)
    for name, tensor in load_file(start).items():
        torch.testing.assert_close(averaged[name], tensor, rtol=0, atol=0)
    # a resumed run has the checkpoint's
    _, out = run(name="first", **{**still, "init_lora_ema": None, "max_train_steps": 7}, **FP32)
    assert '"init_lora_ema" was' in out.getvalue() and "no effect" in out.getvalue()
    with pytest.raises(ValueError, match="init_lora_ema"):
        run(name="wider", **{**still, "lora_rank": 5}, **FP32)
    with pytest.raises(ConfigError, match="gone: no such LoRA"):
        run(name="gone", **{**still, "init_lora_ema": str(tmp_path / "gone")}, **FP32)


def test_a_checkpoint_without_one(run, tmp_path):
    run(max_train_steps=2, **FP32)
    _, out = run(max_train_steps=3, **EMA, **FP32)
    assert "the moving average begins at step 2" in out.getvalue()
    _, out = run(max_train_steps=4, **FP32)
    assert '"use_ema" was true and is false' in out.getvalue()


@pytest.mark.parametrize("how", ["comparison", "ema_only", "none"])
def test_what_validation_draws(run, tmp_path, how):
    run(
        ema_validation=how, validation_disable=False, validation_step_interval=0,
        validation_prompt="a red cup", validation_resolution="64x48",
        validation_num_inference_steps=1, max_train_steps=3, **EMA, **FP32,
    )  # fmt: skip
    folder = tmp_path / "output" / "validation_images"
    names = {path.name for path in folder.glob("step_*")}
    expected = {"step_000000_validation_base_0_64x48.png", "step_000003_validation_0_64x48.png"}
    if how == "comparison":
        expected.add("step_000003_validation_ema_0_64x48.png")
    assert names == expected
    if how == "comparison":
        own, averaged = (
            (folder / f"step_000003_validation{label}_0_64x48.png").read_bytes()
            for label in ("", "_ema")
        )
        assert own != averaged


def test_ema_only_draws_with_the_average(run, monkeypatch, tmp_path):
    seen = []
    loop = Trainer.loop

    def look(self):
        average, original = self.average, self.parts.validator.run

        def watch(step, console, label=""):
            named = average._named
            seen.append((step, all(torch.equal(p, average.state()[n]) for n, p in named.items())))
            return original(step, console, label=label)

        monkeypatch.setattr(self.parts.validator, "run", watch)
        return loop(self)

    monkeypatch.setattr(Trainer, "loop", look)
    run(
        ema_validation="ema_only", validation_disable=False, validation_step_interval=2,
        disable_benchmark=True, validation_prompt="a red cup", validation_resolution="64x48",
        validation_num_inference_steps=1, max_train_steps=3, **EMA, **FP32,
    )  # fmt: skip
    assert seen == [(2, True), (3, True)]


def test_plan_counts_it(write_config):
    def plan(**changes):
        return plan_report(load_config(write_config(**changes)), "RTX 4090")

    without, host, device = plan(), plan(use_ema=True), plan(use_ema=True, ema_device="accelerator")
    adapters = without["vram"]["adapters"]
    assert without["vram"]["moving average"] == host["vram"]["moving average"] == 0
    # fp32 beside bf16
    assert device["vram"]["moving average"] == 2 * adapters == host["host"]["moving average"]
    assert device["vram_needed"] > without["vram_needed"]
    assert host["disk"]["checkpoints"] > without["disk"]["checkpoints"]
    assert plan(use_ema=True, ema_device="accelerator", ema_cpu_only=True)["vram"] == host["vram"]


def test_the_options():
    assert load(use_ema=True).average_is_on == "host" and load().average_is_on is None
    assert load(use_ema=True, ema_device="accelerator").average_is_on == "device"
