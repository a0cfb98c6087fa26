"""The keys of SimpleTuner's dataloader config that are no fields here.

They are other names of fields, keys without effect, and keys that are not implemented. Every key
that SimpleTuner reads is among them, so that a file made for it is never refused for a key that
nobody knows.
"""

from typing import Any

ALIASES = {
    "disable": "disabled",
    "is_regularization_data": "is_regularisation_data",
    "instance_data_root": "instance_data_dir",
}
VALUE_ALIASES = {
    ("crop_style", "centre"): "center",
    ("caption_strategy", "instance_prompt"): "instanceprompt",
    # earlier names of looking into the folder
    ("metadata_backend", "json"): "discovery",
    ("metadata_backend", "filesystem"): "discovery",
}

# keys without a field by their default; any other value is refused
NOT_IMPLEMENTED: dict[str, Any] = {
    **dict.fromkeys(
        (
            # other data beside the images
            "conditioning_config", "conditioning_image_embeds",
            "cache_dir_conditioning_image_embeds",
            "conditioning_image_embed_batch_size", "image_embeds", "grounding", "grounding_data",
            "bbox_column", "s2v_datasets", "slider_strength",
            "disable_after_epoch_step", "auto_generated",
            "distillation_cache", "distillation_type",
            # video and audio
            "video", "audio", "audio_only", "audio_column", "audio_caption_fields",
            "audio_channels", "audio_bucket_strategy", "audio_bucket_interval",
            "audio_duration_interval", "audio_duration_interval_seconds",
            "audio_min_duration_seconds", "audio_max_duration_seconds", "audio_truncation_mode",
            "target_resolution", "lyrics_column", "lyrics_extension", "lyrics_suffix",
            "lyrics_filename_format",
            # where the files of other types lie
            "aws", "csv", "image_cache_loc", "huggingface", "dataset_path", "subfolder",
            "streaming", "composite_image_column",
            "split_composite_images", "caption_file_extensions", "webshart", "source", "metadata",
            "hf_token", "shard_cache_gb", "shard_cache_dir", "metadata_cache_dir",
            "parallel_downloads", "buffer_size", "max_file_size", "webshart_optimize_captions",
            "webshart_optimise_captions", "optimize_captions", "optimise_captions",
            "memory_filesystem_path", "memory_filesystem_size", "memory_filesystem_sudo",
        )
    ),
    # the defaults that SimpleTuner's forms write
    "video_column": "video",
    "truncation_mode": "beginning",
    "disable_vae_cache": False,
    "text_cache_ondemand": False,
    "text_cache_disable": False,
    "delete_unwanted_images": False,
    "delete_problematic_images": False,
    "delete_nsfw_images": False,
}  # fmt: skip

# keys that change nothing here, and why that is harmless; a run prints each that a dataset sets
ACCEPTED_NO_EFFECT = {
    "auto_load": "a dataset is loaded when it is first needed",
    "aws_max_pool_connections": "max_workers decides how many objects are read at a time",
    "cache_file_suffix":
        "cached files are named by a hash of what they depend on, so settings never share one",
    "compress_cache": "latents and embeddings hardly get smaller, and are kept as they are",
    "config_version": "an entry is read for what it says",
    "hash_filenames": "cached files are always named by a hash",
    "ignore_epochs": "it does nothing in SimpleTuner either",
    "image_processing_batch_size": "one VAE batch is read ahead",
    "metadata_update_interval": "the cache's index is up to date after every entry",
    "num_proc": "a dataset is read by one process",
    "preserve_data_backend_cache": "a start deletes no cache",
    "read_batch_size": "one VAE batch is read ahead",
    "scan_for_errors":
        "each cached file is checked when it is read, and what is damaged is computed anew",
    "shorten_filenames": "downloaded files always have short names",
    "skip_file_discovery": "a second start recomputes nothing anyway",
    "vae_cache_scan_behaviour": "what is damaged or doesn't fit is computed anew, and nothing else",
    "write_batch_size": "each latent is written by itself",
}  # fmt: skip

# kinds of places for an entry's files that are refused
TYPES_NOT_YET = ("memory", "webshart")
DATASET_TYPES_NOT_YET = (
    "video", "audio", "image_embeds", "conditioning_image_embeds",
    "caption", "grounding", "distillation_cache",
)  # fmt: skip
# values that SimpleTuner knows and a field refuses
VALUES_NOT_YET = {
    "conditioning_type": ("controlnet", "depth", "canny"),
    "caption_strategy": ("webshart",),
    "metadata_backend": ("webshart",),
}
