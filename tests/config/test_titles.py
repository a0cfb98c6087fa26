"""What a run is called that has no name."""

from pathlib import Path

import pytest

from config_helpers import load
from fluxfast.config.titles import title_of


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")


@pytest.mark.parametrize(
    ("folder", "prompt", "title"),
    [
        ("output/cat-lora", "a photo of sks cat", "cat-lora"),
        ("output/cat-lora/", None, "cat-lora"),
        ("output", "a photo of\n sks cat", "a photo of\\n sks cat"),
        ("Output/Models", "", "project"),
        ("simpletuner-results", None, "project"),
        ("/data/cats/output", None, "cats"),
        ("/output", None, "flux-lora"),
        ("..", None, "{parent}"),
        ("/", None, "flux-lora"),
    ],
)
def test_the_folder_or_the_prompt(tmp_path, folder, prompt, title):
    assert title_of(Path(folder), prompt) == title.format(parent=tmp_path.name)


def test_the_home_folder_is_no_title(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    assert title_of(Path("output"), None) == tmp_path.name


def test_what_the_config_says_stays():
    config = load(output_dir="output/cat-lora")
    assert (config.tracker_run_name, config.tracker_project_name) == ("cat-lora", "cat-lora")
    config = load(output_dir="output", instance_prompt="sks cat / night")
    assert config.tracker_run_name == "sks cat / night"
    assert config.tracker_project_name == "sks-cat-night"
    config = load(tracker_run_name="simpletuner-testing", tracker_project_name="my project")
    assert config.tracker_run_name == "simpletuner-testing"
    assert config.tracker_project_name == "my project"
    config = load(output_dir="output/cat-lora", tracker_run_name="", tracker_project_name=None)
    assert (config.tracker_run_name, config.tracker_project_name) == ("cat-lora", "cat-lora")
