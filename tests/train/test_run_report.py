"""The page about a run: everything in it, of whole runs and of what is left of damaged ones."""

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from fluxfast.cli.main import main
from fluxfast.train.report import report_page, write_report
from fluxfast.train.run_events import RUN_FAILED
from fluxfast.train.run_lock import RunLock
from fluxfast.train.run_record import (
    DatasetRow,
    Prompt,
    RunRecord,
    read_run_record,
    write_run_record,
)

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "circle", "line", "path"}


class Page(HTMLParser):
    """A well-formed page: its texts by section, its tags, and the addresses that it names."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []
        self.heading, self.sections = "", {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.heading = data
        elif self.open and self.open[-1] != "style":
            self.sections.setdefault(self.heading, []).append(data.strip())

    def says(self, heading, *words):
        text = " ".join(self.sections[heading])
        return all(word in text for word in words)


def metrics(folder, steps, **more):
    lines = [
        {"step": i, "epoch": 1, "loss": 1 / i, "learning_rate": 1e-4, "steps_per_second": 2.0,
         "memory_gib": 3.5, **more}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def event(folder, type, job="a", **fields):
    with (folder / "events.jsonl").open("a") as stream:
        now = "2026-01-02T03:04:05.678+00:00"
        stream.write(json.dumps({"type": type, "job_id": job, "timestamp": now, **fields}) + "\n")


def stage(folder, key, status, job="a"):
    event(folder, "lifecycle.stage", job, stage={"key": key, "status": status})


def image(folder, step, nickname="cat", size=(32, 16), width=None):
    (folder / "validation_images").mkdir(exist_ok=True)
    name = f"step_{step}_{nickname}_0_{size[0]}x{size[1]}.png"
    picture = Image.new("RGB", (width or size[0], size[1]), "red")
    picture.save(folder / "validation_images" / name)


# ---- a real run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "output"


@pytest.fixture
def output(kept, run, tmp_path):
    """A copy of the folder of a run of six steps that drew two prompts."""
    if not kept.exists():
        library = tmp_path / "library.json"
        library.write_text(json.dumps({"dog": "a dog"}))
        lora, _ = run(
            validation_disable=False, validation_prompt=EVIL, user_prompt_library=str(library),
            validation_resolution="64", validation_num_inference_steps=1,
            validation_step_interval=3, tracker_run_name="my <run>", lr_scheduler="cosine",
        )  # fmt: skip
        shutil.copytree(lora.parent, kept)
    return shutil.copytree(kept, tmp_path / "copy")


def test_a_run_leaves_a_page_with_everything(output):
    text = (output / "report.html").read_text()
    page = Page(text)
    assert page.says("my <run>", "Complete", "6 of 6 steps")
    assert page.says("Times", "started", "time in steps")
    assert page.says("Validation images", "base", "step 3", "step 6", EVIL, "a dog")
    assert page.says("Config", "lora_rank", "learning_rate", "0.001", "options at their defaults")
    assert page.says("Datasets", "photos", "64 (pixel_area)", "textfile", "64x64: 4")
    assert page.says("Versions", "fluxfast", "torch", "device", "python")
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    titles = [svg.find("title").text for svg in drawn]
    assert titles == ["Training loss", "Learning rate", "Peak memory", "Time of a step"]
    assert all("step" in svg.find("desc").text or svg.find("desc").text for svg in drawn)


def test_the_page_needs_nothing_else_and_runs_nothing(output):
    text = report_page(output)
    page = Page(text)
    assert len(page.addresses) == 6
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\(|<link|https?://", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_record_of_a_run(output):
    record = read_run_record(output)
    assert (record.steps, record.seed, record.config["lora_rank"]) == (6, 11, 3)
    assert {"lora_rank", "seed", "learning_rate"} <= {*record.changed}
    assert not {"lora_dropout", "report_to"} & {*record.changed}
    assert [each.prompt for each in record.prompts] == [EVIL, "a dog"]
    assert record.datasets == (
        DatasetRow(id="photos", images=4, repeats=20, samples_per_epoch=84, cropped=True,
                   resolution="64 (pixel_area)", captions="textfile", sizes={"64x64": 4}),
    )  # fmt: skip
    assert [start.step for start in record.starts] == [0]
    write_run_record(output, record, step=4)
    assert [start.step for start in read_run_record(output).starts] == [0, 4]
    write_run_record(output, record, step=0)
    assert [start.step for start in read_run_record(output).starts] == [0]


LOST = {
    "run.json": "datasets, versions and most of the config",
    "metrics.jsonl": "losses",
    "events.jsonl": "how the run went",
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("left", [None, b"", b"\xff\x00{", b"[1, 2]\n", b'{"config": 5}\n'])
def test_lost_and_damaged_files_are_named(output, name, left):
    if left is None:
        (output / name).unlink(missing_ok=True)
    else:
        (output / name).write_bytes(left)
    page = Page(report_page(output))
    assert page.says("Missing", f"{name}: {LOST[name]}")
    assert page.says("Config", "lr_scheduler", "cosine")


def test_damaged_lines_checkpoints_and_images_are_named(output):
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join([*lines[:3], "{cut\n", *lines[3:]]))
    (output / "checkpoint-6" / "training_state.json").write_text("{")
    next((output / "validation_images").glob("step_000003_*")).write_bytes(b"no image")
    page = Page(report_page(output))
    assert page.says("Missing", "1 of 7 lines", "checkpoint-6/training_state.json")
    assert page.says("Validation images", "can't be read")
    assert len(page.addresses) == 5


# ---- runs that did not end well


@pytest.mark.parametrize(
    ("key", "status", "word"),
    [
        ("training_complete", "completed", "Complete"),
        ("training_abort", "completed", "Stopped"),
        ("checkpoint_save", "completed", "Interrupted"),
    ],
)
def test_how_a_run_ended(tmp_path, key, status, word):
    write_run_record(tmp_path, RunRecord(steps=10, config={"seed": 1}), step=0)
    metrics(tmp_path, 4)
    stage(tmp_path, key, status)
    page = Page(report_page(tmp_path))
    assert page.says(tmp_path.name, word, "4 of 10 steps")
    assert page.says("Times", "2026-01-02 03:04:05 UTC")


def test_an_error_is_shown_and_a_resumed_run_forgets_it(tmp_path):
    metrics(tmp_path, 2)
    stage(tmp_path, "init_data_backend", "running")
    event(tmp_path, "error", title="Validation has failed", message="no room")
    assert Page(report_page(tmp_path)).says(tmp_path.name, "Interrupted", "2 steps")
    event(tmp_path, "error", title=RUN_FAILED, message=EVIL)
    page = Page(report_page(tmp_path))
    assert page.says(tmp_path.name, "Failed", EVIL)
    assert page.says("Troubles", "UTC: Validation has failed: no room")
    stage(tmp_path, "init_data_backend", "running")
    with RunLock(tmp_path, print):
        assert Page(report_page(tmp_path)).says(tmp_path.name, "Running", "2 steps")
    assert Page(report_page(tmp_path)).says(tmp_path.name, "Interrupted")


def test_a_run_that_came_to_its_end_is_complete_without_its_events(tmp_path):
    write_run_record(tmp_path, RunRecord(steps=2, config={"seed": 1}), step=0)
    metrics(tmp_path, 2)
    assert Page(report_page(tmp_path)).says(tmp_path.name, "Complete", "2 of 2 steps")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds nothing of a run"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        write_report(tmp_path / "nowhere")


# ---- what it shows


def test_every_text_is_escaped(tmp_path):
    record = RunRecord(
        config={"tracker_run_name": EVIL, EVIL: EVIL},
        changed=(EVIL,),
        datasets=(DatasetRow(id=EVIL, kind=EVIL, images=1, sizes={EVIL: 1}),),
        prompts=(Prompt(nickname="cat", file="cat", prompt=EVIL),),
        versions={EVIL: EVIL},
    )
    write_run_record(tmp_path, record, step=0)
    metrics(tmp_path, 3)
    evaluated = {"step": 3, f"loss/val/{EVIL}": 0.5}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(evaluated) + "\n")
    event(tmp_path, "error", title=EVIL, message=EVIL)
    image(tmp_path, 3)
    image(tmp_path, 3, nickname="<b>")
    page = Page(report_page(tmp_path))
    assert "script" not in page.tags
    assert "b" not in page.tags
    for heading in ("Datasets", "Versions", "Config", "Troubles", "Validation images"):
        assert page.says(heading, EVIL)


def test_losses_are_drawn_apart(tmp_path):
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 9.0, "regularisation_loss": 3.0},
        {"step": 3, "loss": 2.0},
    ]
    evaluated = [
        {"step": 0, "loss/val/a": 0.5, "loss/val/b": 0.25, "loss/val/pooled": 0.375},
        {"step": 2, "clip/mean": 20.5, "clip/std": 1.0},
        {"step": 3, "loss/val/a": 0.375, "loss/val/pooled": 0.375},
    ]
    for name, values in (("metrics", lines), ("evaluations", evaluated)):
        text = "".join(json.dumps(line) + "\n" for line in values)
        (tmp_path / f"{name}.jsonl").write_text(text)
    text = report_page(tmp_path)
    described = dict(
        zip(
            re.findall("<title id.*?>(.*?)<", text),
            re.findall("<desc.*?>(.*?)<", text),
            strict=True,
        )
    )
    assert described == {
        "Training loss": "each step: 1 at 1, 2 at 3, lowest 1 at 1; mean of 1 steps: 1 at 1, 2 at "
        "3, lowest 1 at 1; regularisation: 3 at 2, 3 at 2, lowest 3 at 2",
        "Evaluation loss": "held out: a: 0.5 at 0, 0.375 at 3, lowest 0.375 at 3; held out: b: "
        "0.25 at 0, 0.25 at 0, lowest 0.25 at 0",
        "CLIP score": "mean: 20.5 at 2, 20.5 at 2, lowest 20.5 at 2",
    }


def test_the_grid_has_the_base_first_and_not_too_many_columns(tmp_path):
    for step in range(0, 220, 10):
        image(tmp_path, step, width=64 if step else 32)
    image(tmp_path, 210, nickname="cat_ema", width=64)
    cat = Prompt(nickname="cat", file="cat", prompt="a cat")
    write_run_record(tmp_path, RunRecord(prompts=(cat,)), step=0)
    page = Page(report_page(tmp_path))
    told = [text for text in page.sections["Validation images"] if text]
    assert told[:8] == [
        "Images of 15 more steps are in validation_images.",
        "base", "step 10", "step 50", "step 90", "step 130", "step 170", "step 210",
    ]  # fmt: skip
    # with the moving average only the last was drawn; the base is the same
    assert told.count("not drawn") == 5
    assert told.count("a cat") == 2
    assert len(page.addresses) == 9


def test_prompts_are_found_by_the_names_of_files():
    prompts = tuple(Prompt(nickname=n, file=n, prompt=f"a {n}") for n in ("cat", "cat_dog"))
    record = RunRecord(prompts=prompts)
    for name, prompt in (
        ("cat", "a cat"), ("cat_ema", "a cat"), ("cat_dog", "a cat_dog"),
        ("cat_dog_ema_style", "a cat_dog"),
    ):  # fmt: skip
        assert record.prompt_of(name).prompt == prompt
    assert record.prompt_of("cats") is None
    assert RunRecord().prompt_of("cat") is None


def test_the_command(output, tmp_path, capsys):
    (output / "report.html").unlink()
    assert main(["report", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output / "report.html")
    assert (output / "report.html").exists()
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "holds nothing of a run" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert main(["report", "--help"]) == 0
    assert "report.html" in capsys.readouterr().out


def test_a_page_that_can_not_be_written_is_told_once(run, monkeypatch):
    def broken(folder):
        raise OSError("the disk is gone")

    monkeypatch.setattr("fluxfast.train.ending.write_report", broken)
    lora, out = run(max_train_steps=2)
    assert lora.exists()
    assert "report.html: the disk is gone; the run goes on without" in out.getvalue()
