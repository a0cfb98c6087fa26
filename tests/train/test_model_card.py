"""The card and the config of an adapter on the Hub: what they say, and what they never say."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from config_helpers import load
from fluxfast.config.flavours import FLAVOURS
from fluxfast.train.hub_folder import gather
from fluxfast.train.image_files import drawn_images, file_name, file_words, newest_images
from fluxfast.train.model_card import Picture, model_card
from fluxfast.train.run_record import DatasetRow, Prompt, RunRecord
from secret_cases import HIDDEN, PATHS, SECRETS, full_of

# a nickname that is a path, in files' names
(CAT,) = file_words(["/home/jane/cat"]).values()
RECORD = RunRecord(
    steps=100,
    seed=7,
    versions={"fluxfast": "1.2"},
    prompts=(Prompt(nickname="validation", file="validation", prompt="a <b>cat</b> | `x`"),),
    datasets=(
        DatasetRow(id="my | cats", images=12, repeats=3, resolution="512 (pixel)", cropped=True,
                   prompt="zwx cat"),
        DatasetRow(id="more", kind="mask", images=2),
    ),
)  # fmt: skip


LOKR = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 16, "linear_alpha": 1, "factor": 4}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def card_of(record=RECORD, pictures=(), step=100, read_by=("diffusers",), **options):
    text = model_card(
        load(push_to_hub=True, **options),
        record,
        repository="me/cat",
        file="pytorch_lora_weights.safetensors",
        read_by=read_by,
        step=step,
        pictures=pictures,
    )
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def code_in(body):
    """The example's text, which is Python."""
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    return code


def test_the_front_matter_is_the_hubs():
    front, body = card_of(
        model_flavour="dev", pictures=[Picture("images/000_64x64.png", "a <b>cat</b> | `x`")]
    )
    assert front == {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        "base_model": "black-forest-labs/FLUX.1-dev",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["flux", "flux-diffusers", "lora", "template:diffusion-lora",
                 "not-for-all-audiences"],
        "widget": [{"text": "a <b>cat</b> | `x`", "output": {"url": "images/000_64x64.png"}}],
        "instance_prompt": "zwx cat",
    }  # fmt: skip
    assert "<Gallery />" in body
    assert "- a &lt;b&gt;cat&lt;/b&gt; \\| \\`x\\`" in body


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_has_a_licence_and_code(flavour):
    front, body = card_of(model_flavour=flavour, flux_fast_schedule=flavour == "schnell")
    assert front["license"] == ("apache-2.0" if flavour in ("schnell", "libreflux") else "other")
    assert ("license_link" in front) == (front["license"] == "other")
    assert front["base_model"] == FLAVOURS[flavour].repository
    code = code_in(body)
    assert ("guidance_scale=0.0" in code) == (not FLAVOURS[flavour].takes_guidance)
    assert ("FluxKontextPipeline" in code) == (flavour == "kontext")
    assert "load_lora_weights('me/cat', weight_name=" in code


def test_base_models():
    own = {"pretrained_model_name_or_path": "someone/their-flux"}
    front, body = card_of(**own)
    assert front["base_model"] == "someone/their-flux"
    assert "from_pretrained('someone/their-flux'" in code_in(body)
    front, body = card_of(**own, pretrained_transformer_model_name_or_path="other/transformer")
    assert front["base_model"] == "other/transformer"
    assert "from_pretrained('someone/their-flux'" in code_in(body)
    front, body = card_of(pretrained_model_name_or_path="/models/flux", model_flavour="dev")
    assert front["base_model"] == FLAVOURS["dev"].repository
    assert "/models" not in body


def test_settings_and_datasets():
    _, body = card_of(
        optimizer="torch-adamw", learning_rate=3e-5, lora_rank=8, lora_alpha=4, step=60,
        train_batch_size=2, gradient_accumulation_steps=3, base_model_precision="int8-quanto",
    )  # fmt: skip
    for row in (
        "| optimiser | torch-adamw |", "| learning rate | 3e-05 |", "| rank | 8 |",
        "| alpha | 4.0 |", "| steps | 60 of 100 |", "| batch | 2 x 3 accumulated |",
        "| base's precision | int8-quanto |", "| seed | 7 |",
        "| my \\| cats | image | 12 | 3 | 512 (pixel) | yes |",
    ):  # fmt: skip
        assert row in body
    assert "trained for 60 of 100 optimiser steps with fluxfast 1.2." in body


def test_who_reads_the_file_decides_how_it_is_loaded(tmp_path):
    lycoris = tmp_path / "lycoris.json"
    lycoris.write_text(json.dumps(LOKR))
    options = {"lora_type": "lycoris", "lycoris_config": str(lycoris)}
    front, body = card_of(**options)
    assert "lycoris" in front["tags"]
    assert "pipeline.transformer.load_lora_adapter('me/cat', weight_name=" in code_in(body)
    assert "| rank |" not in body
    _, body = card_of(**options, read_by=["ComfyUI", "lycoris-lora"])
    assert "create_lycoris_from_weights(1.0, file, pipeline.transformer)" in code_in(body)
    assert "Read by fluxfast, ComfyUI, lycoris-lora." in body
    _, body = card_of(read_by=["ComfyUI"])
    assert "```" not in body
    assert "models/loras" in body
    _, body = card_of(read_by=[])
    assert body.endswith("Read by fluxfast.\n")


def test_the_note_and_the_audience():
    front, body = card_of(model_card_safe_for_work=True, model_card_note="# My note\n\n*hello*")
    assert "not-for-all-audiences" not in front["tags"]
    assert "# My note\n\n*hello*" in body


def test_a_prompt_can_not_end_the_code():
    prompt = Prompt(nickname="v", file="v", prompt="x\n```\n'\"\\")
    record = RunRecord(prompts=(prompt,))
    assert "prompt=" in code_in(card_of(record)[1])


def test_a_record_that_is_not_there_leaves_a_card():
    front, body = card_of(RunRecord(), step=5)
    assert front["license"] == "other"
    assert "trained for 5 optimiser steps with fluxfast" in body
    assert "## Datasets" not in body


# ---- what an upload holds


@pytest.fixture
def output(tmp_path):
    """A run's folder with an adapter and images of two steps, the later ones beside the base's."""
    folder = tmp_path / "out"
    (folder / "validation_images").mkdir(parents=True)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_"
    lora = {f"{name}A.weight": torch.ones(2, 8), f"{name}B.weight": torch.ones(8, 2)}
    save_file(lora, folder / "pytorch_lora_weights.safetensors")
    for step, width, colour in ((0, 32, "red"), (4, 64, "green"), (12, 64, "blue")):
        name = file_name(step, CAT, 0, (32, 16))
        image = Image.new("RGB", (width, 16), "red")
        image.paste(colour, (width - 32, 0, width, 16))
        image.save(folder / "validation_images" / name)
    name = file_name(12, CAT, 0, (32, 16)).replace("_0_32x16", "_ema_0_32x16")
    Image.new("RGB", (32, 16)).save(folder / "validation_images" / name)
    (folder / "validation_images" / "step_12_broken_0_32x16.png").write_bytes(b"no image")
    (folder / "validation_images" / "other.png").write_bytes(b"no image")
    return folder


def test_names_of_images_are_read_back(output):
    found = drawn_images(output / "validation_images")
    assert [(each.step, each.size) for each in found if each.nickname != "broken"] == [
        (0, (32, 16)), (4, (32, 16)), (12, (32, 16)), (12, (32, 16)),
    ]  # fmt: skip
    assert {each.step for each in newest_images(output / "validation_images")} == {12}
    assert drawn_images(output / "nowhere") == []


@pytest.mark.parametrize("unfit", [*SECRETS.values(), *PATHS.values()], ids=[*SECRETS, *PATHS])
def test_an_upload_holds_no_secret_and_no_path(output, unfit):
    config = load(**full_of(unfit), push_to_hub=True, output_dir=str(output))
    stem = drawn_images(output / "validation_images")[0].nickname
    record = RunRecord(
        config={"anything": unfit},
        versions={"fluxfast": "1", "device": unfit},
        prompts=(Prompt(nickname=unfit, file=stem, prompt=f"cat {unfit}"),),
        datasets=(DatasetRow(id=unfit, images=1, prompt=unfit),),
    )
    folder = gather(config, record, output, repository="me/cat", step=12)
    held = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    assert set(held) == {
        "README.md", "fluxfast_config.json", "pytorch_lora_weights.safetensors",
        "images/000_32x16.png",
    }  # fmt: skip
    for name in ("README.md", "fluxfast_config.json"):
        text = held[name].read_text()
        assert not [part for part in HIDDEN if part in text], text
        assert str(output.parent) not in text
    with Image.open(held["images/000_32x16.png"]) as image:
        assert (image.size, image.getpixel((0, 0)), image.info) == ((32, 16), (0, 0, 255), {})


def test_an_upload_outlives_its_checkpoint(output):
    folder = gather(load(output_dir=str(output)), RunRecord(), output, repository="me/cat", step=1)
    again = gather(load(output_dir=str(output)), RunRecord(), output, repository="me/cat", step=1)
    assert folder != again
    lora = output / "pytorch_lora_weights.safetensors"
    held = lora.read_bytes()
    lora.unlink()
    assert (folder / lora.name).read_bytes() == held
    assert "load_lora_weights('me/cat'" in (folder / "README.md").read_text()
    for left in (None, b"cut"):
        if left is not None:
            lora.write_bytes(left)
        with pytest.raises((OSError, ValueError), match="pytorch_lora_weights"):
            gather(load(output_dir=str(output)), RunRecord(), output, repository="me/cat", step=2)
    assert {*output.glob(".upload-*")} == {folder, again}


def test_a_lycoris_config_is_a_file_that_the_config_names(output, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(LOKR))
    config = load(
        lora_type="lycoris", lycoris_config=str(tmp_path / "mine.json"), output_dir=str(output)
    )
    folder = gather(config, RunRecord(), output, repository="me/cat", step=1)
    assert json.loads((folder / "lycoris_config.json").read_text()) == LOKR
    written = json.loads((folder / "fluxfast_config.json").read_text())
    assert written["lycoris_config"] == "lycoris_config.json"
