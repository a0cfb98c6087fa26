"""The README's tables of what needs no device."""

import json

import pytest

from fluxfast_bench.report import counted_sections, report

RUN = {
    "date": "2026-01-02T03:04:05Z",
    "commit": "abc",
    "command": "fluxfast-bench x",
    "versions": {"torch": "9.9"},
}
COUNTS = {
    "run": RUN,
    "records": [
        {"case": "1024px-b1", "contestant": "theirs", "ours": False, "launches": 13451,
        "launch_ratio": 1.0,
         "memory_bytes": 750e9, "memory_ratio": 1.0, "gemm_bytes": 80e9},
        {"case": "1024px-b1", "contestant": "ours", "ours": True, "launches": 3158,
        "launch_ratio": 0.2348,
         "memory_bytes": 160e9, "memory_ratio": 0.2133, "gemm_bytes": 70e9},
    ],
}  # fmt: skip
VRAM = {
    "run": RUN,
    "records": [
        {"base": base, "shape": "512px-b1", "streamed": streamed, "recompute": recompute,
        "gib": gib, "limit_gib": limit}
        for base, streamed, recompute, gib, limit in [
            ("int8", False, "full", 9.44, 10.5), ("int8", False, "none", 14.1, None), ("int8", True,
            "full", 2.04, 2.5),
            ("fp8", False, "full", 9.5, None),
        ]
    ],
}  # fmt: skip
FORMATS = {
    "conditions": {
        "rows": 8,
        "cols": 64,
        "commit": "abc",
        "versions": {"torch": "9.9", "bitsandbytes": None},
    },
    "results": [
        {
            "group": "4 bits",
            "maker": "fluxfast",
            "name": "nf4",
            "bits": 4.127,
            "errors": {"gaussian": 0.0922},
            "why": None,
        },
        {
            "group": "4 bits",
            "maker": "bitsandbytes",
            "name": "nf4",
            "bits": None,
            "errors": {},
            "why": "not installed",
        },
    ],
}
QUALITY = {
    "conditions": RUN | {"device": "a CPU"},
    "settings": {"base": "f00", "steps": 8, "images": 4, "device": "a CPU"},
    "records": [
        {"mode": mode, "seed": 1, "loss_before": 2.0, "loss": loss, "concept": 0.75, "old": 1.0,
         "digest": mode, "commit": "abc"}
        for mode, loss in (("fp32", 1.05), ("int8 base", 1.2))
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("counts", COUNTS, "| 1024px-b1 | **ours** | 3,158 | 0.23 | 160 | 0.21 | 70 |"),
        ("vram", VRAM, "| int8 | 9.4 (≤ 10.5) | 2.0 (≤ 2.5) |"),
        ("vram", VRAM, "| fp8 | 9.5 |  |"),
        ("formats", FORMATS, "| **nf4** | fluxfast | 4.13 | 9.22 |"),
        (
            "quality",
            QUALITY,
            "| int8 base | 1.2000 | 0.0000 | +0.1500 | 0.0000 | 75 ± 0 | 100 ± 0 |",
        ),
    ],
)
def test_a_file_becomes_a_table(tmp_path, name, data, line):
    (tmp_path / f"{name}.json").write_text(json.dumps(data))
    text = f"before\n<!-- bench:{name} -->\nold\n<!-- /bench -->\nafter"
    made = report.render(text, [], tmp_path, "")
    assert (
        line in made.splitlines()
        and "old" not in made.splitlines()
        and made.startswith("before\n")
        and made.endswith("\nafter")
    )
    assert report.render(made, [], tmp_path, "") == made


def test_what_was_not_counted_yet(tmp_path):
    assert "Not measured yet." in report.render(
        "<!-- bench:vram -->\n<!-- /bench -->", [], tmp_path, ""
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"run": {}}'])
def test_another_file_is_named(tmp_path, content):
    (tmp_path / "counts.json").write_text(content)
    with pytest.raises(ValueError, match=r"counts\.json: not what `fluxfast-bench counts` writes"):
        counted_sections.section("counts", tmp_path)
