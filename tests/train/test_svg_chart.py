"""Charts: where points lie, what is left out of long lines, and what stands beside them."""

import re
from xml.etree import ElementTree

import pytest

from fluxfast.train.svg_chart import Series, line_chart, running_mean


def chart(*series):
    return ElementTree.fromstring(line_chart("c", "Loss", series, x="step", y="loss"))


def points_of(svg):
    """(x, y) of the first line's points in the picture."""
    path = next(each for each in svg.iter("path") if "line" in each.get("class").split())
    return [tuple(map(float, each.split())) for each in re.split("[ML]", path.get("d"))[1:]]


def test_a_running_mean_takes_fewer_values_at_the_beginning():
    points = [(1, 2.0), (2, 4.0), (5, 6.0), (6, 8.0)]
    assert running_mean(points, 3) == [(1, 2.0), (2, 3.0), (5, 4.0), (6, 6.0)]
    assert running_mean(points, 1) == points
    assert running_mean([], 3) == []


def test_points_lie_where_their_numbers_say():
    # the frame is from (76, 48) to (466, 208), and its top 1.05 times a line's highest value
    svg = chart(Series("a", [(0, 0.0), (5, 1.0), (10, 2.0)]))
    assert points_of(svg) == [
        (76.0, 208.0), (271.0, pytest.approx(208 - 160 / 2.1, abs=0.1)),
        (466.0, pytest.approx(208 - 160 / 1.05, abs=0.1)),
    ]  # fmt: skip
    ticks = [each.text for each in svg.iter("text")]
    assert {"0", "1", "2", "step", "loss", "a", "10"} <= {*ticks}


def test_one_high_value_does_not_flatten_the_others():
    dots = Series("each step", [(i, 1.0) for i in range(200)] + [(200, 500.0)], dots=True)
    svg = chart(dots)
    *heights, last = [
        float(each.get("cy")) for each in svg.iter("circle") if each.get("r") == "1.6"
    ]
    assert heights == [pytest.approx(208 - 160 / 1.1, abs=0.1)] * 200
    # it lies on the top
    assert last == 48.0


def test_long_lines_keep_their_ends_and_peaks():
    values = [1.0] * 10_000
    values[1234], values[4321] = 0.0, 2.0
    places = points_of(chart(Series("a", list(enumerate(values)))))
    assert len(places) <= 420
    assert max(y for _, y in places) == 208.0
    assert sum(y < 100 for _, y in places) == 1
    assert [x for x, _ in places] == sorted(x for x, _ in places)


@pytest.mark.parametrize("points", [[(3, 0.5)], [(3, 0.0)], [(1, 0.0), (2, 0.0)]])
def test_little_to_draw(points):
    svg = chart(Series("a", points))
    assert svg.find("title").text == "Loss"
    assert "nan" not in ElementTree.tostring(svg).decode().lower()


def test_nothing_to_draw():
    assert line_chart("c", "Loss", [Series("a", [])], x="step", y="loss") == ""


def test_texts_are_escaped_and_lines_differ():
    series = [Series(f"<b>{i}&", [(1, i), (2, i)]) for i in range(1, 5)]
    svg = chart(*series)
    lines = [each for each in svg.iter("path") if "line" in each.get("class").split()]
    # a line and its sign in the legend
    assert len(lines) == 8
    assert len({(each.get("class"), each.get("stroke-dasharray")) for each in lines}) == 4
    assert "<b>1&" in [each.text for each in svg.iter("text")]
    assert svg.find("desc").text.startswith("<b>1&: 1 at 1, 1 at 2")
