"""Runs on datasets that lie elsewhere, and `fluxfast-train data` on them."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fluxfast.cli.main import main
from fluxfast.train.events import read_metrics

# the dataset that SimpleTuner's shipped flux.peft-lora trains on
DOMOKUN = {
    "id": "dreambooth-512", "type": "huggingface", "dataset_name": "RareConcepts/Domokun",
    "crop": True, "crop_style": "random", "crop_aspect": "square", "minimum_image_size": 128,
    "maximum_image_size": 512, "target_downsample_size": 512, "resolution": 512,
    "resolution_type": "pixel", "metadata_backend": "huggingface",
    "caption_strategy": "instanceprompt", "instance_prompt": "x",
}  # fmt: skip


@pytest.fixture
def places(workspace, tmp_path):
    """The workspace's images at 160 pixels: in a folder, a CSV file and a Parquet file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in sorted((workspace / "images").glob("*.png")):
        with Image.open(file) as image:
            image.resize((160, 160)).save(folder / file.name)
    files = sorted(folder.iterdir())
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "caption": [f"caption {i}" for i in range(len(files))],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    lines = [f"pictures/{file.name},caption {i}" for i, file in enumerate(files)]
    (tmp_path / "rows.csv").write_text("\n".join(["url,caption", *lines]))
    return tmp_path


def test_the_shipped_examples_dataset_trains_from_a_local_file(places, write_config, capsys):
    local = {"dataset_name": str(places / "rows.parquet"), "resolution": 64}
    config = write_config(
        DOMOKUN | local, cache_dir=str(places / "cache"), max_train_steps=2, lr_warmup_steps=0
    )
    assert main(["train", str(config)]) == 0, capsys.readouterr().err
    steps = read_metrics(places / "output" / "metrics.jsonl")
    assert [(step["step"], step["dataset"]) for step in steps] == [
        (1, "dreambooth-512"),
        (2, "dreambooth-512"),
    ]


@pytest.mark.parametrize("kind", ["csv", "huggingface", "parquet"])
def test_data_shows_what_lies_elsewhere(places, write_config, kind):
    keys = {
        "csv": {"type": "csv", "csv_file": str(places / "rows.csv")},
        "huggingface": {"type": "huggingface", "dataset_name": str(places / "rows.parquet")},
        "parquet": {
            "instance_data_dir": str(places / "pictures"),
            "parquet": {"path": str(places / "names.parquet")},
        },
    }[kind]
    names = [file.stem for file in sorted((places / "pictures").iterdir())]
    table = pyarrow.table({"id": names, "caption": [f"caption {i}" for i in range(len(names))]})
    pyarrow.parquet.write_table(table, places / "names.parquet")
    config = write_config(
        {"id": "there", "caption_strategy": kind, "cache_dir_vae": ""} | keys,
        cache_dir=str(places / "cache"),
    )
    assert (
        main(
            [
                "data",
                str(config),
                "--json",
                str(places / "told.json"),
                "--out",
                str(places / "sheets"),
            ]
        )
        == 0
    )
    (shown,) = json.loads((places / "told.json").read_text())["datasets"]
    assert sum(bucket["images"] for bucket in shown["buckets"]) == 4
    assert (places / "sheets" / "there.png").is_file()
