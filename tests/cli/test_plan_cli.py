"""`fluxfast-train plan`: what it says of configs, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxfast.cli.main import main
from fluxfast.memory.step_time import PARTS

GIB = 2**30
QUICKSTART = Path(__file__).parent.parent / "fixtures" / "quickstart"


@pytest.fixture(autouse=True)
def quickstart(tmp_path, monkeypatch):
    shutil.copytree(QUICKSTART, tmp_path / "config")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plan(capsys):
    def run(*words, status=0):
        assert main(["plan", "config/config.json", *words]) == status
        return capsys.readouterr().out

    return run


@pytest.fixture
def report(plan):
    return lambda *words, status=0: json.loads(plan("--json", *words, status=status))


def test_the_quickstart_on_a_gpu_that_is_too_small(plan):
    text = plan("--gpu", "RTX 3080", status=1)
    assert "does not fit" in text and '"vram_budget": "auto" makes it fit' in text
    assert "streamed through a ring of" in text


def test_it_fits_a_large_one(report):
    found = report("--gpu=h200")
    assert found["fits"] and "changes" not in found
    assert found["vram_needed"] < found["budget"] < 141 * GIB
    assert found["step"]["seconds"] == pytest.approx(sum(found["step"][part] for part in PARTS))
    # every other block is checkpointed there, the first one included
    assert found["choices"]["recompute"] == {"none": 28, "full": 29}
    assert found["choices"]["blocks"] == "resident"
    assert found["compute"] == "same"


def test_without_a_gpu_it_says_where_the_run_fits(report):
    found = report("--base_model_precision=int8-quanto", "--gradient_checkpointing_interval=1")
    assert found["gpu"] is None and "step" not in found
    assert "RTX 4090" in found["fits_on"] and "RTX 4060" not in found["fits_on"]


def test_a_budget_chooses(report):
    found = report("--gpu", "4090", "--vram_budget=8", "--base_model_precision=int8-quanto")
    assert found["vram_needed"] <= 8 * GIB
    assert found["budget"] == 8 * GIB
    assert "streamed" in found["choices"]["blocks"]
    assert found["compute"] == "int8"
    # the format stays the user's
    assert found["disk"]["quantised base"] > 11 * 10**9


def test_what_fits_nowhere_comes_with_what_would_help(report):
    found = report("--gpu", "4090", "--vram_budget=2", status=1)
    assert not found["changes"]["possible"]
    assert any("int4-quanto" in line for line in found["changes"]["why"])


@pytest.mark.parametrize(("gpu", "compute"), [("RTX 3090", "same"), ("RTX 4090", "fp8")])
def test_products_run_in_what_the_gpu_has(report, gpu, compute):
    found = report(
        "--gpu", gpu, "--base_model_precision=fp8-quanto", "--gradient_checkpointing_interval=1"
    )
    assert found["compute"] == compute


def test_the_largest_batch_counts(report, tmp_path):
    # images of the second dataset are not cropped: 1152x960 is the largest of its sizes
    assert report("--gpu=H200")["batch"] == {
        "size": [1152, 960],
        "samples": 1,
        "dataset": "dreambooth-subject",
    }
    twice = report("--gpu=H200", "--train_batch_size=2")
    once = report("--gpu=H200")
    assert twice["vram"]["saved activations"] == pytest.approx(
        2 * once["vram"]["saved activations"], rel=1e-3
    )
    assert twice["step"]["seconds"] > 1.5 * once["step"]["seconds"]


@pytest.mark.parametrize("key", ["vae_cache_ondemand", "vae_cache_disable"])
def test_a_vae_that_encodes_beside_the_steps_counts(report, key):
    plain = report("--gpu=H200")
    beside = report("--gpu=H200", f"--{key}=true")
    # in bf16: 83.8 million parameters, and 640 numbers for each pixel of 1152x960
    vae = 2 * (83_819_683 + 640 * 1152 * 960)
    assert plain["vram"]["VAE"] == 0
    assert beside["vram"] == plain["vram"] | {"VAE": vae}
    assert beside["vram_peak"] == plain["vram_peak"] + vae
    assert report("--gpu=H200", f"--{key}=true", "--vae_dtype=fp32")["vram"]["VAE"] == 2 * vae


def test_accumulation_makes_steps_longer_and_adds_gradients_up(report):
    once, four = report("--gpu=H200"), report("--gpu=H200", "--gradient_accumulation_steps=4")
    # the optimiser updates once
    passes = once["step"]["seconds"] - once["step"]["update"]
    assert four["step"]["seconds"] == pytest.approx(4 * passes + once["step"]["update"])
    # those of a micro-batch are added to those of all
    assert four["vram"] == once["vram"] | {"gradients": 2 * once["vram"]["gradients"]}


def test_images_that_are_there_are_counted(report, tmp_path):
    folder = tmp_path / "datasets" / "dreambooth-subject"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    disk = report("--gpu=H200")["disk"]
    # three images at up to 1152x960 and up to 576x512, and a prompt for either dataset
    assert (
        3 * 16 * 2 * (144 * 120 + 64 * 64) <= disk["latents"] < 3 * 16 * 2 * (144 * 120 + 72 * 72)
    )
    assert disk["text embeddings"] == 2 * (512 * 4096 + 768) * 2


def test_a_lora_to_go_on_with_says_its_own_rank_and_modules(report, tmp_path):
    name = "transformer.single_transformer_blocks.7.proj_out"
    halves = {
        "A": torch.zeros(64, 15360, dtype=torch.bfloat16),
        "B": torch.zeros(3072, 64, dtype=torch.bfloat16),
    }
    save_file(
        {f"{name}.lora_{half}.weight": tensor for half, tensor in halves.items()},
        tmp_path / "lora.safetensors",
    )
    from_file = report("--gpu=h200", "--init_lora=lora.safetensors", "--lora_rank=4")
    as_told = report("--gpu=h200", "--lora_rank=64", "--flux_lora_target=nano")
    assert from_file["disk"]["checkpoints"] == as_told["disk"]["checkpoints"] > 0


def test_tread_and_the_dataloader_that_is_missing(report):
    plain = report("--gpu=H200")
    route = '{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}'
    assert (
        report("--gpu=H200", f"--tread_config={route}")["step"]["seconds"]
        < 0.75 * plain["step"]["seconds"]
    )
    Path("config/multidatabackend.json").unlink()
    assert "is not there" in report("--gpu=H200")["notes"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "RTX 9999"], "RTX 9999"),
        (["--gpu"], "--gpu needs a name"),
        (["--vram_budget=0"], "vram_budget"),
        (["--vram_budget=some"], "vram_budget"),
        (["--lora_rnak=4"], "lora_rank"),
    ],
)
def test_what_is_refused(capsys, words, message):
    assert main(["plan", "config/config.json", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_table_of_gpus(capsys):
    assert main(["plan", "--gpu", "list"]) == 0
    assert "RTX 3080" in capsys.readouterr().out
