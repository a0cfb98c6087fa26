"""`fluxfast-train plan`: what it says of configs, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxfast.cli.main import main
from fluxfast.memory.gpus import GPUS
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
    assert "streamed through a ring of" in " ".join(text.split())


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
    write_images(tmp_path / "datasets" / "dreambooth-subject", *[(1024, 1024)] * 3)
    disk = report("--gpu=H200")["disk"]
    # three images at two sizes, and a prompt for either dataset
    assert disk["latents"] == 3 * 16 * 2 * (128 * 128 + 64 * 64)
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
        (["--gpu", "RTX 4900"], "did you mean RTX 4090"),
        (["--gpu"], "--gpu needs a value"),
        (["--vram"], "--vram needs a value"),
        (["--vram=much"], "--vram expects GiB"),
        (["--vram=-3"], "--vram expects GiB"),
        (["--vram_budget=0"], "vram_budget"),
        (["--vram_budget=some"], "vram_budget"),
        (["--lora_rnak=4"], "lora_rank"),
    ],
)
def test_what_is_refused(capsys, words, message):
    assert main(["plan", "config/config.json", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--verbose",)])
def test_the_table_of_gpus(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--gpu", "list", *words]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "RTX 3080" in text and max(map(len, lines)) <= 80
    for gpu in GPUS:
        (row,) = [line for line in lines if line.startswith(f"{gpu.name}  ")]
        assert f" {gpu.memory:g} " in row and f" {gpu.bandwidth:g} " in row
    assert ("whitepaper" in text) == bool(words)


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize(
    "words",
    [
        ["--gpu=RTX 3080"],
        ["--gpu=h200", "--verbose"],
        ["--gpu=4090", "--vram_budget=2"],
        ["--gpu=T4"],
        ["--vram=9"],
        ["--vram_budget=auto", "--base_model_precision=int8-quanto", "--gpu=3060"],
        [],
    ],
)
def test_lines_fit_the_terminal(monkeypatch, capsys, columns, words):
    monkeypatch.setenv("COLUMNS", columns)
    main(["plan", "config/config.json", *words])
    lines = capsys.readouterr().out.splitlines()
    assert 80 - 20 < max(map(len, lines)) <= min(int(columns), 100)
    # nothing of the engine's own words without what they mean
    assert not any(line.startswith(("ring", "working set", "saved act")) for line in lines)


def test_a_card_that_is_not_in_the_table(plan, report):
    """Of its memory alone everything but the time is known; with --gpu, the time is that card's."""
    int8 = ["--base_model_precision=int8-quanto", "--vram_budget=auto"]
    found = report("--vram=12", *int8)
    assert found["gpu"] == {"name": "a card with 12 GiB", "memory": 12, "screen": True}
    assert found["budget"] == (12 - 0.25 - 1) * GIB and found["vram_needed"] <= found["budget"]
    assert "step" not in found and "training_seconds" not in found["run"]
    assert "not known of such a card" in " ".join(plan("--vram", "12", *int8).split())
    named = report("--vram", "12GiB", "--gpu=4090", *int8)
    assert named["budget"] == found["budget"] and named["step"]["seconds"] > 0
    assert named["gpu"]["memory"] == 12 < report("--gpu=4090", *int8)["gpu"]["memory"]
    small = report("--vram=2", status=1)
    assert not small["fits"] and "step" not in small["changes"]


def test_a_card_that_fluxfast_does_not_run_on(plan, report):
    text = " ".join(plan("--gpu", "RTX 2080 Ti", status=1).split())
    assert "It does not run: RTX 2080 Ti has no tensor cores for bf16" in text
    found = report("--gpu=t4", status=1)
    assert found["vram_needed"] > 0 and "step" not in found and "T4" not in found["fits_on"]


def test_what_is_left_for_the_screen(plan, report):
    """vram_reserve is a part of the budget "auto", and the text says so."""
    auto = ["--base_model_precision=int8-quanto", "--vram_budget=auto"]
    auto += ["--text_encoder_2_precision=int8-quanto"]
    for words, left in (((), 1), (("--vram_reserve=1.5",), 1.5)):
        found = report("--gpu=4060", *auto, *words)
        assert found["reserve"] == left and found["budget"] == (8 - 0.25 - left) * GIB
        assert f'"vram_reserve" leaves {left} GiB free' in " ".join(
            plan("--gpu=4060", *auto, *words).split()
        )
    assert report("--gpu=h100", *auto)["reserve"] == 0.25
    assert report("--gpu=h100", *auto, "--vram_budget=20")["reserve"] is None


def write_images(folder, *sizes):
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{number}.png")


def test_only_sizes_that_the_images_have(report, tmp_path):
    """The largest batch is one that occurs, and an epoch's batches are counted."""
    folder = tmp_path / "datasets"
    write_images(folder / "dreambooth-subject", (1100, 1100), (1200, 1200), (1024, 1400))
    write_images(folder / "pseudo-camera-10k", *[(600, 700)] * 5)
    found = report("--gpu=H200", "--max_train_steps=0", "--num_train_epochs=2")
    assert found["batch"] == {
        "size": [896, 1216],
        "samples": 1,
        "dataset": "dreambooth-subject",
    }
    assert not found["notes"]
    # the folder of three is there twice, each with 1000 further passes
    per_epoch = 5 + 2 * 3 * 1001
    assert found["run"]["steps_per_epoch"] == per_epoch and found["run"]["steps"] == 2 * per_epoch
    assert found["run"]["images"] == 5 + 2 * 3
    # most batches are of a smaller image than the largest
    assert found["run"]["mean_step_seconds"] < 0.8 * found["step"]["seconds"]
    assert found["run"]["training_seconds"] == pytest.approx(
        found["run"]["steps"] * found["run"]["mean_step_seconds"]
    )
    latents = 5 * 64 * 64 + 2 * 128 * 128 + 112 * 152 + 2 * 64 * 64 + 56 * 72
    assert found["disk"]["latents"] == pytest.approx(latents * 16 * 2, rel=0.02)
    assert not list(tmp_path.glob("cache/**/*.safetensors")) and not Path("cache").exists()


def test_images_that_none_can_be_used_of(report, tmp_path):
    write_images(tmp_path / "datasets" / "dreambooth-subject", (64, 64))
    (note, *_) = report("--gpu=H200")["notes"]
    assert note.startswith("dreambooth-subject: no usable image") and "1 smaller than" in note


def test_the_autoencoder_counts_with_what_it_works_with(report):
    small = ["--vae_enable_tiling=false", "--vae_batch_size"]
    one, four = (report("--gpu=H200", f"{small[1]}={n}", small[0]) for n in (1, 4))
    # in bf16: 640 numbers for each pixel of the largest image
    more = 3 * 640 * 1152 * 960 * 2
    assert four["preparing"]["autoencoder"] - one["preparing"]["autoencoder"] == more
    text = four["preparing"]["text encoders"]
    assert text == 2 * (4_762_310_656 + 123_060_480)
    # embeddings stay as they are
    halved = report("--gpu=H200", "--text_encoder_2_precision=int8-quanto")
    saved = text - halved["preparing"]["text encoders"]
    assert 0.98 < saved / 4_630_511_616 < 1


def test_encoders_that_do_not_fit_a_card_whose_steps_do(plan, report):
    """9.1 GiB come before the steps, and are no matter of "vram_budget"."""
    streamed = ["--gpu=RTX 3080", "--base_model_precision=int8-quanto", "--vram_budget=auto"]
    found = report(*streamed, status=1)
    assert found["fits"] and not found["encoders_fit"]
    text = " ".join(plan(*streamed, status=1).split())
    assert "The steps fit: a step needs" in text and "9.10 GiB for the text encoders" in text
    halved = "--text_encoder_2_precision=int8-quanto"
    assert report(*streamed, halved)["encoders_fit"]
    assert "It fits: a step needs" in plan(*streamed, halved)


def test_what_validation_loads_beside_the_model(report):
    plain = report("--gpu=H200")["validating"]
    assert plain == {"autoencoder": 2 * 83_819_683}
    more = report("--gpu=H200", "--evaluation_type=clip", "--validation_preview=true")
    assert more["validating"]["CLIP model of the scores"] == 4 * 427_616_513
    assert more["validating"]["preview model"] < 10 * 2**20
    assert not report("--gpu=H200", "--validation_disable=true")["validating"]
