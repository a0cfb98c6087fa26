"""What is said of images by their headers is what a run then makes of them."""

from pathlib import Path

import pytest
from PIL import Image
from trainer_cases import make_trainer

from fluxfast.config.datasets import load_data_config
from fluxfast.config.run import load_config
from fluxfast.train.outlook import batches_of, length_of, look

RANDOM_CROPS = {
    "crop": True,
    "crop_aspect": "random",
    "crop_aspect_buckets": [1.0, 0.5, 2.0],
}


def seen_of(config):
    data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
    return data, *look(config, data)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_accumulation_steps": 3, "train_batch_size": 2},
        {"dataset": {"repeats": 4}},
        {"dataset": RANDOM_CROPS | {"repeats": 2}},
        {"allow_dataset_oversubscription": True, "train_batch_size": 5, "vae_batch_size": 9},
    ],
    ids=str,
)
def test_as_many_steps_and_the_batches_that_a_run_has(write_config, keys):
    config = load_config(write_config(**keys, max_train_steps=None, num_train_epochs=3))
    data, seen, notes = seen_of(config)
    assert not notes
    trainer = make_trainer(config)
    try:
        assert length_of(config, data, seen).steps == trainer.steps
        assert set(batches_of(config, data, seen)) == set(trainer.data.batch_shapes)
        assert (
            sum(batches_of(config, data, seen).values()) == trainer.data.sampler.batches_per_epoch
        )
    finally:
        trainer.close()


def test_nothing_is_written_and_no_folder_is_needed(write_config, tmp_path):
    config = load_config(write_config(dataset={"instance_data_dir": str(tmp_path / "none")}))
    before = sorted(map(str, Path(tmp_path).rglob("*")))
    data, seen, (note,) = seen_of(config)
    assert not seen and "are not here yet" in note
    assert length_of(config, data, seen).steps == config.max_train_steps
    assert length_of(config, data, seen).steps_per_epoch is None
    assert sorted(map(str, Path(tmp_path).rglob("*"))) == before


def test_an_image_that_can_not_be_read_is_not_counted(write_config, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    config = load_config(
        write_config(
            dataset={"instance_data_dir": str(folder), "caption_strategy": "filename"},
        )
    )
    _, (only,), notes = seen_of(config)
    assert only.images == 1 and only.captions == {"a"} and not notes
