"""What a run writes, in bytes, and whether the disks have room for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fluxfast.config.datasets import ImageDataset
from fluxfast.config.run import TrainConfig
from fluxfast.data.cache_index import has_entries, owner_of_captions, owner_of_images
from fluxfast.data.images import discover
from fluxfast.files import free_bytes
from fluxfast.train.choose import Size, largest_batch

# FLUX.1's text encoders: features of a T5 token, and of CLIP's pooled output
T5_FEATURES, CLIP_FEATURES = 4096, 768


def cache_bytes(
    config: TrainConfig,
    dataset: ImageDataset,
    t5: int = T5_FEATURES,
    clip: int = CLIP_FEATURES,
    sizes: Mapping[Size, int] | None = None,
) -> tuple[int, int]:
    """About the most bytes of (latents, text embeddings) that a dataset's images take.

    Both are 0 where its folder isn't there yet. sizes: how many images it has of each size, where
    that is known; else all are taken for the largest.
    """
    if sizes is None:
        if not dataset.instance_data_dir.is_dir():
            return 0, 0
        largest = largest_batch(config, [dataset]).size
        sizes = {largest: len(discover(dataset.instance_data_dir, skip=[]).images)}
    images = sum(sizes.values())
    captions = {None: 0, "instanceprompt": 1}.get(dataset.caption_strategy, images)
    if shuffle := dataset.caption_shuffle:
        captions *= shuffle.count + shuffle.include_original
    # 16 channels, an eighth of the size each way, bf16
    latents = sum(
        count * 16 * (width // 8) * (height // 8) * 2 for (width, height), count in sizes.items()
    )
    texts = captions * (config.tokenizer_max_length * t5 + clip) * 2
    return 0 if dataset.vae_cache_disable else latents, texts


def checkpoint_bytes(config: TrainConfig, elements: int) -> int:
    """A checkpoint of an adapter with so many trained numbers.

    It holds the adapter's values twice, as they are and as a file for other programs, and the
    optimiser's state; of a moving average it holds the same two, the values in fp32.
    """
    each = config.adapter_dtype.itemsize
    average = 4 + each if config.use_ema else 0
    return round(elements * (2 * each + config.optimizer_kind.state_bytes(each) + average))


def shortage(
    config: TrainConfig,
    datasets: Iterable[ImageDataset],
    text_cache: Path,
    checkpoint: int,
    *,
    t5: int = T5_FEATURES,
    clip: int = CLIP_FEATURES,
) -> tuple[list[str], list[str]]:
    """(problems, notes): what certainly does not fit on the disks, and what may not.

    checkpoint: bytes of one. What a dataset, or the captions, have in a cache already is not
    counted, since nobody knows how much of it is missing.
    """
    wanted = [
        (
            config.output_dir / "checkpoint",
            checkpoint * (checkpoints_kept(config) + 1),
            "checkpoints",
        )
    ]
    has_texts = has_entries(text_cache, owner_of_captions(config.base_source.path))
    for dataset in datasets:
        latents, texts = cache_bytes(config, dataset, t5, clip)
        owner = owner_of_images(dataset.id, dataset.instance_data_dir)
        if not has_entries(dataset.cache_dir_vae, owner):
            wanted.append((dataset.cache_dir_vae / "x", latents, "latents"))
        if not has_texts:
            wanted.append((text_cache / "x", texts, "text embeddings"))
    problems, notes = [], []
    # one checkpoint is written whole before an older one goes, and the LoRA beside it
    least = checkpoint + checkpoint // 4
    if (free := free_bytes(wanted[0][0])) < least:
        problems.append(
            f"{config.output_dir}: a checkpoint takes {_gb(least)}, and its disk has "
            f"{_gb(free)} left: make room, or set "
            'another "output_dir"'
        )
    by_disk: dict[int, list[tuple[Path, int, str]]] = {}
    for path, size, what in wanted:
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        if size:
            by_disk.setdefault(parent.stat().st_dev, []).append((path, size, what))
    for parts in by_disk.values():
        total, free = sum(size for _, size, _ in parts), free_bytes(parts[0][0])
        if free < total and not problems:
            sums = {
                what: sum(size for _, size, each in parts if each == what) for _, _, what in parts
            }
            told = ", ".join(f"{what} {_gb(size)}" for what, size in sums.items())
            notes.append(
                f"the disk of {parts[0][0].parent} has {_gb(free)} left, and this run may take "
                f"{_gb(total)} ({told})"
            )
    return problems, notes


def checkpoints_kept(config: TrainConfig) -> int:
    """How many checkpoints there are side by side at most."""
    most = config.checkpoints_total_limit + config.checkpoints_keep_best
    if not config.checkpoint_step_interval and not config.checkpoint_epoch_interval:
        return 1 + config.checkpoints_keep_best
    if not config.max_train_steps or config.checkpoint_epoch_interval:
        return most
    return min(most, -(-config.max_train_steps // config.checkpoint_step_interval))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
