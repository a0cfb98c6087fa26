"""Rates that made-up results of a GPU give, and predictions beside its measurements."""

import json

import pytest
from stored_runs import record, run_of, store

from fluxfast.memory import rates
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.launched import Product
from fluxfast.memory.rates import rates_of, with_measured
from fluxfast.memory.step_time import product_seconds
from fluxfast_bench.main import main
from fluxfast_bench.ops import ceilings
from fluxfast_bench.ops.products import products_of
from fluxfast_bench.report import measured_rates, predicted, report
from fluxfast_bench.report.measured_rates import measured, rate_of
from fluxfast_bench.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("assumed_rates")

H200 = find_gpu("H200")
CASE = "1024px-b1"
# what the GPU of these results sustains
TRUE = {"half": 6.1e14, "int8": 1.02e15, "library": 7.0e14}
KNOWN = with_measured(H200, {name: {"value": v, "source": "made up"} for name, v in TRUE.items()})


def ceilings_run():
    shape, records = SHAPES[CASE], []
    # torch's products of codes say nothing of ours
    for kind, slower in (("float", 1), ("int8", 3)):
        for (m, n, k), count in ceilings.products(shape, codes=kind != "float").items():
            seconds = slower * product_seconds(Product("library", (m,), (n,), k), 0, KNOWN)
            records.append(
                {"case": CASE, "contestant": f"{kind} {m}x{n}x{k}", "count": count, "ours": False}
                | {"seconds": seconds, "tflops": 2e-12 * m * n * k / seconds}
            )
    run = run_of(*records, kind="ceilings", day=1)
    found = {"copy": 4.2e12, "link": 5.1e10, "attention_forward": 6.0e14}
    return run | {"ceilings": {CASE: found | {"attention_backward": 5.0e14}}}


def sweep_run(day=2):
    records = []
    shapes = (((4608,), (3072, 3072, 15360), 3072), ((512, 4096), (3072,), 12288))
    for kind in ("int8_persistent", "half", "half_t"):
        for rows, cols, k in shapes:
            product = Product(kind, rows, cols, k)
            base = {"case": CASE, "contestant": f"{kind} {rows} {cols} {k}", "ours": True}
            base |= {"kind": kind, "rows": rows, "cols": cols, "k": k}
            base |= {"count": 38, "table": False, "tflops": 1.0}
            seconds = product_seconds(product, 0, KNOWN)
            records += [
                {**base, "mode": "best", "seconds": seconds},
                {**base, "mode": "slow", "seconds": 2 * seconds},
                {**base, "mode": "none", "reason": "out of shared memory"},
            ]
    return run_of(*records, kind="sweep", day=day)


def products_in_codes(contestant, slower):
    """A step's own records of its wide products, as two kernels."""
    found = products_of(SHAPES["512px-b1"], "int8")
    seconds = slower * sum(
        product_seconds(Product("int8", p.rows, p.cols, p.size[2]), 0, KNOWN) * count
        for p, count in found.items()
    )
    return [
        {"case": "512px-b1", "contestant": contestant, "mode": kernel, "ours": True}
        | {"seconds": share * seconds, "count": 218}
        for kernel, share in (("persistent_matmul_kernel", 0.75), ("matmul_kernel", 0.25))
    ]


def profile_run(busy=0.05, seconds=0.15):
    step = {"case": "512px-b1", "mode": "step", "ours": True, "seconds": seconds, "count": 3000}
    return run_of(
        {**step, "contestant": "fluxfast-int8+int8+device-modulation:full", "busy_seconds": busy},
        # it may have waited for the modulation
        {**step, "contestant": "fluxfast-int8+int8:full", "seconds": 9.0, "busy_seconds": busy},
        {**step, "contestant": "fluxfast-int8+int8+graphs:full", "busy_seconds": seconds - 0.006},
        {**step, "contestant": "fluxfast-int8+int8:full", "mode": "a_kernel"},
        *products_in_codes("fluxfast-int8+int8:full", 1),
        *products_in_codes("fluxfast-int8+int8:none", 2),
        kind="profile",
        day=3,
    )


def test_each_rate_is_found_again(tmp_path):
    """Times that the model gives at some rate give that rate: of the main loop, without waves."""
    stored = store(tmp_path, ceilings_run(), sweep_run(), profile_run())
    found = measured(stored, H200)
    values = {name: rate["value"] for name, rate in found.items()}
    for name, value in TRUE.items():
        # four digits are stored
        assert values[name] == pytest.approx(value, rel=1e-3), name
    assert values["memory"] == 4.2e12 and values["link"] == 5.1e10
    assert values["attention"] == 6.0e14 and values["attention_backward"] == 5.0e14
    assert values["launch"] == pytest.approx(0.15 / 3000)
    assert values["gap"] == pytest.approx(0.006 / 3000)
    assert all("NVIDIA H200, 2026-11-0" in rate["source"] for rate in found.values())
    assert "abc" in found["int8"]["source"]


def test_our_own_products_are_those_of_a_sweep_else_of_a_step(tmp_path):
    torchs = measured(store(tmp_path / "a", ceilings_run()), H200)
    assert not {"int8", "half", "e4m3"} & set(torchs) and "library" in torchs
    step = measured(store(tmp_path / "b", ceilings_run(), profile_run()), H200)
    assert step["int8"]["value"] == pytest.approx(TRUE["int8"], rel=1e-3)
    assert "2026-11-03" in step["int8"]["source"]
    both = measured(store(tmp_path / "c", ceilings_run(), sweep_run(), profile_run()), H200)
    assert "2026-11-02" in both["int8"]["source"] and "2026-11-01" in both["library"]["source"]


def test_a_step_that_keeps_the_gpu_busy_says_nothing_of_the_host(tmp_path):
    found = measured(store(tmp_path, profile_run(busy=0.149)), H200)
    assert "launch" not in found and "gap" in found


def test_a_time_that_no_rate_explains_is_taken_as_it_is():
    product = Product("int8", (4608,), (3072,), 3072)
    rate = rate_of([(product, 1, 1e-9)], "int8", H200)
    assert rate == pytest.approx(product.flops / 1e-9)


def test_results_of_no_gpu_and_of_two(tmp_path):
    with pytest.raises(ValueError, match="one GPU, got those of none"):
        measured_rates.gpu_of(store(tmp_path / "a", run_of(device="a CPU")))
    other = run_of(day=5)
    other["conditions"]["device"] = "NVIDIA A100"
    with pytest.raises(ValueError, match="got those of"):
        measured_rates.gpu_of(store(tmp_path / "b", run_of(), other))


def test_predictions_stand_beside_measurements(tmp_path):
    steps = run_of(
        record("fluxfast-int8+int8+graphs:full", 0.4),
        record("fluxfast-int8+int8:none", 0.3, case="512px-b1"),
        record("fluxfast+library+graphs:full", 0.4),
        record("fluxfast+tread+graphs:full", 0.3),
        record("fluxfast-int4+int8+streamed:full", 0.5),
        record("diffusers:full", 0.6),
        day=4,
    )
    stored = store(tmp_path, ceilings_run(), sweep_run(), steps)
    rows = {row["contestant"]: row for row in predicted.comparison(stored)}
    # a peer's time is not ours to predict, nor that of another engine than the table's
    assert set(rows) == {
        "fluxfast-int8+int8+graphs:full",
        "fluxfast-int8+int8:none",
        "fluxfast+tread+graphs:full",
        "fluxfast-int4+int8+streamed:full",
    }
    # slower products than assumed: the prediction moves towards them
    row = rows["fluxfast-int8+int8+graphs:full"]
    assert rates_of(H200)["int8"].value > TRUE["int8"]
    assert row["calibrated"] > row["predicted"] > 0.2
    page = report.summary(stored, "", None, {})
    assert "## predictions" in page
    ratio = f"{row['predicted'] / 0.4:.2f}"
    line = f"| fluxfast-int8+int8+graphs:full | 400.0 | {row['predicted'] * 1e3:.1f} | {ratio} |"
    assert line in page
    assert "none measured on such a GPU, and from measured rates (" in page


def test_a_cpu_has_no_predictions(tmp_path):
    stored = store(tmp_path, run_of(record("fluxfast:none", 0.1, case="small-b2"), device="a CPU"))
    assert predicted.comparison(stored) == []
    assert predicted.comparison_section(stored) == ""


@pytest.mark.parametrize("inside", ["", "nvidia-h200"])
def test_the_command_writes_what_was_measured(tmp_path, capsys, inside):
    store(tmp_path / "results", ceilings_run(), sweep_run())
    written = tmp_path / "rates.json"
    written.write_text(json.dumps({"H200": {"gap": {"value": 1e-6, "source": "before"}}}))
    words = ["--from-results", str(tmp_path / "results" / inside), "--rates", str(written)]
    assert main(["predict", *words]) == 0
    assert ", assumed" in capsys.readouterr().out
    found = rates.read(written)
    # what this run did not measure stays
    assert found["H200"]["gap"]["value"] == 1e-6
    assert found["H200"]["int8"]["value"] == pytest.approx(TRUE["int8"], rel=1e-3)
    gpu = with_measured(H200, found["H200"])
    assert rates_of(gpu)["int8"].measured and not rates_of(gpu)["fp32"].measured


def test_the_command_refuses_results_without_rates(tmp_path, capsys):
    store(tmp_path, run_of(record("fluxfast:none", 0.1)))
    assert main(["predict", "--from-results", str(tmp_path), "--rates", str(tmp_path / "r")]) == 1
    assert "no ceilings, sweep or profile" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_file_of_other_rates_is_named(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text('{"H200": {"speed": {"value": 1, "source": ""}}}')
    with pytest.raises(ValueError, match=r"rates\.json: expected .*H200 has speed"):
        rates.read(path)
