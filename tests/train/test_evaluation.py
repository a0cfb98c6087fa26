"""The evaluation loss, what it decides, and CLIP's score."""

import io
import json
import re

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from kill_cases import Killed, kill_at, same_files
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_trainer import BF16, FP32, TREAD

from fluxfast.train.evaluation import POOLED, Evaluator
from fluxfast.train.events import read_evaluations, read_metrics
from fluxfast.train.intervals import Interval
from fluxfast.train.loss_chart import plot_loss
from fluxfast.train.run_events import read_events
from fluxfast.train.saving import best_steps, evaluations_since_best


@pytest.fixture
def held_out(workspace, tmp_path):
    """Entries of held-out datasets by id: the same photographs in another size."""

    def entry(id="kept", **keys):
        return {
            "id": id, "type": "local", "dataset_type": "eval",
            "instance_data_dir": str(workspace / "images"), "caption_strategy": "textfile",
            "resolution": 48, "resolution_type": "pixel_area", "crop": True,
            "crop_style": "center", "crop_aspect": "square",
            "cache_dir_vae": str(tmp_path / "cache" / id),
        } | keys  # fmt: skip

    return entry


def losses(output):
    return [(e["step"], e[POOLED]) for e in read_evaluations(output / "evaluations.jsonl")]


def by_hand(trainer, dataset, timesteps, images):
    """The evaluation loss with diffusers' own model and pipeline, image by image."""
    (prepared,) = [each for each in trainer.data.prepared.held_out if each.id == dataset]
    folder = trainer.config.pretrained_model_name_or_path
    model = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = trainer.parts.scheduler
    found = []
    for sample in prepared.samples[:images]:
        x0 = prepared.latents(sample)[None].float()
        embeds = trainer.data.prepared.prompts.get(sample.captions[0])
        _, channels, height, width = x0.shape
        pack = FluxPipeline._pack_latents
        tokens = (height // 2) * (width // 2)
        mu = calculate_shift(
            tokens,
            scheduler.config["base_image_seq_len"],
            scheduler.config["max_image_seq_len"],
            scheduler.config["base_shift"],
            scheduler.config["max_shift"],
        )
        even = np.linspace(1.0, 1 / timesteps, timesteps)
        scheduler.set_timesteps(sigmas=even, mu=mu)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        ids = FluxPipeline._prepare_latent_image_ids(
            1, height // 2, width // 2, "cpu", torch.float32
        )
        for sigma in scheduler.sigmas[:-1]:
            noisy = (1 - sigma) * x0 + sigma * noise
            text = embeds["prompt_embeds"][None].float()
            with torch.no_grad():
                answer = model(
                    hidden_states=pack(noisy, 1, channels, height, width),
                    timestep=sigma[None],
                    guidance=torch.ones(1),
                    encoder_hidden_states=text,
                    pooled_projections=embeds["pooled_prompt_embeds"][None].float(),
                    txt_ids=torch.zeros(text.shape[1], 3),
                    img_ids=ids,
                ).sample
            target = pack(noise - x0, 1, channels, height, width)
            found.append(float((answer - target).square().mean()))
    return sum(found) / len(found)


def test_the_loss_is_the_one_computed_by_hand(trainer, held_out):
    built = trainer(others=[held_out()], eval_timesteps=5, num_eval_images=2, **FP32)
    evaluator = Evaluator(
        built.data.prepared, built.objective, built.parts.scheduler,
        images=2, timesteps=5, pooled=False, combine_references=False, say=print,
    )  # fmt: skip
    before = torch.get_rng_state()
    found = evaluator.run(0, Console(file=io.StringIO()))
    assert torch.equal(before, torch.get_rng_state()) and built.transformer.training
    assert found.keys() == {"loss/val/kept", POOLED}
    # fp32 in another order of sums
    assert found[POOLED] == pytest.approx(by_hand(built, "kept", 5, 2), rel=1e-5)
    assert evaluator.run(7, Console(file=io.StringIO())) == found


def test_a_run_evaluates_with_its_checkpoints_and_trains_to_the_same(run, held_out, tmp_path):
    plain, _ = run(name="plain", **FP32)
    lora, out = run(others=[held_out(), held_out("more", resolution=64)], eval_timesteps=2, **FP32)
    # neither the data nor the random states of training know of it
    assert same_files(plain, lora)
    lines = read_evaluations(tmp_path / "output" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all(line.keys() == {"step", "loss/val/kept", "loss/val/more", POOLED} for line in lines)
    for line in lines:
        pooled = (line["loss/val/kept"] + line["loss/val/more"]) / 2
        assert line[POOLED] == pytest.approx(pooled)
    assert len({line[POOLED] for line in lines}) == 4
    assert re.search(r"step 6: held out: kept \d\.\d{4}, more \d\.\d{4}", out.getvalue())
    assert {line["dataset"] for line in read_metrics(tmp_path / "output" / "metrics.jsonl")} == {
        "photos"
    }


def test_a_step_is_told_before_its_evaluation(run, held_out):
    lora, _ = run(others=(held_out(),), eval_steps_interval=2, max_train_steps=4)
    told = [
        (event["type"], event.get("step", event.get("progress", {}).get("current")))
        for event in read_events(lora.parent / "events.jsonl")
        if event["type"] in ("training.status", "training.validation")
    ]
    # else the rate of a step's time would be that of no time at all
    assert told[:7] == [
        ("training.validation", 0), ("training.status", 1), ("training.status", 2),
        ("training.validation", 2), ("training.status", 3), ("training.status", 4),
        ("training.validation", 4),
    ]  # fmt: skip


MODES = {
    "bf16-tread": BF16 | TREAD | {"gradient_accumulation_steps": 2},
    "nf4-ahead": BF16 | {"base_model_precision": "nf4-bnb", "modulation_ahead": True},
    "streamed": FP32 | {"enable_group_offload": True},
    "masked-text": BF16 | {"flux_attention_masked_training": True},
    "few-steps": FP32 | {
        "model_flavour": "schnell", "flux_fast_schedule": True, "disable_assistant_lora": True,
        "validation_guidance": 0.0,
    },
    "guided": FP32 | {"flux_guidance_mode": "random-range", "loss_type": "huber"},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_in_every_mode_training_goes_on_as_without(run, held_out, tmp_path, mode):
    mode = {**mode, "max_train_steps": 3}
    plain, _ = run(name="plain", **mode)
    found = []
    for name in ("one", "two"):
        lora, out = run(name=name, others=[held_out()], eval_timesteps=2, **mode)
        assert same_files(plain, lora) and "failed" not in out.getvalue()
        found.append(losses(tmp_path / name))
    # always the same numbers
    assert found[0] == found[1] and [step for step, _ in found[0]] == [0, 2, 3]


def test_references_of_held_out_images(run, references, held_out, workspace, tmp_path):
    """Kontext: they are seen in the evaluation, and drawn with."""
    theirs = references(id="theirs") | {"source_dataset_id": "kept"}
    others = [references(), held_out(), theirs]
    mode = FP32 | {"model_flavour": "kontext", "max_train_steps": 1, "eval_timesteps": 1}
    _, out = run(
        **mode, others=others, validation_disable=False, eval_dataset_id="kept",
        num_eval_images=2, validation_num_inference_steps=1, validation_resolution="64x48",
    )  # fmt: skip
    assert "failed" not in out.getvalue()
    (base, _) = losses(tmp_path / "output")
    names = {p.name.split("_")[2] for p in (tmp_path / "output").rglob("step_000001_*.png")}
    assert names == {"kept"}
    # another reference gives another loss
    for path in (tmp_path / "theirs").glob("*.png"):
        Image.new("RGB", Image.open(path).size, "white").save(path)
    run(**mode, name="other", others=others, num_eval_images=2)
    assert losses(tmp_path / "other")[0] != base


def test_pooled_and_disabled(run, held_out, tmp_path):
    two = [held_out(), held_out("more", resolution=64)]
    run(others=two, eval_timesteps=1, eval_dataset_pooling=True, eval_steps_interval=3)
    lines = read_evaluations(tmp_path / "output" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert all(line.keys() == {"step", POOLED} for line in lines)
    run(name="off", others=two, eval_loss_disable=True, max_train_steps=1)
    assert not (tmp_path / "off" / "evaluations.jsonl").exists()


def test_a_killed_run_has_each_evaluation_once(run, held_out, monkeypatch, tmp_path):
    settings = {"others": [held_out()], "eval_timesteps": 1, "eval_steps_interval": 1, **FP32}
    run(name="whole", **settings)
    for step in (2, 6):
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            run(**settings)
    run(**settings)
    assert losses(tmp_path / "output") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "whole")] == list(range(7))


def test_the_best_checkpoint_stays(run, held_out, tmp_path):
    # a rate that ruins the LoRA, so that the first evaluation is the best of those with one
    run(
        others=[held_out()], eval_timesteps=2, learning_rate=0.3, lr_scheduler="constant",
        checkpoints_total_limit=1, checkpoints_keep_best=1, eval_steps_interval=1,
        checkpoint_step_interval=4, max_train_steps=8, **FP32,
    )  # fmt: skip
    found = losses(tmp_path / "output")
    (best,) = best_steps(found, 1)
    kept = {path.name for path in (tmp_path / "output").glob("checkpoint-*")}
    assert best not in (4, 8) and kept == {f"checkpoint-{best}", "checkpoint-8"}


def test_a_run_without_progress_ends_early(run, held_out, tmp_path):
    lora, out = run(
        others=[held_out()], eval_timesteps=2, learning_rate=0.3, lr_scheduler="constant",
        early_stopping_patience=3, eval_steps_interval=1, max_train_steps=500, **FP32,
    )  # fmt: skip
    found = losses(tmp_path / "output")
    assert evaluations_since_best(found) == 3 and found[-1][0] < 100
    told = re.sub(r"\s+", " ", out.getvalue())
    assert f"stopped early at step {found[-1][0]}" in told and lora.exists()
    assert (tmp_path / "output" / f"checkpoint-{found[-1][0]}").is_dir()


def test_which_are_best():
    found = [(0, 0.1), (2, 0.5), (4, 0.3), (6, 0.3), (8, 0.4)]
    assert best_steps(found, 2) == [4, 6] and best_steps([], 3) == []
    assert evaluations_since_best(found) == 4 and evaluations_since_best([]) == 0
    assert evaluations_since_best(found[1:]) == 2


def test_intervals():
    assert [s for s in range(1, 9) if Interval(3).is_due(s, 1, ends_epoch=False)] == [3, 6]
    by_epoch = Interval(epochs=2)
    assert [e for e in range(1, 6) if by_epoch.is_due(7, e, ends_epoch=True)] == [2, 4]
    assert not by_epoch.is_due(7, 2, ends_epoch=False)
    late = Interval(1, after_step=4, after_epoch=2)
    assert not late.is_due(3, 9, ends_epoch=True) and late.is_due(4, 9, ends_epoch=True)
    assert not late.is_due(5, 2, ends_epoch=False) and late.is_due(5, 2, ends_epoch=True)
    assert late.is_due(5, 3, ends_epoch=False)


def test_an_evaluation_that_fails_is_told(run, held_out, monkeypatch, tmp_path):
    def fail(self, step, console):
        raise RuntimeError(f"no memory at step {step}")

    monkeypatch.setattr(Evaluator, "run", fail)
    lora, out = run(others=[held_out()], max_train_steps=2)
    assert lora.exists() and "evaluation failed, the run goes on: no memory" in out.getvalue()


def test_a_lost_image_is_left_out(trainer, held_out, tmp_path):
    built = trainer(others=[held_out()], **FP32)
    said = []
    evaluator = Evaluator(
        built.data.prepared, built.objective, built.parts.scheduler,
        images=4, timesteps=1, pooled=True, combine_references=False, say=said.append,
    )  # fmt: skip
    whole = evaluator.run(0, Console(file=io.StringIO()))
    dataset = built.data.prepared.held_out[0]
    for path in (tmp_path / "cache" / "kept").rglob("*.safetensors"):
        if torch.equal(load_file(path)["latents"], dataset.latents(dataset.samples[0])):
            path.write_bytes(b"")
            break
    for _ in range(2):
        assert evaluator.run(0, Console(file=io.StringIO()))[POOLED] != whole[POOLED]
    assert len(said) == 1 and dataset.samples[0].file in said[0]


def test_both_losses_are_in_the_chart(tmp_path):
    metrics = [{"step": i, "loss": 1 / i, "learning_rate": 1e-4} for i in range(1, 60)]
    plot_loss(metrics, tmp_path / "one.png")
    plot_loss(metrics, tmp_path / "two.png", [{"step": 0, POOLED: 0.9}, {"step": 50, POOLED: 0.4}])

    def red(name):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        return ((pixels[..., 0] > 180) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)).sum()

    assert red("one.png") == 0 < red("two.png")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP of random weights whose tokenizer knows letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    side = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **side, "num_hidden_layers": 1, "vocab_size": 64, "eos_token_id": 1,
            "bos_token_id": 0, "pad_token_id": 1,
        },
        vision_config={**side, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    letters = [chr(ord("a") + i) for i in range(26)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)]
    vocab = {name: i for i, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert Tokenizer(BPE(vocab, []))
    tokenizer = CLIPTokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    )
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_scores_are_those_of_transformers(run, tiny_clip, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    settings = {
        "validation_disable": False, "validation_step_interval": 0,
        "validation_prompt": "a red cup", "validation_resolution": "64x48",
        "validation_num_inference_steps": 1, "max_train_steps": 2, "num_validation_images": 2,
        "evaluation_type": "clip",
        "pretrained_evaluation_model_name_or_path": str(tiny_clip),
    }  # fmt: skip
    run(**settings)
    base, last = read_evaluations(tmp_path / "output" / "evaluations.jsonl")
    assert (base["step"], last["step"]) == (0, 2)
    model, processor = (
        CLIPModel.from_pretrained(tiny_clip),
        CLIPProcessor.from_pretrained(tiny_clip),
    )
    scores = []
    for index in (0, 1):
        path = (
            tmp_path
            / "output"
            / "validation_images"
            / f"step_000000_validation_base_{index}_64x48.png"
        )
        inputs = processor(text=["a red cup"], images=Image.open(path), return_tensors="pt")
        with torch.no_grad():
            # the model's own logits are the cosine times its scale
            cosine = model(**inputs).logits_per_image / model.logit_scale.exp()
        scores.append(100 * max(0.0, float(cosine)))
    assert base["clip/mean"] == pytest.approx(np.mean(scores), rel=1e-4, abs=1e-4)
    assert base["clip/min"] == pytest.approx(min(scores), rel=1e-4, abs=1e-4)
    assert base["clip/max"] == pytest.approx(max(scores), rel=1e-4, abs=1e-4)
    assert base["clip/std"] == pytest.approx(np.std(scores), rel=1e-2, abs=1e-4)
