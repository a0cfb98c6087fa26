"""`fluxfast-bench formats`: its figures are a format's own, and a missing peer is named."""

import json

import pytest
import torch

from fluxfast_bench.main import main
from fluxfast_bench.ops import formats

pytestmark = pytest.mark.usefixtures("eager_peers")


def run(capsys, *words: str) -> str:
    assert main(["formats", "--rows", "3", *words]) == 0
    return capsys.readouterr().out


def test_errors_are_measured(monkeypatch, capsys):
    # codes that lose a known share of every weight, in five bits each
    def lossy(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        return weight.float() * 0.9, weight.numel() * 5 // 8

    monkeypatch.setattr(
        formats,
        "GROUPS",
        {"5 bits": (formats.Coder("fluxfast", "lossy", lossy), formats.ours("int8"))},
    )
    lossy_result, int8 = json.loads(run(capsys, "--json"))["results"]
    # a product in fp32
    assert lossy_result["errors"] == pytest.approx({"gaussian": 0.1, "heavy-tailed": 0.1}, rel=1e-5)
    assert lossy_result["bits"] == 5 and int8["bits"] == pytest.approx(8 + 32 / formats.COLS)
    assert 0 < int8["errors"]["gaussian"] < int8["errors"]["heavy-tailed"] < 0.1


def test_every_format_stands_beside_its_peers(capsys):
    result = json.loads(run(capsys, "--json"))
    assert {"commit", "rows", "cols", "seed", "versions"} == set(result["conditions"])
    rows = {(row["maker"], row["name"]): row for row in result["results"]}
    for (maker, name), row in rows.items():
        if maker == "fluxfast" or formats.installed(maker) is not None:
            assert row["why"] is None and set(row["errors"]) == set(formats.WEIGHTS), (maker, name)
    assert {name for maker, name in rows if maker == "fluxfast"} == set(formats.FORMATS)


def test_a_peer_that_is_not_installed_is_listed(monkeypatch, capsys):
    monkeypatch.setattr(formats, "installed", lambda name: None)
    rows = json.loads(run(capsys, "--json"))["results"]
    assert {row["why"] for row in rows if row["maker"] != "fluxfast"} == {"not installed"}
    table = run(capsys)
    assert (
        table.count("not installed") == sum(row["maker"] != "fluxfast" for row in rows)
        and "int4" in table
    )


def test_rows_are_checked(capsys):
    assert main(["formats", "--rows", "0"]) == 1
    assert "--rows: expected 1 or more, got 0" in capsys.readouterr().err
