"""What `plan` says of the encoders: their files' own sizes, where they are here."""

from pathlib import Path

import pytest
from safetensors import safe_open

from fluxfast.config.run import load_config
from fluxfast.train.encoder_sizes import (
    VAE_OPERATIONS,
    autoencoder,
    encoding_operations,
    preparing,
    validating,
)


def numbers_in(folder: Path) -> int:
    """The numbers of all tensors in a folder's files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    return total


@pytest.fixture
def config(write_config):
    return lambda **changes: load_config(write_config(**changes))


def test_a_local_models_own_sizes(config, workspace):
    """A tiny pipeline's megabytes are not FLUX.1's gigabytes."""
    tiny = config(mixed_precision="no", optimizer="torch-adamw")
    root = Path(tiny.base_source.path)
    text = 4 * (numbers_in(root / "text_encoder") + numbers_in(root / "text_encoder_2"))
    assert preparing(tiny, [])["text encoders"] == pytest.approx(text, rel=0.01)
    assert autoencoder(tiny) == 2 * numbers_in(root / "vae") == preparing(tiny, [])["autoencoder"]
    assert preparing(config(), [])["text encoders"] == pytest.approx(text / 2, rel=0.01)
    in_fp32 = config(vae_dtype="fp32")
    assert autoencoder(in_fp32) == 2 * autoencoder(tiny)


def test_flux_where_nothing_is_here(config):
    flux = config(
        pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
        pretrained_transformer_model_name_or_path=None,
    )
    assert preparing(flux, [])["text encoders"] == 2 * (4_762_310_656 + 123_060_480)
    assert preparing(flux, [(512, 512, 3)])["autoencoder"] == 2 * (83_819_683 + 640 * 512 * 512 * 3)
    # T5's encoder reads 512 tokens of each caption
    assert encoding_operations(flux, 10, 0) == 10 * 512 * 2 * 4_630_511_616
    assert encoding_operations(flux, 0, 1000) == VAE_OPERATIONS * 1000


def test_tiles_and_slices_bound_what_the_autoencoder_works_with(config):
    images = [(2048, 1024, 2), (512, 512, 4)]
    whole, tiled, sliced, both = (
        preparing(config(vae_enable_tiling=t, vae_enable_slicing=s), images)["autoencoder"]
        - autoencoder(config())
        for t, s in ((False, False), (True, False), (False, True), (True, True))
    )
    assert whole == 2 * tiled == 2 * sliced == 4 * both


def test_what_draws_nothing_loads_nothing(config):
    assert not validating(config(validation_disable=True))
