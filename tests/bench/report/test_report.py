"""`fluxfast-bench report`: what the tables and the page hold."""

from pathlib import Path

import pytest
from stored_runs import record, run_of, store

from fluxfast_bench.main import COMMANDS, main
from fluxfast_bench.report import report, results
from fluxfast_bench.report.headline import headline

ROOT = Path(__file__).resolve().parents[3]

README = (
    "# name\n\n<!-- bench:step -->\nold\n<!-- /bench -->\n\nwords\n\n<!-- bench:plots -->\n<!-- "
    "/bench -->\n"
)


def test_the_tables_are_made_from_the_newest_results(tmp_path, capsys):
    root, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(README)
    old = run_of(record("fluxfast:full", 9.0))
    new = run_of(
        record("diffusers:full", 1.5),
        record("fluxfast:full", 1.0),
        record("bnb-nf4:full", 0, reason="no GPU"),
        day=2,
    )
    store(root, old, new)
    words = ["--results", str(root), "--readme", str(readme)]
    assert main(["report", *words, "--check"]) == 1
    assert readme.read_text() == README
    assert main(["report", *words]) == 0
    text = readme.read_text()
    assert (
        "| **fluxfast, unquantised** | full | 1000.0 | 1000.0 … 1000.0 | 1.50 | 15.0 | 80% |"
        in text
    )
    assert text.index("fluxfast, unquantised") < text.index("diffusers + PEFT, eager | full")
    assert (
        "Not measured: bnb-nf4:full (no GPU)." in text
        and "9000" not in text
        and "\nold\n" not in text
    )
    assert "driver 580" in text and "words" in text
    assert "![step on nvidia-h200](results/nvidia-h200/step.png)" in text
    assert (root / "nvidia-h200" / "step.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", *words, "--check"]) == 0
    capsys.readouterr()


def test_scaling_is_drawn_where_there_are_several_cases(tmp_path):
    one = record("fluxfast:full", 1.0)
    more = [
        record("fluxfast:full", 0.4, case="512px-b1", tokens=1536),
        record("fluxfast:full", 0.7, case="512px-b2", tokens=1536, batch=2),
    ]
    store(tmp_path, run_of(one, *more))
    page = tmp_path / "out" / "summary.md"
    assert main(["report", "--results", str(tmp_path), "--summary", str(page)]) == 0
    text = page.read_text()
    assert "![scaling on nvidia-h200](../nvidia-h200/scaling.png)" in text
    assert text.count("**fluxfast, unquantised**") == 3


def test_a_readme_without_places_and_one_with_a_wrong_one(tmp_path, capsys):
    readme = tmp_path / "README.md"
    for text, message in (
        ("nothing", "has no place for a table"),
        ("<!-- bench:luck -->\n<!-- /bench -->", "no such table"),
    ):
        readme.write_text(text)
        assert main(["report", "--results", str(tmp_path), "--readme", str(readme)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=str)
def test_these_documents_are_what_report_makes(document):
    root, text = ROOT / results.ROOT, (ROOT / document).read_text(encoding="utf-8")
    assert report.MARKED.search(text)
    assert report.render(text, results.read_all(root), root, ROOT / document) == text


def test_every_command_is_in_the_benchs_document():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "bench/README.md")]
    marked = [{match.group(2) for match in report.MARKED.finditer(text)} for text in texts]
    # the README has the results in short, the bench's document everything else
    assert marked[0] == {report.RESULTS, "trainers"}
    assert marked[1] == set(report.NAMES) - marked[0]
    text = texts[1]
    assert all(f"| `{name}` |" in text for name in COMMANDS)


def test_all_documents_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store(Path("bench/results"), run_of(record("fluxfast:full", 1.0)))
    Path("README.md").write_text("<!-- bench:results -->\n<!-- /bench -->\n")
    Path("bench/README.md").write_text("<!-- bench:commands -->\n<!-- /bench -->\n")
    assert main(["report", "--check"]) == 1
    told = capsys.readouterr().err
    assert "\nbench/README.md is not what" in told and told.startswith("README.md is not what")
    assert main(["report"]) == main(["report", "--check"]) == 0


def test_the_headline_is_of_a_gpu_once_there_is_one(tmp_path):
    peers = {"diffusers:none": 3.0, "fluxfast:none": 2.0}
    cpu = [record(name, seconds, case="small-b2") for name, seconds in peers.items()]
    runs = [run_of(*cpu, day=9, device="A CPU"), run_of(record("fluxfast:full", 1.0), day=8)]
    text = headline(store(tmp_path, *runs), tmp_path)
    # the GPU's run has no peer
    row = "| training step, CPU, unquantised | **2000 ms** | 3000 ms (diffusers + PEFT, eager) |"
    assert row in text and "Training step: a small model, small-b2" in text
    assert "GPU memory" not in text
    gpu = run_of(record("fluxfast:full", 1.0), record("diffusers:full", 1.5), day=1)
    text = headline(store(tmp_path, gpu), tmp_path)
    assert "| training step, GPU, unquantised | **1000 ms** | 1500 ms" in text
    assert "CPU" not in text and "Training step: FLUX.1-dev, 1024px-b1" in text


def test_without_results_there_is_no_headline(tmp_path):
    assert headline([], tmp_path) == ""
