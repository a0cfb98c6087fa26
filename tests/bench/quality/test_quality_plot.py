"""The picture of the quality bench."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from quality_cases import alone, runs, shifted

from fluxfast_bench.quality import plot


@pytest.fixture
def drawn(tmp_path):
    def draw(*records) -> Path:
        plot.draw(list(records), {"steps": 200}, tmp_path / "quality.png")
        return tmp_path / "quality.png"

    return draw


def coloured(path, colour):
    """How many pixels of the picture have that colour and no other."""
    pixels = imread(path)[..., :3]
    return int((abs(pixels - to_rgb(colour)).max(-1) < 0.01).sum())


def test_a_mode_has_its_marks(drawn):
    one = drawn(alone(), *runs("fp32"))
    new, old = coloured(one, plot.NEW), coloured(one, plot.OLD)
    assert new > 0 and old > 0
    # a mode's bars in both panels, and in one of them what the base knew
    two = drawn(alone(), *runs("fp32"), *runs("nf4 base", shifted(0.05)))
    assert coloured(two, plot.NEW) > new and coloured(two, plot.OLD) > old


def test_what_was_not_run_takes_no_room(drawn):
    reason = {"mode": "attention cudnn", "reason": "no GPU"}
    one, two = (imread(drawn(*runs("fp32"), *more)).shape for more in ([], [reason]))
    assert one == two
    assert imread(drawn(*runs("fp32"), *runs("int8 base"))).shape[0] > one[0]
