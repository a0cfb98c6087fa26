"""What a start says of the run before its first step."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.plan import predict
from fluxfast.model.apply import Choices
from fluxfast.train import overview, pace
from fluxfast.train.intervals import Interval
from fluxfast.train.run_record import read_run_record

FP32 = {"optimizer": "torch-adamw", "mixed_precision": "no", "lora_dropout": 0.0}
DRAWS = {
    "validation_disable": False, "validation_prompt": "a red cup", "num_validation_images": 2,
    "validation_resolution": "64x48,64", "validation_step_interval": 3,
}  # fmt: skip


def rows_of(trainer, done=0):
    return dict(
        overview.rows(trainer.config, trainer.data, trainer.parts, steps=trainer.steps, done=done)
    )


def test_every_line(trainer):
    built = trainer(**FP32, **DRAWS, gradient_accumulation_steps=3, learning_rate=2e-4)
    told = rows_of(built)
    assert list(told) == [
        "steps", "time", "trains", "learning", "timesteps", "kernels", "saves", "draws", "folder"
    ]  # fmt: skip
    # four images, 1 + 20 times, in 42 batches of two
    assert told["steps"] == "6 steps, each of 3 x 2 images: 0.43 epochs of 84 (4 images x 21)"
    count = sum(p.numel() for group in built.optimizer.param_groups for p in group["params"])
    layers = sum(name.endswith("lora_A.default") for name, _ in built.transformer.named_modules())
    megabytes = 4 * count / 1e6
    assert told["trains"] == (
        f"LoRA of rank 3 on {layers} layers: {count:,} parameters, {megabytes:.1f} MB"
    )
    assert told["learning"].startswith("torch-adamw at a rate of 0.0002 (")
    assert told["timesteps"].startswith("sigmoid, no shift")
    assert told["kernels"].endswith(", products in float32")
    assert told["saves"] == "every 2 steps and at the end; the newest 5 stay"
    assert told["draws"] == (
        "1 prompt at 64x48 and 64x64, 2 images each, before the first step, every 3 steps and at "
        "the end"
    )
    assert told["folder"] == str(built.config.output_dir)
    # a run that goes on has drawn with the base before
    later = rows_of(built, done=4)
    assert later["steps"].startswith("2 of 6 steps left, each of 3 x 2 images: ")
    assert "before the first step" not in later["draws"]


def test_the_size_is_that_of_the_file(run):
    lora, out = run(**FP32, max_train_steps=1, lora_rank=64)
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("trains")]
    told = float(line.split(", ")[-1].strip().removesuffix(" MB"))
    # the rest of the file is its header
    assert told == pytest.approx(lora.stat().st_size / 1e6, rel=0.1)


def test_epochs_and_several_datasets(trainer, workspace):
    held = {
        "id": "held", "type": "local", "dataset_type": "eval", "caption_strategy": "textfile",
        "instance_data_dir": str(workspace / "images"), "resolution": 64,
        "cache_dir_vae": str(workspace / "cache" / "held"),
    }  # fmt: skip
    more = held | {"id": "more", "dataset_type": "image", "repeats": 2, "train_batch_size": 1}
    told = rows_of(
        trainer(
            **FP32, others=[held, more], max_train_steps=None, num_train_epochs=2,
            checkpoint_step_interval=0, checkpoint_epoch_interval=1, eval_steps_interval=500,
        )
    )  # fmt: skip
    assert told["steps"] == (
        "108 steps, each of 1 or 2 images: 2.00 epochs of 96 (8 images in 2 datasets)"
    )
    assert told["saves"].startswith("every epoch and at the end")
    assert told["evaluates"] == "the loss of 4 held-out images before the first step and at the end"


def test_the_time_is_the_prediction_of_the_step(trainer):
    built = trainer(**FP32, gradient_accumulation_steps=2)
    gpu, workload = find_gpu("RTX 4090"), built.parts.facts.workload
    choices = Choices(recompute=("none",) * workload.sizes.blocks)
    parts = replace(built.parts, choices=choices, facts=replace(built.parts.facts, gpu=gpu))
    step = predict(workload, choices, gpu)
    seconds = 2 * step.total - step.update
    (told,) = [
        text
        for name, text in overview.rows(built.config, built.data, parts, steps=90, done=30)
        if name == "time"
    ]
    assert told.startswith(f"about {overview.duration(60 * seconds)} at {seconds:.2f} s a step")
    assert "predicted from assumed rates" in told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (3540, "59 min"), (3580, "1 h 0 min"),
     (100_000, "27 h 47 min")],
)  # fmt: skip
def test_durations(seconds, told):
    assert overview.duration(seconds) == told


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        (Interval(), []),
        (Interval(steps=10), []),
        (Interval(steps=9), ["every 9 steps"]),
        (Interval(steps=1, epochs=1), ["after each step", "every epoch"]),
        (Interval(epochs=3), ["every 3 epochs"]),
    ],
)
def test_intervals_in_words(interval, told):
    """Of ten steps; what is due with the last one happens at the end anyway."""
    assert interval.told(10) == told


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_terminal(trainer, tmp_path, width):
    built = trainer(**FP32, **DRAWS, name="a folder [of] a long name" * 6)
    out = io.StringIO()
    overview.show(
        Console(file=out, width=width), built.config, built.data, built.parts, steps=9999, done=0
    )
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    # a path is folded, and loses nothing
    path = "".join(str(built.config.output_dir).split())
    assert path in "".join(out.getvalue().split())


def test_a_start_tells_no_news_of_defaults(run):
    """Which choices were made, and why, run.json says."""
    lora, out = run(**FP32, max_train_steps=1)
    before_the_first_step = out.getvalue().partition("folder")[0]
    assert "SimpleTuner" not in before_the_first_step and "INFO" not in before_the_first_step
    notes = [line for line in before_the_first_step.splitlines() if line.startswith("·")]
    # of this machine and of these images
    expected = ("checks of", "cache: ", "enlarged")
    assert [note for note in notes if not any(part in note for part in expected)] == []
    assert read_run_record(lora.parent).choices["compute"]


def test_loading_shows_no_bars_of_other_libraries(run, capfd, tmp_path):
    texts = {"cache_dir_vae": str(tmp_path / "vae")}
    run(**FP32, max_train_steps=1, dataset=texts, validation_disable=False, validation_prompt="new")
    assert capfd.readouterr().err == ""


def test_the_time_on_a_cpu_is_a_forward_pass_and_changes_nothing(trainer, run):
    built = trainer(**FP32, max_train_steps=40, gradient_accumulation_steps=3)
    before = torch.get_rng_state(), [p.clone() for p in built.transformer.parameters()]
    how = {"steps": 40, "done": 4}
    parts = built.parts
    forward = pace.forward_seconds(built.data, built.objective, parts, **how)
    assert 0 < forward < 60
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(map(torch.equal, built.transformer.parameters(), before[1]))
    assert all(p.grad is None for p in built.transformer.parameters())
    told = dict(overview.rows(built.config, built.data, parts, **how, forward=2.0))["time"]
    # three micro-batches; all blocks compute their forward pass twice, the backward takes two
    assert told == "very roughly 14 min, by a forward pass that took 2 s; the bar tells it better"
    short = pace.forward_seconds(built.data, built.objective, parts, steps=9, done=0)
    assert short is None
    # a run that is timed trains to the same bits as one that is not
    monkeypatch = pytest.MonkeyPatch()
    timed, _ = run(name="timed", max_train_steps=10)
    with monkeypatch.context() as context:
        context.setattr(pace, "forward_seconds", lambda *args, **how: None)
        plain, _ = run(name="plain", max_train_steps=10)
    assert timed.read_bytes() == plain.read_bytes()
