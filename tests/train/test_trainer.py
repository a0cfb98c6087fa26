"""Whole runs on a tiny model: what they leave, and that stopping one in any way changes nothing of
its result.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from kill_cases import Killed, kill_at, same_files
from PIL import Image
from safetensors.torch import load_file

from fluxfast.config.precision_words import in_words
from fluxfast.quant.rules import PRECISIONS
from fluxfast.train.control import Stopped
from fluxfast.train.events import read_metrics
from fluxfast.train.grid import LABELS
from fluxfast.train.objective import Objective, step_seed
from fluxfast.train.reporting import NonFiniteLoss
from fluxfast.train.trainer import Trainer

BF16 = {"optimizer": "adamw_bf16", "mixed_precision": "bf16", "lora_dropout": 0.2}
FP32 = {"optimizer": "torch-adamw", "mixed_precision": "no", "lora_dropout": 0.0}


TREAD = {
    "tread_config": {
        "routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -1}]
    }
}


@pytest.mark.parametrize(
    "mode",
    [BF16 | TREAD, FP32 | {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}],
    ids=["bf16-tread", "fp32"],
)
def test_a_killed_run_resumes_to_the_same_bits(run, monkeypatch, mode):
    whole, _ = run(name="whole", **mode)
    for step in (2, 4, 6):
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            run(name="killed", **mode)
    killed, out = run(name="killed", **mode)
    assert "resumed from" in out.getvalue() and "step 4 of 6" in out.getvalue()
    assert same_files(whole, killed)
    left, right = (read_metrics(path.parent / "metrics.jsonl") for path in (whole, killed))
    assert [m["step"] for m in right] == [1, 2, 3, 4, 5, 6]
    assert [m["loss"] for m in left] == [m["loss"] for m in right]


def test_signals_save_first(run, monkeypatch, tmp_path):
    whole, _ = run(name="whole", **FP32)
    kill_at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    # a folder whose name the console could take for markup
    output = tmp_path / "stop[" / "ped]"
    with pytest.raises(Stopped) as stopped:
        run(name="stopped", output_dir=str(output), **FP32)
    assert stopped.value.checkpoint == output / "checkpoint-3" and stopped.value.by == "SIGTERM"
    again, out = run(name="stopped", output_dir=str(output), **FP32)
    assert "stop[/ped]/checkpoint-3" in out.getvalue().replace("\n", "")
    assert same_files(whole, again)


def test_sigkill_of_the_command(write_config, run, tmp_path):
    """The command itself, killed as soon as a checkpoint shows, then run again to its end."""
    steps = {"max_train_steps": 400, "checkpoint_step_interval": 3, "checkpoints_total_limit": 2}
    config = write_config(name="killed", **FP32, **steps)
    command = [
        sys.executable,
        "-c",
        "import sys; from fluxfast.cli.main import main; sys.exit(main())",
        str(config),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = max(int(p.name.split("-")[1]) for p in (tmp_path / "killed").glob("checkpoint-*"))
    more = steps | {"max_train_steps": reached + 4}
    killed, out = run(name="killed", **FP32, **more)
    assert "resumed from" in out.getvalue()
    whole, _ = run(name="whole", **FP32, **more)
    assert same_files(whole, killed)


@pytest.mark.parametrize(
    "mode", [FP32, BF16 | {"vae_enable_tiling": True, "validation_guidance_real": 2.0}]
)
def test_what_a_run_leaves(run, tmp_path, mode):
    lora, out = run(
        **mode,
        checkpoints_total_limit=2,
        validation_disable=False,
        validation_step_interval=3,
        validation_prompt="a red cup",
        validation_resolution="64x48",
        validation_num_inference_steps=2,
    )
    output = tmp_path / "output"
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert lora == output / "pytorch_lora_weights.safetensors"
    assert same_files(lora, output / "checkpoint-6" / "pytorch_lora_weights.safetensors")
    images = {p.name: Image.open(p).size for p in (output / "validation_images").iterdir()}
    # the base in the first column, then a column a step
    grids = {0: 256 + 16, 3: 2 * 264 + 8, 6: 3 * 264 + 8}
    assert {images.pop(f"grid_step_{step:06d}.png")[0]: step for step in grids} == {
        width: step for step, width in grids.items()
    }
    assert images == {
        "step_000000_validation_base_0_64x48.png": (64, 48),
        "step_000003_validation_0_64x48.png": (128, LABELS + 48),
        "step_000006_validation_0_64x48.png": (128, LABELS + 48),
    }
    base = Image.open(output / "validation_images" / "step_000000_validation_base_0_64x48.png")
    both = Image.open(output / "validation_images" / "step_000006_validation_0_64x48.png")
    assert (
        both.crop((0, LABELS, 64, LABELS + 48)).tobytes()
        == base.tobytes()
        != both.crop((64, LABELS, 128, LABELS + 48)).tobytes()
    )
    metrics = read_metrics(output / "metrics.jsonl")
    assert len(metrics) == 6 and all(m["loss"] > 0 and m["grad_norm"] > 0 for m in metrics)
    assert (output / "loss.png").stat().st_size > 10_000
    assert "no shift" in out.getvalue()
    assert not [p for p in output.rglob("*") if p.name.endswith(".tmp")]


def test_diffusers_loads_the_lora_and_it_acts_the_same(run, workspace):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    lora, _ = run(**FP32, lora_alpha=5, learning_rate=0.02)
    pipeline = FluxPipeline.from_pretrained(workspace / "pipeline")
    assert type(pipeline.transformer) is FluxTransformer2DModel

    def sample():
        g = torch.Generator().manual_seed(0)
        return pipeline(
            "a red cup",
            height=64,
            width=64,
            num_inference_steps=2,
            generator=g,
            output_type="latent",
        ).images

    before = sample()
    pipeline.load_lora_weights(lora.parent)
    after = sample()
    assert (after - before).norm() > 0.01 * before.norm()
    scales = {
        m.scaling["default_0"] for m in pipeline.transformer.modules() if hasattr(m, "scaling")
    }
    assert scales == {5 / 3}


def test_init_lora_goes_on_where_the_file_ends(run, monkeypatch):
    first, _ = run(name="first", **FP32)
    seen = {}
    original = Trainer.train_step

    def train_step(self, step):
        if step == 1:
            seen.update(
                {
                    n: p.detach().clone()
                    for n, p in self.transformer.named_parameters()
                    if "lora_" in n
                }
            )
        return original(self, step)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run(name="second", init_lora=str(first), lora_rank=16, **FP32)
    saved = load_file(first)
    assert len(seen) == len(saved)
    for name, tensor in seen.items():
        assert torch.equal(tensor, saved["transformer." + name.replace(".default", "")])


def test_regularisation_data_pulls_towards_the_base(run, tmp_path):
    """With B = 0 the model is the base: the first loss is exactly zero, whatever the image, and
    nothing moves it.
    """
    run(dataset={"is_regularisation_data": True}, max_train_steps=3, **FP32)
    assert [m["loss"] for m in read_metrics(tmp_path / "output" / "metrics.jsonl")] == [
        0.0,
        0.0,
        0.0,
    ]
    data = {"is_regularisation_data": False}
    run(dataset=data, name="plain", max_train_steps=1, **FP32)
    assert read_metrics(tmp_path / "plain" / "metrics.jsonl")[0]["loss"] > 0


def test_a_second_start_loads_no_encoder(run, monkeypatch):
    run(**FP32, max_train_steps=1)
    from fluxfast.data import encoders

    def refuse(*args, **kwargs):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(encoders.TextEncoders, "from_pretrained", refuse)
    monkeypatch.setattr(encoders.LatentEncoder, "from_pretrained", refuse)
    run(**FP32, max_train_steps=2, name="again")


def test_non_finite_loss_names_step_files_and_checkpoint(run, monkeypatch, tmp_path):
    original = Objective.loss

    def loss(self, example):
        return original(self, example) * (float("nan") if example.step == 5 else 1)

    monkeypatch.setattr(Objective, "loss", loss)
    with pytest.raises(NonFiniteLoss, match="step 5") as error:
        run(**FP32)
    message = str(error.value)
    assert str(tmp_path / "output" / "checkpoint-4") in message
    named = [
        name
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.png")
        if name in message
    ]
    assert 1 <= len(named) <= 2
    for tensor in load_file(tmp_path / "output" / "checkpoint-4" / "adapter.safetensors").values():
        assert tensor.isfinite().all()


def test_gradient_checkpointing_changes_no_bit(run):
    plain, _ = run(name="plain", gradient_checkpointing=False, **FP32)
    recomputed, _ = run(
        name="recomputed", gradient_checkpointing=True, gradient_checkpointing_interval=2, **FP32
    )
    assert same_files(plain, recomputed)


def test_tread_changes_the_training_alone(run):
    plain, _ = run(name="plain", **FP32)
    routed, _ = run(name="routed", **FP32, **TREAD)
    assert not same_files(plain, routed)
    with pytest.raises(ValueError, match="there is no block 9"):
        run(
            name="bad",
            tread_config={
                "routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 9}]
            },
            **FP32,
        )


@pytest.mark.parametrize(
    "precision", ["int8-quanto", "int4-quanto", "nf4-bnb", "int2-quanto", "fp8-torchao"]
)
def test_quantised_bases_train_and_resume(run, monkeypatch, precision):
    mode = BF16 | {"base_model_precision": precision, "max_train_steps": 3}
    whole, out = run(name="whole", **mode)
    format = in_words(PRECISIONS[precision])
    # tests share a cache, as runs do
    told = (f" in {format}, kept in ", f"base: {format} from")
    assert any(each in out.getvalue() for each in told)
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        run(name="killed", **mode)
    killed, _ = run(name="killed", **mode)
    assert same_files(whole, killed)


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_eight_bit_products_train_and_resume(run, monkeypatch, compute):
    mode = BF16 | {
        "base_model_precision": "int8-quanto",
        "compute_precision": compute,
        "recompute": "selective",
    }
    whole, out = run(name="whole", **mode)
    assert f"products in {'int8' if compute == 'int8' else 'fp8'}" in out.getvalue()
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **mode)
    killed, _ = run(name="killed", **mode)
    assert same_files(whole, killed)
    storage, out = run(name="storage", **mode | {"compute_precision": "auto"})
    assert not same_files(whole, storage) and "products in float32" in out.getvalue()


def test_a_changed_run_is_not_resumed(run):
    run(max_train_steps=2, **FP32)
    with pytest.raises(ValueError, match="lora_rank 3, this run has 4"):
        run(lora_rank=4, **FP32)


def test_damaged_checkpoint_is_named(run, tmp_path):
    run(max_train_steps=2, **FP32)
    (tmp_path / "output" / "checkpoint-2" / "adapter.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="checkpoint-2: damaged"):
        run(**FP32)


def test_tensorboard_is_written(run, tmp_path):
    run(report_to="tensorboard", max_train_steps=2, **FP32)
    assert list((tmp_path / "output" / "logs").rglob("events.out.tfevents*"))


def test_step_seeds_differ():
    seeds = {
        step_seed(1, step, micro, p)
        for step in range(9)
        for micro in (0, 1)
        for p in ("flow", "dropout")
    }
    assert len(seeds) == 36 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("disable", [False, True], ids=["kept", "not-kept"])
def test_new_crops_in_each_epoch_resume_to_the_same_bits(run, monkeypatch, tmp_path, disable):
    dataset = {
        "crop_style": "random",
        "crop_aspect": "random",
        "crop_aspect_buckets": [1.0, 0.5, 2.0],
        "repeats": 1,
        "vae_cache_clear_each_epoch": True,
        "vae_cache_disable": disable,
    }
    steps = {"max_train_steps": 18, "checkpoint_step_interval": 5}

    def train(name):
        caches = {"cache_dir_vae": str(tmp_path / name / "vae")}
        return run(name=name, dataset=dataset | caches, **FP32, **steps)

    whole, out = train("whole")
    assert "photos: images are encoded when batches need them" in out.getvalue()
    metrics = read_metrics(whole.parent / "metrics.jsonl")
    assert metrics[-1]["epoch"] > 2
    kill_at(monkeypatch, 12)
    with pytest.raises(Killed):
        train("killed")
    killed, _ = train("killed")
    assert same_files(whole, killed)
