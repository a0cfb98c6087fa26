"""What the tests of `prepare` share: encoders that count, configs, and what a report says."""

import os

from rich.console import Console

from fluxfast.config.datasets import DataConfig, ImageDataset, TextEmbeds
from fluxfast.data.encoders import LatentEncoder, TextEncoders


class Encoders:
    """Counts what the encoders are asked for."""

    def __init__(self, monkeypatch):
        self.loaded, self.texts, self.images = [], [], 0
        for kind, name in ((TextEncoders, "text"), (LatentEncoder, "vae")):
            self._watch_loading(monkeypatch, kind, name)
        texts, images = TextEncoders.encode, LatentEncoder.encode

        def encode_texts(encoders, captions):
            self.texts += captions
            return texts(encoders, captions)

        def encode_images(encoder, batch, seeds):
            self.images += len(batch)
            return images(encoder, batch, seeds)

        monkeypatch.setattr(TextEncoders, "encode", encode_texts)
        monkeypatch.setattr(LatentEncoder, "encode", encode_images)

    def _watch_loading(self, monkeypatch, kind, name):
        load = kind.from_pretrained

        def from_pretrained(*args, **options):
            self.loaded.append(name)
            return load(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    def reset(self):
        self.loaded, self.texts, self.images = [], [], 0

    def __eq__(self, other):
        return (self.loaded, self.texts, self.images) == other


NOTHING = ([], [], 0)


def config(tmp_path, *datasets, **options):
    """A data config of one dataset with `options`, or of several `datasets`."""
    images = [
        ImageDataset(
            **{
                "id": f"set{i}",
                "instance_data_dir": tmp_path / "images",
                "cache_dir_vae": tmp_path / "cache" / f"vae{i}",
                "resolution": 128,
                "resolution_type": "pixel_area",
                "caption_strategy": "filename",
            }
            | one
        )
        for i, one in enumerate(datasets or [options])
    ]
    return DataConfig(
        images=tuple(images),
        text_embeds=TextEmbeds(
            id="text", dataset_type="text_embeds", cache_dir=tmp_path / "cache" / "text"
        ),
    )


def rendered(report):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(report)
    return console.export_text()
