"""The photographs that scikit-image installs, with captions; others it would have to download."""

from pathlib import Path

import skimage

PHOTOGRAPHS = {
    "astronaut.png": "a portrait of an astronaut in an orange suit",
    "chelsea.png": "a close photo of a tabby cat",
    "coffee.png": "a cup of coffee on a wooden table",
    "rocket.jpg": "a rocket on its launch pad at night",
    "camera.png": "a man with a film camera on a lawn",
    "coins.png": "old coins on a dark cloth",
    "hubble_deep_field.jpg": "galaxies in deep space",
    "retina.jpg": "the retina of an eye",
    "motorcycle_left.png": "a motorcycle in a workshop",
    "moon.png": "the surface of the moon",
    "ihc.png": "stained tissue under a microscope",
    "brick.png": "a wall of bricks",
}


def photographs() -> list[Path]:
    root = Path(skimage.__file__).parent / "data"
    return [root / name for name in PHOTOGRAPHS]
