"""What the tests of conditioning datasets share: their configs, and folders of partners."""

from PIL import Image
from prepare_cases import config

from fluxfast.config.conditioning import ConditioningDataset


def conditions(tmp_path, *kinds, **options):
    """Conditioning datasets named as their kinds, with a folder each."""
    return tuple(
        ConditioningDataset(
            **{
                "id": kind,
                "dataset_type": "conditioning",
                "conditioning_type": kind,
                "instance_data_dir": tmp_path / kind,
                "cache_dir_vae": tmp_path / "cache" / kind,
                "resolution": 128,
                "resolution_type": "pixel_area",
            }
            | options
        )
        for kind in kinds
    )


def linked(tmp_path, *own, **options):
    """A data config whose images have these conditioning datasets."""
    return config(tmp_path, **options).model_copy(update={"linked": {"set0": own}})


def copy_shapes(tmp_path, kind, make, scale=1):
    """A partner for each image, in the same place."""
    for path in sorted((tmp_path / "images").rglob("*.png")):
        with Image.open(path) as image:
            size = (image.width * scale, image.height * scale)
        partner = tmp_path / kind / path.relative_to(tmp_path / "images")
        partner.parent.mkdir(parents=True, exist_ok=True)
        make(size, path.stem).save(partner)
