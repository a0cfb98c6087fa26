"""`fluxfast-bench convergence`: its arithmetic and its verdict, without the runs themselves."""

import json

import pytest

from fluxfast_bench.step import convergence


def fake_losses(monkeypatch, shift):
    """Runs whose loss is 1 + seed / 10, and `shift` more in int8 compute.

    Seeds 1, 2 and 3 have a spread of 0.1.
    """

    def train(config, mode, seed, steps):
        assert config.exists()
        return [9.0] * (steps - steps // 4) + [
            1 + seed / 10 + (shift if mode == "int8 compute" else 0)
        ] * (steps // 4)

    monkeypatch.setattr(convergence, "train", train)

    def write_demo(root, steps):
        (root / "config.json").write_text("{}")
        return root / "config.json"

    monkeypatch.setattr("fluxfast.cli.demo.write_demo", write_demo)


@pytest.mark.parametrize(("shift", "status"), [(0.09, 0), (-0.09, 0), (0.11, 1), (-0.11, 1)])
def test_a_mode_beyond_the_spread_between_seeds_is_red(monkeypatch, tmp_path, shift, status):
    fake_losses(monkeypatch, shift)
    assert (
        convergence.main(
            ["--steps", "8", "--modes", "int8 compute", "nf4 storage", "--out", str(tmp_path)]
        )
        == status
    )
    result = json.loads((tmp_path / "convergence.json").read_text())
    summary = result["summary"]
    assert summary["spread"]["seeds"] == pytest.approx(0.1) and summary["spread"]["last"] == 2
    assert summary["int8 compute"]["difference"] == pytest.approx(shift)
    assert summary["nf4 storage"]["difference"] == summary["bf16"]["difference"] == pytest.approx(0)
    assert result["conditions"]["command"].startswith("fluxfast-bench convergence --steps 8")
    assert (tmp_path / "convergence.png").stat().st_size > 10_000


def test_modes_are_configs(tmp_path):
    from fluxfast.cli.demo import config_json
    from fluxfast.config.run import load_config

    for changes in convergence.MODES.values():
        (tmp_path / "config.json").write_text(json.dumps(config_json(tmp_path, 4) | changes))
        load_config(tmp_path / "config.json")


def test_one_seed_has_no_spread(capsys):
    with pytest.raises(SystemExit):
        convergence.main(["--seeds", "1"])
    assert "at least 2 seeds" in capsys.readouterr().err
