"""What `fluxfast-bench vram` counts as alive, how near the plan comes to it, and what turns it red."""

import json

import pytest
import torch

from fluxfast_bench import targets, vram
from fluxfast_bench.cases import CONFIGS, SHAPES, Shape
from fluxfast_bench.live_bytes import BLOCK, LiveBytes, rounded
from fluxfast_bench.main import main
from fluxfast_bench.vram import Preset, measure, predict, presets, violations

MIB = 2**20


def mib(count):
    """A tensor of so many MiB."""
    return torch.empty(count, MIB // 4, device="meta")


def test_what_is_freed_is_no_longer_alive():
    with LiveBytes() as live:
        x = mib(1)
        y = x + 1
        assert live.live == 2 * MIB
        del y
        assert live.live == MIB
        # the sum is there before its inputs are gone
        x = x * 2
        assert (live.live, live.peak) == (MIB, 2 * MIB)
    assert live.peak == 2 * MIB


def test_a_view_keeps_all_of_its_memory():
    with LiveBytes() as live:
        x = mib(4)
        part = x[0, :8].view(2, 4)
        del x
        assert live.live == 4 * MIB
        del part
        assert live.live == 0


def test_what_autograd_saves_is_alive_until_backward():
    with LiveBytes() as live:
        x = mib(1).requires_grad_()
        # exp keeps its result, the sum keeps nothing
        y = x.exp().sum()
        assert live.live == 2 * MIB + BLOCK
        y.backward()
        assert live.live == 2 * MIB + BLOCK
        assert live.peak >= 3 * MIB
        del x, y
        assert live.live == 0


def test_in_place_and_out_make_nothing():
    with LiveBytes() as live:
        x = mib(1)
        x.add_(1).mul_(2)
        torch.add(x, x, out=x)
        assert (live.live, live.peak) == (MIB, MIB)


def test_sizes_are_rounded_as_the_allocator_rounds_them():
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    with LiveBytes() as live:
        x = torch.empty(3, device="meta")
        assert live.live == BLOCK
    del x


def test_held_and_ignored_tensors():
    mine, hosts = mib(1), mib(2)
    with LiveBytes() as live:
        live.ignore([hosts])
        live.hold([mine, mine.view(-1), hosts])
        hosts.view(-1)
        assert (live.live, live.peak) == (MIB, MIB)


def test_attentions_backward_takes_an_fp32_copy_of_dq():
    q, out, lse = (
        torch.empty(1, 2, 200, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)
    )
    lse = torch.empty(1, 2, 200, device="meta")
    seed = torch.empty((), dtype=torch.uint64, device="meta")
    with LiveBytes() as live:
        live.hold([q, out, lse, seed])
        before = live.live
        torch.ops.aten._scaled_dot_product_flash_attention_backward(
            out, q, q, q, out, lse, None, None, 200, 200, 0.0, False, seed, seed
        )
    grads = 3 * rounded(2 * 200 * 64 * 2)
    # 200 tokens are two tiles of 128
    assert live.peak - before == grads + 2 * 256 * 64 * 4 + 2 * 256 * 4


@pytest.fixture
def few_blocks(monkeypatch):
    """FLUX.1's sizes in one double and two single blocks; the name of the shape."""
    monkeypatch.setitem(CONFIGS, "few", CONFIGS["flux"] | {"num_layers": 1, "num_single_layers": 2})
    for side in (32, 64):
        monkeypatch.setitem(SHAPES, f"few-{side}", Shape(f"few-{side}", "few", side, 512, 1))


@pytest.mark.parametrize("recompute", vram.RECOMPUTE)
@pytest.mark.parametrize(("base", "streamed"), [("bf16", False), ("int4", False), ("int8", True)])
@pytest.mark.parametrize("side", [32, 64])
def test_the_plan_agrees(few_blocks, base, streamed, recompute, side):
    preset = Preset(base, f"few-{side}", streamed, recompute)
    assert predict(preset) == pytest.approx(measure(preset), rel=vram.TOLERANCE)


def test_streaming_keeps_a_ring_of_blocks(few_blocks):
    resident, streamed = (measure(Preset("bf16", "few-32", s, "full")) for s in (False, True))
    # of one double and two single blocks, two slots of a double block's size
    # (modulation is in host memory either way), and of three blocks' inputs
    double, single = (
        (339_831_296 - 113_283_072 - 36_864) * 2,
        (141_591_808 - 28_311_552 - 9_216) * 2,
    )
    kept = 1536 * 3072 * 2
    assert resident - streamed == pytest.approx(
        double + 2 * single - 2 * double + kept, abs=1.1 * kept
    )


def test_every_combination_is_a_preset():
    made = presets(vram.BASES, vram.DEFAULT_SHAPES)
    assert len(made) == len(set(made)) == 6 * 2 * 2 * 3
    wanted = targets.read(targets.TARGETS)
    limits = {
        p: limit for p in made if (limit := targets.vram_limit(wanted, **vars(p))) is not None
    }
    assert len(limits) == 5 * 2 * 2 and all(p.recompute == "full" for p in limits)
    assert limits[Preset("int4", "1024px-b1", True, "full")] == 2.8
    assert targets.vram_limit(wanted, "int4", "1024px-b2", streamed=True, recompute="full") is None


def test_violations_name_the_preset():
    good = {
        "base": "int8", "shape": "512px-b1", "streamed": False, "recompute": "full",
        "gib": 10.0, "plan_gib": 10.2, "plan_error": 0.02, "limit_gib": 10.5,
    }  # fmt: skip
    assert violations([good, good | {"limit_gib": None, "gib": 99.0}]) == []
    assert violations([good | {"gib": 10.6}]) == [
        "int8 512px-b1 resident full: 10.60 GiB, at most 10.5"
    ]
    assert "the plan says" in violations([good | {"plan_error": -0.031}])[0]


def test_the_command(tmp_path, monkeypatch, capsys, few_blocks):
    class Here:
        """A pool that works here, where the fixtures are."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        map = staticmethod(map)

    monkeypatch.setattr(vram, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(vram, "RECOMPUTE", ("full",))
    out = tmp_path / "vram.json"
    assert main(["vram", "--bases", "bf16", "--shapes", "few-32", "--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert [r["streamed"] for r in stored["records"]] == [False, True]
    assert f"{stored['records'][0]['gib']:.2f}" in capsys.readouterr().out

    monkeypatch.setattr(vram, "predict", lambda preset: 0)
    assert main(["vram", "--bases", "bf16", "--shapes", "few-32", "--out", str(out)]) == 1
    assert "the plan says 0.00 GiB" in capsys.readouterr().err


def test_an_unknown_base_is_named(capsys):
    assert main(["vram", "--bases", "int3"]) == 1
    assert "int3" in capsys.readouterr().err
