"""What `fluxfast-bench counts` counts: single ops, kernels, whole blocks; and what turns it red."""

import json

import pytest
import torch

from fluxfast.memory.launched import touched_bytes
from fluxfast.ops.gelu import gelu
from fluxfast_bench.counted import counts
from fluxfast_bench.counted.counts import BASELINE, CONTESTANTS, count, violations
from fluxfast_bench.counted.tally import counted
from fluxfast_bench.main import main
from fluxfast_bench.report import targets
from fluxfast_bench.shapes import CONFIGS, Shape

B = 2  # bytes of bf16
LIMITS = {"bytes": 0.35, "launches": 0.25}


def meta(*shape, **kwargs):
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16, **kwargs)


def total(run, category="memory"):
    tally = counted(run)
    assert set(tally.launches) <= {category}
    return tally.launches[category], tally.bytes[category]


def test_views_and_empty_tensors_are_free():
    x = meta(6, 8)

    def run():
        x.view(48).unflatten(0, (8, 6)).t()[2:].expand(4, 4, 8).detach()
        torch.empty_like(x)

    assert total(run) == (0, 0)


@pytest.mark.parametrize(
    ("run", "elements"),
    [
        (lambda x, y: x + y, 3 * 48),
        (lambda x, y: x + y[:1].expand(6, 8), 48 + 8 + 48),
        (lambda x, y: x.add_(y), 3 * 48),
        (lambda x, y: x.mul_(2.0), 2 * 48),
        (lambda x, y: x.copy_(y), 2 * 48),
        (lambda x, y: x.zero_(), 48),
        (lambda x, y: torch.add(x, y, out=meta(6, 8)), 3 * 48),
        (lambda x, y: x * x, 2 * 48),
        (lambda x, y: torch.cat([x, y]), 2 * 96),
        (lambda x, y: x[:, ::2].contiguous(), 2 * 24),
    ],
)
def test_bytes_of_an_op(run, elements):
    x, y = meta(6, 8), meta(6, 8)
    assert total(lambda: run(x, y)) == (1, elements * B)


def test_a_cast_writes_its_own_size():
    assert total(lambda: meta(6, 8).float()) == (1, 48 * (2 + 4))


def test_gradients_that_meet_are_added():
    x = meta(6, 8, requires_grad=True)
    # forward two products, backward two again and their sum
    assert total(lambda: torch.autograd.backward([x * 2.0, x * 3.0], [meta(6, 8)] * 2)) == (
        5,
        (4 * 96 + 3 * 48) * B,
    )


@pytest.mark.parametrize(
    ("rows", "inner", "cols", "category"),
    [
        (256, 256, 256, "gemm"),
        (256, 256, 16, "memory"),
        (16, 256, 256, "memory"),
        (256, 16, 256, "memory"),
        (1, 256, 256, "gemv"),
    ],
)
def test_narrow_products_count_as_memory(rows, inner, cols, category):
    elements = rows * inner + inner * cols + rows * cols
    assert total(lambda: meta(rows, inner) @ meta(inner, cols), category) == (1, elements * B)
    elements += rows * cols
    assert total(
        lambda: torch.addmm(meta(rows, cols), meta(rows, inner), meta(inner, cols)), category
    ) == (1, elements * B)


def test_attention_is_one_kernel_each_way():
    q = meta(1, 2, 128, 64, requires_grad=True)

    def run():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).backward(meta(1, 2, 128, 64))

    tally = counted(run)
    assert tally.launches["attention"] == 2
    # the gradients of q, k and v are added up
    assert tally.launches["memory"] == 2


def test_rms_norm_is_one_kernel_each_way():
    x, weight = meta(1, 4, 64, requires_grad=True), meta(64)
    tally = counted(
        lambda: torch.nn.functional.rms_norm(x, (64,), weight, 1e-6).backward(meta(1, 4, 64))
    )
    assert tally.launches == {"memory": 2}
    assert tally.bytes["memory"] == (256 + 64 + 256) * B + 4 * 4 + (256 * 3 + 64) * B + 4 * 4


def test_our_ops_count_as_their_triton_kernels():
    x = meta(1, 4, 64, requires_grad=True)
    tally = counted(lambda: gelu(x).backward(meta(1, 4, 64)))
    assert {op: n for (_, op), n in tally.op_launches.items()} == {
        "gelu_fwd_kernel": 1,
        "gelu_bwd_kernel": 1,
    }
    assert tally.bytes["memory"] == (2 + 3) * 256 * B


def test_touched_bytes_of_what_is_broadcast():
    assert touched_bytes(meta(1, 8).expand(6, 8)) == 8 * B
    assert touched_bytes(meta(0, 8)) == 0


def flux_blocks(monkeypatch, doubles, singles):
    config = CONFIGS["flux"] | {"num_layers": doubles, "num_single_layers": singles}
    monkeypatch.setitem(CONFIGS, "blocks", config)
    return Shape("blocks", "blocks", 32, 512, 1)


@pytest.mark.parametrize(("kind", "launches", "passes"), [((1, 0), 356, 486), ((0, 1), 175, 455)])
def test_a_block_of_diffusers_and_peft(monkeypatch, kind, launches, passes):
    """Kernels and passes of one checkpointed block with rank 16, against a count by hand."""
    one = count(BASELINE, flux_blocks(monkeypatch, 1, 1))
    two = count(BASELINE, flux_blocks(monkeypatch, 1 + kind[0], 1 + kind[1]))
    assert abs(two.total_launches - one.total_launches - launches) <= 2
    moved = (two.bytes["memory"] - one.bytes["memory"]) / (1536 * 3072 * 2)
    # adapters' matrices and modulation's vectors, which the passes leave out, are a few
    assert moved == pytest.approx(passes, rel=0.03)


def test_ours_moves_and_launches_less(monkeypatch):
    shape = flux_blocks(monkeypatch, 1, 1)
    baseline, ours = count(BASELINE, shape), count(CONTESTANTS[2], shape)
    assert CONTESTANTS[2].ours and not BASELINE.ours
    assert ours.bytes["memory"] < LIMITS["bytes"] * baseline.bytes["memory"]
    assert ours.total_launches < 0.6 * baseline.total_launches


def test_violations_name_the_figure():
    good = {"case": "c", "contestant": "x", "ours": True, "memory_ratio": 0.3, "launch_ratio": 0.2}
    assert violations([good, good | {"ours": False, "memory_ratio": 1.0}], LIMITS) == []
    assert violations([good | {"memory_ratio": 0.36}], LIMITS) == [
        "c x: memory_ratio 0.36, at most 0.35"
    ]
    assert len(violations([good | {"memory_ratio": 0.36, "launch_ratio": 0.26}], LIMITS)) == 2


def test_the_command_stores_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(counts, "CONTESTANTS", (BASELINE, CONTESTANTS[2]))
    out, loose, tight = (tmp_path / name for name in ("counts.json", "loose.toml", "tight.toml"))
    text = targets.TARGETS.read_text(encoding="utf-8")
    loose.write_text(
        text.replace("bytes = 0.32", "bytes = 9.0").replace("launches = 0.18", "launches = 9.0")
    )
    tight.write_text(
        text.replace("bytes = 0.32", "bytes = 0.0").replace("launches = 0.18", "launches = 9.0")
    )
    assert (
        main(
            ["counts", "--shapes", "tiny", "--out", str(out), "--details", "--targets", str(loose)]
        )
        == 0
    )
    stored = json.loads(out.read_text())
    assert stored["run"]["command"].startswith("fluxfast-bench counts --shapes tiny")
    baseline, ours = stored["records"]
    assert baseline["launch_ratio"] == baseline["memory_ratio"] == 1
    assert ours["launch_ratio"] == round(ours["launches"] / baseline["launches"], 4)
    assert f"{ours['launches']:,}" in capsys.readouterr().out

    assert main(["counts", "--shapes", "tiny", "--out", str(out), "--targets", str(tight)]) == 1
    assert "memory_ratio" in capsys.readouterr().err


def test_an_unknown_shape_is_named(capsys):
    assert main(["counts", "--shapes", "2048px"]) == 1
    assert "2048px" in capsys.readouterr().err
