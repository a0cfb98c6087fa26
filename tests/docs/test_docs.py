"""What docs/ says: its commands run, its links lead somewhere, and what is made of the code is."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from fluxfast.cli.main import main
from fluxfast.config.describe import keys, sections
from fluxfast.config.run_fields import TrainFields
from fluxfast.config.simpletuner import options
from fluxfast.demo.pipeline import make_pipeline
from fluxfast.train.control import STOPPED_EXIT
from fluxfast.train.events import read_evaluations
from photographs import PHOTOGRAPHS, photographs

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
TINY = {
    "in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 64,
    "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
# what the test makes smaller, and nothing else of a page's config
SMALL = {
    "max_train_steps": 4, "lr_warmup_steps": 1, "checkpoint_step_interval": 2,
    "validation_step_interval": 2, "validation_resolution": "64x48",
    "validation_num_inference_steps": 2,
}  # fmt: skip


def files_of(page):
    """The files that a page shows, by name: blocks after `<!-- file: NAME -->`."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- file: (\S+) -->\n```json\n(.*?)```", text, re.DOTALL))


def commands_of(page):
    """fluxfast-train's commands in the bash blocks of a page that shows their files, as words."""
    # README installs and shows the demo outside that
    text = page.read_text(encoding="utf-8").split("<!-- file:", 1)[1].split("\n## The demo")[0]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder, TINY)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, pipeline):
    """A folder with images, in which a page's files are written as they are, but small."""
    for name, chosen in (("my-subject", photographs()[:3]), ("held-out", photographs()[3:5])):
        (tmp_path / "datasets" / name).mkdir(parents=True)
        for path in chosen:
            target = tmp_path / "datasets" / name / f"{path.stem}.png"
            with Image.open(path) as image:
                image.convert("RGB").resize((128, 96)).save(target)
            target.with_suffix(".txt").write_text(PHOTOGRAPHS[path.name])

    def write(page):
        for name, text in files_of(page).items():
            content = json.loads(text)
            if isinstance(content, dict):
                content["pretrained_model_name_or_path"] = str(pipeline)
                content |= {key: value for key, value in SMALL.items() if key in content}
            else:
                for dataset in content:
                    if "resolution" in dataset:
                        dataset["resolution"] //= 16
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))

    monkeypatch.chdir(tmp_path)
    return write


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/low-vram.md"])
def test_the_commands_run(project, tmp_path, name, capsys):
    page = ROOT / name
    project(page)
    commands = commands_of(page)
    assert len(commands) >= 2 and all(words[0] == "fluxfast-train" for words in commands)
    for words in commands:
        assert main(words[1:]) == 0, capsys.readouterr().err
    if name != "docs/quickstart.md":
        folder = {"README.md": "my-subject", "docs/low-vram.md": "small"}[name]
        assert (tmp_path / "output" / folder / "pytorch_lora_weights.safetensors").exists()
        return
    output = tmp_path / "output" / "my-subject"
    table = page.read_text().split("leaves in `output/my-subject`:")[1].split("Stop it")[0]
    told = [word for row in table.splitlines() for word in re.findall(r"`([^`]+)`", row[:80])]
    for left in told:
        # steps are fewer here
        left = left.replace("000250", "000002").replace("250", "2").split(" ")[0]
        if left.startswith("grid"):
            left = f"validation_images/{left}"
        assert (output / left).exists(), left
    steps = [line["step"] for line in read_evaluations(output / "evaluations.jsonl")]
    assert steps == [0, 2, 4]


def test_the_files_are_small_in_nothing_that_they_say(project):
    """Every page's config is loaded as it is, too."""
    from fluxfast.config.datasets import DatasetDefaults, load_data_config
    from fluxfast.config.run import load_config

    for page in PAGES:
        for name, text in files_of(page).items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)
            if name.endswith("multidatabackend.json"):
                assert load_data_config(name, defaults=DatasetDefaults()).images
            else:
                assert load_config(name).notes is not None


def test_what_is_made_of_the_code_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    sys.modules.pop("make_docs", None)
    import make_docs

    for path, text in make_docs.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run python tools/make_docs.py ({path})"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name).resolve()
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in titles}
            assert anchor in known, f"{page.name}: {target} ({known})"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_keys_that_pages_name_exist(page):
    """A word in quotes with a value after it, as a config has it, is a key that is there."""
    known = {key.name for key in keys()} | {"enable", "params", "label", "path"}
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`\"(\w+)\": ", text)
    assert set(named) <= known, set(named) - known


def test_each_field_is_in_the_options_once():
    listed = [(key.section, key.name) for key in keys()]
    assert len(set(listed)) == len(listed)
    names = {key.name for key in keys()}
    assert {"lora_rank", "eval_timesteps", "instance_data_dir", "conditioning_type"} <= names
    by_name = {key.name: key for key in keys()}
    assert by_name["lora_type"].values == "standard, lycoris"
    assert by_name["model_type"].default == "required"
    assert by_name["cuda_graphs"].values == "true, false or auto" and by_name["cuda_graphs"].ours
    # what is not marked as ours is SimpleTuner's, or a dataset's
    run = [key for key in keys() if issubclass(TrainFields, sections()[key.section])]
    assert {key.name for key in run} == set(TrainFields.model_fields)
    assert all(key.meaning for key in keys())
    assert all(key.ours or key.name in options() for key in run)


def test_keys_are_searched(capsys):
    assert main(["keys", "lora-rank"]) == 0
    assert "lora_rank = 16 (whole number at least 1): Rank" in capsys.readouterr().out
    assert main(["keys", "lora_rnk"]) == 1
    assert 'did you mean "lora_rank"' in capsys.readouterr().err
    assert main(["keys", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def test_keys_fit_a_terminal(capsys, monkeypatch):
    def printed(*words):
        assert main(["keys", *words]) == 0
        return capsys.readouterr().out

    piped = printed("caption")
    assert max(map(len, piped.splitlines())) > 80
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    wrapped, every = printed("caption"), printed()
    assert max(map(len, wrapped.splitlines())) <= 80
    assert wrapped.split() == piped.split()
    assert max(map(len, every.splitlines())) == 80
    assert len(every.splitlines()) == len(list(keys())) + len({key.section for key in keys()})


def test_exit_codes_are_told(capsys):
    assert str(STOPPED_EXIT) in (ROOT / "docs" / "training.md").read_text()
    assert main(["train", "--help"]) == 0
    assert str(STOPPED_EXIT) in capsys.readouterr().out
