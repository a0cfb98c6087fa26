"""What is uploaded to the Hub, gathered in a folder of its own: nothing else ever leaves.

The adapter's file, its card, the public part of the config, and the newest validation images. The
files are links or copies, since a checkpoint may be removed while it waits for its upload.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.find_lora import header_of
from fluxfast.adapters.readers import readers
from fluxfast.config.public import public_settings
from fluxfast.config.run import TrainConfig
from fluxfast.files import TEMPORARY
from fluxfast.train import ema
from fluxfast.train.image_files import FOLDER, newest_images
from fluxfast.train.model_card import Picture, model_card
from fluxfast.train.run_record import RunRecord

CONFIG_NAME = "fluxfast_config.json"
LYCORIS_NAME = "lycoris_config.json"


def gather(
    config: TrainConfig,
    record: RunRecord,
    source: Path,
    *,
    repository: str,
    step: int,
) -> Path:
    """Make the folder of an upload in the run's own, which a later start removes if it is left.

    source: where the adapter was saved, the output folder or a checkpoint. Raises OSError where it
    can't be read or the folder can't be written, ValueError where the adapter's file is damaged.
    """
    # a step may be uploaded a second time while its first upload is under way
    folder = Path(tempfile.mkdtemp(TEMPORARY, f".upload-{step}.", config.output_dir))
    try:
        file = folder / LORA_WEIGHT_NAME_SAFE
        _link(source / LORA_WEIGHT_NAME_SAFE, file)
        average = Path(ema.FOLDER) / LORA_WEIGHT_NAME_SAFE
        if (source / average).exists():
            (folder / ema.FOLDER).mkdir()
            _link(source / average, folder / average)
        card = model_card(
            config,
            record,
            repository=repository,
            file=file.name,
            read_by=_readers(file),
            step=step,
            pictures=_pictures(config, record, folder),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        _write_config(config, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    # a file system without links, or one that holds only one of the two
    except OSError:
        shutil.copyfile(source, target)


def _readers(file: Path) -> list[str]:
    """The programs that read an adapter's file."""
    found = readers(read_adapter(file), *header_of(file))
    return [program for program, reason in found.items() if reason is None]


def _write_config(config: TrainConfig, folder: Path) -> None:
    public = public_settings(config)
    if (lycoris := public.get("lycoris_config")) is not None:
        # a config names a file of these
        (folder / LYCORIS_NAME).write_text(json.dumps(lycoris, indent=2), encoding="utf-8")
        public["lycoris_config"] = LYCORIS_NAME
    text = json.dumps(public, indent=2, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _pictures(config: TrainConfig, record: RunRecord, folder: Path) -> list[Picture]:
    """Write the newest images, without what stands beside them, under names that say nothing.

    Those that were drawn with other weights, such as further LoRAs, show another adapter.
    """
    (folder / "images").mkdir()
    at = config.validation_stitch_input_location
    pictures = []
    for number, drawn in enumerate(newest_images(config.output_dir / FOLDER, at)):
        prompt = record.prompt_of(drawn.nickname)
        if prompt is not None and prompt.file != drawn.nickname:
            continue
        name = f"images/{number:03}_{drawn.size[0]}x{drawn.size[1]}.png"
        try:
            # compressed as little as PNG can be: it is the training thread that waits
            drawn.open().save(folder / name, compress_level=1)
        # a damaged image is no reason to keep the adapter back
        except OSError:
            continue
        pictures.append(Picture(name, prompt.prompt if prompt else ""))
    return pictures
