"""Examples are made from beginning to end, their configs hold, and their numbers are right."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fluxfast.config.datasets import load_data_config
from fluxfast.config.run import load_config
from fluxfast.demo.pipeline import BASE_CONFIG, make_pipeline
from fluxfast.demo.toyworld import COLOURS, draw, outline

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("kontext", "lokr", "masked-loss", "regularisation")
TINY = BASE_CONFIG | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def beside_the_script(monkeypatch):
    """A script finds the modules in its folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder, TINY)
    return folder


@pytest.fixture
def make(base, tmp_path, monkeypatch):
    """Make an example with a random base, four pictures and two steps; returns its folder."""

    def make(name, *options):
        monkeypatch.setattr("fluxfast.demo.sampling.DENOISING", 2)
        folder = tmp_path / name
        words = [name, str(folder), f"--base={base}", "--pictures=4", "--asked=2"]
        words += ["--max_train_steps=2", "--train_batch_size=2", *options]
        monkeypatch.setattr(sys, "argv", ["make.py", *words])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / "make.py"), run_name="__main__")
        assert ended.value.code == 0
        return folder

    return make


def numbers_of(folder):
    with Image.open(folder / "picture.png") as picture:
        assert picture.width > 1000 and picture.height > 400
    return json.loads((folder / "numbers.json").read_bytes())


def ids(file):
    return [entry["id"] for entry in json.loads(file.read_bytes())]


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_valid_and_name_only_what_lies_beside_them(name, monkeypatch):
    monkeypatch.chdir(EXAMPLES / name)
    config = load_config(Path("config.json"))
    data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
    paths = [config.pretrained_model_name_or_path, config.output_dir, config.cache_dir]
    paths += [each.instance_data_dir for each in data.folders]
    assert not any(Path(path).is_absolute() for path in paths), paths


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_the_picture_and_the_command(name):
    text = (EXAMPLES / name / "README.md").read_text()
    assert "](picture.png)" in text and f"python examples/make.py {name}\n" in text
    assert (EXAMPLES / name / "picture.png").stat().st_size <= 250_000


def test_masked_loss(make):
    folder = make("masked-loss")
    numbers = numbers_of(folder)
    assert ids(folder / "multidatabackend.json") == ["plonk", "masks", "old", "text-embeds"]
    assert ids(folder / "without.json") == ["plonk", "old", "text-embeds"]
    assert numbers.keys() == {"without masks", "with masks", "seconds"}
    with_masks, without = (
        load_file(folder / output / "pytorch_lora_weights.safetensors")
        for output in ("output", "output-without-masks")
    )
    assert any(not with_masks[name].equal(tensor) for name, tensor in without.items())


def test_masks_are_white_where_the_creature_is_and_close_around_it():
    from making import masked_loss

    scene = masked_loss.trained_scenes(1)[0]
    found = {drawing.path.parent.name: drawing.image for drawing in masked_loss.data(1)}
    picture, whole = np.asarray(found["images"], int), np.asarray(draw(scene), int)
    mask = np.asarray(found["masks"])
    is_counted = mask == 255
    assert 0.2 < is_counted.mean() < 0.6
    # all of the creature, with what is close around it, and nothing but paper elsewhere
    assert is_counted[np.asarray(outline(scene)) > 0].all()
    assert (picture[is_counted] == whole[is_counted]).all()
    assert (picture[mask == 0] == COLOURS["pink"]).all()
    # a smooth edge between them
    assert ((mask > 0) & ~is_counted).mean() < 0.05


def test_regularisation(make):
    folder = make("regularisation")
    numbers = numbers_of(folder)
    assert ids(folder / "without.json") == ["plonk", "text-embeds"]
    assert numbers.keys() == {
        "the base", "without regularisation", "with regularisation", "seconds"
    }  # fmt: skip
    captions = [file.read_text() for file in (folder / "old").glob("*.txt")]
    assert len(captions) == 64 and not any("plonk" in caption for caption in captions)


def test_lokr(make):
    folder = make("lokr")
    numbers = numbers_of(folder)
    sizes = [numbers[name]["bytes"] for name in ("LoKr", "LoRA of rank 8")]
    # as many numbers on the toy base; this one is a third as wide, where a LoKr's shrink by more
    assert 0.3 < sizes[0] / sizes[1] < 0.5
    tensors = load_file(folder / "output" / "pytorch_lora_weights.safetensors")
    assert any("lokr_w1" in name for name in tensors)


def test_kontext(make):
    folder = make("kontext")
    numbers = numbers_of(folder)
    assert 0 < numbers["after training"]["difference"] < 1
    # the references matter: each image is drawn beside its own
    names = {file.name for file in (folder / "images").glob("*.png")}
    assert names == {file.name for file in (folder / "references").glob("*.png")}


def test_an_edit_changes_the_colour_and_nothing_else():
    from making.kontext import edits

    for edit in edits(1, 20):
        assert edit.before.colour != edit.after.colour
        assert edit.instruction == f"make it {edit.after.colour}"
        assert edit.before._replace(colour=edit.after.colour) == edit.after
    before, after = (np.asarray(draw(scene), int) for scene in edit[:2])
    # the rest of the picture is the same to the pixel
    assert 0.5 < (before == after).all(2).mean() < 0.99


def test_each_image_is_drawn_beside_its_own_reference(base, tmp_path, monkeypatch):
    from making import studio
    from rich.console import Console

    monkeypatch.setattr("fluxfast.demo.sampling.DENOISING", 2)
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(base)
    black, white = Image.new("RGB", (128, 128)), Image.new("RGB", (128, 128), "white")
    draws = studio.Studio(Console(quiet=True)).draw
    both = draws(None, ["make it red"] * 2, [black, white])
    other = draws(None, ["make it red"] * 2, [black, black])
    assert studio.difference(both[0], other[0]) < 0.01
    assert studio.difference(both[1], other[1]) > 0.01


def test_a_difference_is_a_share_of_that_between_black_and_white():
    from making.studio import difference

    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    half = black.copy()
    half.paste(white.crop((0, 0, 4, 2)), (0, 0))
    assert difference(black, white) == 1 and difference(black, half) == 0.5


def test_another_folder_than_a_pipeline_is_refused(tmp_path):
    from making.runs import prepare

    with pytest.raises(ValueError, match=r"expected a pipeline's folder, with a model_index.json"):
        prepare(EXAMPLES / "lokr", tmp_path / "out", tmp_path)
