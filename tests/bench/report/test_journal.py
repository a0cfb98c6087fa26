"""A run's results while it runs: written one by one, and read when the run was cut short."""

import pytest

from fluxfast_bench.main import main
from fluxfast_bench.report import report, results
from fluxfast_bench.report.results import Journal
from fluxfast_bench.step import worker

RUN = {
    "date": "2026-11-27T10:00:00Z",
    "device": "Some CPU",
    "commit": "abc",
    "command": "fluxfast-bench step",
    "versions": {},
}


def record(contestant, **more):
    return {"case": "tiny", "contestant": contestant, "ours": False, **more}


def test_what_was_written_is_there_at_once(tmp_path):
    journal = Journal(tmp_path, "step", RUN)
    assert results.read_all(tmp_path)[0].records == []
    journal.note(ceilings={"tiny": {"copy": 1.0}})
    journal.note(ceilings={"long": {"copy": 2.0}})
    journal.record(record("a", seconds=1.0))
    journal.record(record("b", seconds=2.0))
    journal.record(record("a", seconds=3.0))
    (cut,) = results.read_all(tmp_path)
    assert cut.cut and cut.kind == "step" and cut.device == "some-cpu"
    # the later one of the same name, in the earlier one's place
    assert [(r["contestant"], r["seconds"]) for r in cut.records] == [("a", 3.0), ("b", 2.0)]
    assert cut.data["ceilings"] == {"tiny": {"copy": 1.0}, "long": {"copy": 2.0}}
    path = journal.finish()
    (whole,) = results.read_all(tmp_path)
    assert whole.path == path and not whole.cut and whole.data == cut.data
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_line_that_was_being_written_is_left_out(tmp_path):
    journal = Journal(tmp_path, "step", RUN)
    journal.record(record("a", seconds=1.0))
    (path,) = tmp_path.glob("*/*.jsonl")
    whole = path.read_text()
    path.write_text(whole + '{"record": {"case": "ti')
    assert [r["contestant"] for r in results.read(path).records] == ["a"]
    path.write_text("")
    with pytest.raises(ValueError, match="not a result"):
        results.read(path)
    path.write_text(whole + "something else\n")
    with pytest.raises(ValueError, match="not a result"):
        results.read(path)


def test_a_step_that_is_killed_keeps_what_it_had(tmp_path, monkeypatch):
    def events(job, *args, limit):
        if job == "ceilings":
            yield (
                "ceilings",
                "tiny",
                {
                    "copy": 1e10,
                    "float": 1e11,
                    "attention_forward": 1e11,
                    "attention_backward": 1e11,
                },
            )
            return
        for key in ("diffusers:none", "fluxfast:none"):
            yield ("start", key)
            yield ("ready", key, {"tiny": {"relative_error": 0.0}})
        yield ("round", "diffusers:none", "tiny", [2.0, 2.0])
        yield ("round", "fluxfast:none", "tiny", [1.0, 1.0])
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "run_apart", events)
    arguments = ["--device", "cpu", "--shapes", "tiny", "--contestants", "diffusers,fluxfast"]
    with pytest.raises(KeyboardInterrupt):
        main(["step", *arguments, "--results", str(tmp_path)])
    (cut,) = results.read_all(tmp_path)
    peer, ours = cut.records
    assert cut.cut and (peer["seconds"], ours["seconds"]) == (2.0, 1.0)
    assert ours["ratios"] == {"diffusers:none": 2.0} and ours["floor_share"] > 0
    assert main(["report", "--results", str(tmp_path), "--summary", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "**fluxfast, unquantised** | none | 1000.0" in page and "(cut short)" in page


def test_stored_ceilings_are_taken(tmp_path, monkeypatch):
    asked = []

    def events(job, *args, limit):
        asked.append(job)
        if job == "measure":
            yield ("failed", "diffusers:none", "not today")
        yield ("done",)

    monkeypatch.setattr(worker, "run_apart", events)
    from fluxfast_bench.step import step

    monkeypatch.setattr(step, "device_name", lambda device: RUN["device"])
    journal = Journal(tmp_path, "ceilings", RUN)
    journal.note(ceilings={"tiny": {"copy": 1.0}})
    words = ["--device", "cpu", "--shapes", "tiny", "--contestants", "diffusers", "--results"]
    arguments = [*words, str(tmp_path)]
    main(["step", *arguments])
    main(["step", *arguments, "--stored-ceilings"])
    assert asked == ["ceilings", "measure", "measure"]
    newest = [r for r in results.read_all(tmp_path) if r.kind == "step"]
    assert [r.data["ceilings"] for r in newest] in (
        [{}, {"tiny": {"copy": 1.0}}],
        [{"tiny": {"copy": 1.0}}],
    )


def test_a_page_says_what_was_compiled_checked_and_timed():
    def result(kind, *records):
        return results.Result(
            "gpu", tmp, {"kind": kind, "conditions": RUN, "records": list(records)}
        )

    tmp = results.ROOT / "gpu" / "x.json"
    product = {"case": "1024px-b1", "contestant": "int8 1x2x3", "ours": True, "count": 10}
    stored = [
        result(
            "prewarm",
            {
                "case": "sm_90",
                "contestant": "k()",
                "ours": True,
                "seconds": 1.0,
                "reason": "no such type",
            },
        ),
        result(
            "smoke", record("op:gelu", relative_error=0.001), record("fluxfast", reason="wrong: 2")
        ),
        result(
            "ceilings",
            record("copy", gb_s=3000.0),
            record("float 1x2x3", seconds=1e-3, tflops=600.0),
        ),
        result(
            "sweep",
            {**product, "mode": "a", "table": True, "seconds": 3e-3, "tflops": 1.0},
            {**product, "mode": "b", "table": False, "seconds": 1e-3, "tflops": 3.0},
            {
                **product,
                "contestant": "int8 4x5x6",
                "mode": "a",
                "table": True,
                "reason": "no room",
            },
        ),
        result(
            "profile",
            record("fluxfast", mode="step", seconds=0.2, busy_seconds=0.1, count=9),
            record("fluxfast", mode="matmul_kernel", seconds=0.1, count=9),
        ),
    ]
    page = report.summary(stored, "", None, {})
    assert "- sm_90 k(): no such type" in page
    assert "1 of 2 right.\n\n- tiny fluxfast: wrong: 2" in page
    assert "| tiny | copy |  | 3000 GB/s |" in page
    assert "| 1024px-b1 | int8 1x2x3 | b | 1000.0 | 3.0 | 3000.0 | 20.00 |" in page
    assert "- 1024px-b1 int8 4x5x6: no room" in page
    assert (
        "tiny, fluxfast: 200.0 ms, 100.0 of them in kernels." in page
        and "| `matmul_kernel` | 9 | 100.00 |" in page
    )
