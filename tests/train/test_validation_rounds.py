"""When a run draws validation images, in what files, and what becomes of a failure."""

import numpy as np
import pytest
from drawing_cases import DRAWS_TRAINED
from kill_cases import Killed, kill_at, same_files
from PIL import Image

from fluxfast.train.grid import CELL, GAP, LABELS, Row, draw_grid
from fluxfast.train.image_files import drawn_images
from fluxfast.train.run_events import read_events
from fluxfast.train.validation import Validator

# four photographs with these repeats, two a batch: an epoch of four steps
EPOCHS = {"dataset": {"repeats": 1}, "max_train_steps": 10}


def drawn(output):
    return sorted({image.step for image in drawn_images(output / "validation_images")})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"validation_step_interval": 4}, [4, 8, 10]),
        ({"validation_epoch_interval": 1}, [4, 8, 10]),
        ({"validation_epoch_interval": 2}, [8, 10]),
        ({"validation_step_interval": 3, "validation_epoch_interval": 1}, [3, 4, 6, 8, 9, 10]),
        ({"validation_step_interval": 2, "validate_after_step": 5}, [6, 8, 10]),
        ({"validation_step_interval": 2, "validate_after_epoch": 2}, [8, 10]),
        ({"disable_benchmark": False}, [0, 10]),
    ],
)
def test_when_it_draws(run, tmp_path, settings, steps):
    run(**{**DRAWS_TRAINED, **EPOCHS, **settings})
    assert drawn(tmp_path / "output") == steps


def test_checkpoints_by_epoch(run, tmp_path):
    run(**EPOCHS, checkpoint_step_interval=0, checkpoint_epoch_interval=1)
    kept = {path.name for path in (tmp_path / "output").glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-8", "checkpoint-10"}


def test_a_resumed_run_draws_at_its_start_where_it_is_asked_to(run, monkeypatch, tmp_path):
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        run(**DRAWS_TRAINED, validation_on_startup=True)
    assert drawn(tmp_path / "output") == [0]
    run(**DRAWS_TRAINED, validation_on_startup=True)
    assert drawn(tmp_path / "output") == [0, 2, 6]


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_formats(run, tmp_path, kind):
    run(
        **{**DRAWS_TRAINED, "disable_benchmark": False},
        validation_image_format=kind,
        max_train_steps=1,
    )
    extension = {"jpeg": "jpg"}.get(kind, kind)
    folder = tmp_path / "output" / "validation_images"
    sizes = {"000000_validation_base": (64, 48), "000001_validation": (128, LABELS + 48)}
    for name, size in sizes.items():
        with Image.open(folder / f"step_{name}_0_64x48.{extension}") as image:
            assert (image.format, image.size) == (kind.upper(), size)


def test_quality(run, tmp_path):
    sizes = []
    for quality in (5, 95):
        name = f"q{quality}"
        run(
            name=name, validation_image_format="jpeg", validation_image_quality=quality,
            max_train_steps=1, **DRAWS_TRAINED,
        )  # fmt: skip
        (path,) = (tmp_path / name / "validation_images").glob("step_000001_*")
        sizes.append(path.stat().st_size)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("randomize", [False, True])
def test_noise_is_the_same_each_time_unless_it_is_random(run, tmp_path, randomize):
    # nothing is learnt, so that only the noise differs
    run(
        **{**DRAWS_TRAINED, "validation_step_interval": 1}, validation_randomize=randomize,
        max_train_steps=2, learning_rate=1e-30, lr_scheduler="constant",
    )  # fmt: skip
    one, two = (
        tmp_path / "output" / "validation_images" / f"step_{step:06d}_validation_0_64x48.png"
        for step in (1, 2)
    )
    assert same_files(one, two) is not randomize


def test_a_validation_that_fails_ends_nothing(run, monkeypatch, tmp_path):
    whole, _ = run(name="whole", **{**DRAWS_TRAINED, "validation_step_interval": 2})
    original = Validator._image
    calls = []

    def fail(self, *args):
        calls.append(len(calls))
        if calls[-1] == 0:
            raise RuntimeError("the GPU is out of memory")
        return original(self, *args)

    monkeypatch.setattr(Validator, "_image", fail)
    lora, out = run(**{**DRAWS_TRAINED, "validation_step_interval": 2})
    told = "validation failed, the run goes on: the GPU is out of memory"
    assert out.getvalue().replace("\n", " ").count(told) == 1
    assert same_files(whole, lora) and drawn(tmp_path / "output") == [4, 6]
    (error,) = [
        e for e in read_events(tmp_path / "output" / "events.jsonl") if e["type"] == "error"
    ]
    assert error["title"] == "Validation has failed" and "RuntimeError" in error["traceback"]
    assert error["severity"] == "error"


def at(folder, references_at="left"):
    """The images in a folder, by size and step."""
    found = {}
    for image in drawn_images(folder, references_at):
        found.setdefault(image.size, {})[image.step] = image
    return found


def write(folder, step, size, colour, *, name="a", beside=0, at_left=False):
    """An image of one colour, and that many yellow pixels beside it."""
    image = Image.new("RGB", (size[0] + beside, size[1]), "yellow")
    image.paste(Image.new("RGB", size, colour), (0 if at_left else beside, 0))
    image.save(folder / f"step_{step}_{name}_0_{size[0]}x{size[1]}.png")


def test_the_grid_has_a_row_a_prompt_and_a_column_a_step(tmp_path):
    small, large = (64, 48), (512, 1024)
    for step, colour in {0: "red", 10: "green", 20: "blue"}.items():
        write(tmp_path, step, small, colour, beside=64 * (step > 0))
        write(tmp_path, step, large, colour)
    rows = [Row(str(size), size, images) for size, images in at(tmp_path).items()]
    path = draw_grid(rows, [0, 10, 20], tmp_path / "grid.png")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] == GAP + 3 * (CELL + GAP)
    for column, expected in enumerate(((255, 0, 0), (0, 128, 0), (0, 0, 255))):
        left = GAP + column * (CELL + GAP)
        cell = pixels[:, left : left + CELL].reshape(-1, 3)
        area = int((cell == expected).all(axis=1).sum())
        # the small image as it is, the large one half as wide as its cell is high
        assert area == 64 * 48 + 128 * 256
        assert not (cell == (255, 255, 0)).all(axis=1).any()


def test_many_steps_are_thinned_out_and_lost_files_leave_a_gap(tmp_path):
    steps = list(range(0, 2000, 50))
    for step in steps[::2]:
        write(tmp_path, step, (16, 16), "red")
    row = Row("a", (16, 16), at(tmp_path)[16, 16])
    with Image.open(draw_grid([row], steps, tmp_path / "g.png")) as grid:
        assert grid.width == GAP + 8 * (CELL + GAP)


@pytest.mark.parametrize("references_at", ["left", "right"])
def test_references_beside_an_image_are_not_in_the_grid(tmp_path, references_at):
    at_left = references_at == "right"
    # without the base's image, and the base's own
    write(tmp_path, 3, (16, 16), "red", name="trained", beside=64, at_left=at_left)
    write(tmp_path, 0, (32, 16), "red", name="base", beside=64, at_left=at_left)
    for size, images in at(tmp_path, references_at).items():
        path = draw_grid([Row("a", size, images)], [0, 3], tmp_path / "g.png")
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert (pixels == (255, 0, 0)).all(axis=2).sum() == size[0] * size[1]
        assert not (pixels == (255, 255, 0)).all(axis=2).any()
