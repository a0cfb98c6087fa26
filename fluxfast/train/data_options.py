"""What a run's config says of how its datasets are looked at."""

from __future__ import annotations

from typing import Any

from fluxfast.config.run import TrainConfig


def survey_options(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of `survey` for a run, but for `vae_batch_size`."""
    return {
        "train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "skip_folders": [config.output_dir],
        # a crop seed that changed from start to start would compute every latent anew
        "crop_seed": config.seed if config.seed is not None and config.seed >= 0 else 0,
        "aspect_bucket_rounding": config.aspect_bucket_rounding,
        "disable_bucket_pruning": config.disable_bucket_pruning,
        "allow_dataset_oversubscription": config.allow_dataset_oversubscription,
        "max_workers": config.max_workers,
    }
