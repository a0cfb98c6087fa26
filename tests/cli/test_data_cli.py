"""`fluxfast-train data` as a user meets it: tables, exit status, sheets and JSON."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from fluxfast.cli.main import main


@pytest.fixture
def root(tmp_path):
    """Configs and a folder of seven images: one twice, one damaged, a caption file too many."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        pixels.resize((128, 64 if i < 4 else 128)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"caption {i}")
    (images / "copy [of] 1.png").write_bytes((images / "1.png").read_bytes())
    (images / "copy [of] 1.txt").write_text("long " * 700)
    (images / "5.png").write_bytes((images / "5.png").read_bytes()[:-100])
    (images / "alone.txt").write_text("x")
    write(tmp_path)
    return tmp_path


def write(root, *more, **dataset):
    data = [
        *more,
        {
            "id": "a/b",
            "type": "local",
            "instance_data_dir": str(root / "images"),
            "caption_strategy": "textfile",
            "resolution": 128,
            **dataset,
        },
        {"id": "t", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]
    (root / "data.json").write_text(json.dumps(data))
    config = {
        "model_type": "lora",
        "model_family": "flux",
        "pretrained_model_name_or_path": str(root / "absent"),
        "data_backend_config": str(root / "data.json"),
        "output_dir": str(root / "out"),
        "cache_dir": str(root / "cache"),
        "train_batch_size": 2,
        "max_train_steps": 1,
    }
    (root / "config.json").write_text(json.dumps(config))


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--images N" in printed and "at most 8 of 144 bits" in printed


def test_a_dataset_is_shown(root, capsys):
    words = ["data", str(root / "config.json"), "--json", str(root / "report.json")]
    assert main([*words, "--train_batch_size=4"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "7 images found, 6 used, 1 left out; 6 samples an epoch in batches of 4",
        "5.png (truncated)",
        "equal files: 2 in 1 group\n  1.png = copy [of] 1.png",
        "captions: 6, estimated",
        "over the 512 tokens where T5 cuts: 1\n  copy [of] 1.png: 877 tokens: long long",
        "caption files without an image: 1\n  alone.txt",
    ):
        assert part in printed
    report = json.loads((root / "report.json").read_text())
    (dataset,) = report["datasets"]
    assert report["can_start"] and dataset["equal_files"] == [["1.png", "copy [of] 1.png"]]
    assert [(each["images"], each["batches"], each["filled"]) for each in dataset["buckets"]] == [
        (1, 1, 3),
        (5, 2, 3),
    ]
    with Image.open(dataset["sheet"]) as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000
    assert f"contact sheet: {dataset['sheet']}" in printed
    assert dataset["sheet"].startswith(str(root / "out" / "data-report"))


def test_a_run_that_could_not_start(root, capsys):
    write(root, minimum_image_size=1000)
    assert main(["data", str(root / "config.json"), "--json", str(root / "report.json")]) == 1
    captured = capsys.readouterr()
    assert (
        "none of them usable" in captured.err and "smaller than minimum_image_size" in captured.err
    )
    assert "Traceback" not in captured.err and "left out, smaller than" in captured.out
    assert json.loads((root / "report.json").read_text())["can_start"] is False
    assert main(["data", str(root / "config.json"), "--train_batch_size=100"]) == 1
    write(root)
    assert main(["data", str(root / "config.json"), "--train_batch_size=100"]) == 1
    assert 'Set "repeats": 16' in capsys.readouterr().err


def test_mistakes(root, capsys):
    assert main(["data", str(root / "config.json"), "--learnin_rate=1"]) == 2
    assert "learnin_rate" in capsys.readouterr().err
    write(root, instance_data_dir=str(root / "nowhere"))
    assert main(["data", str(root / "config.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", str(root / "config.json"), "--images", "-1"])
    assert "expected 0 to 1000" in capsys.readouterr().err


def test_sheets_never_lie_where_a_run_would_take_them_for_images(root, capsys):
    inside = root / "images" / "sheets"
    assert main(["data", str(root / "config.json"), "--out", str(inside)]) == 1
    assert "take the sheets for its images" in capsys.readouterr().err and not inside.exists()
    elsewhere = root / "sheets"
    assert main(["data", str(root / "config.json"), "--out", str(elsewhere), "--images", "2"]) == 0
    assert len(list(elsewhere.iterdir())) == 1
    # the output folder is never read, wherever it lies
    words = ["data", str(root / "config.json"), f"--output_dir={root / 'images' / 'out'}"]
    for _ in range(2):
        assert main(words) == 0
        assert "7 images found" in capsys.readouterr().out


@pytest.fixture
def paired(root):
    """Masks of the images 0 and 1, one of another shape, none of 3, and one of no image."""
    (root / "masks").mkdir()
    for name, size in (("0", (128, 64)), ("copy [of] 1", (256, 128)), ("2", (99, 99))):
        Image.new("L", size, 255).save(root / "masks" / f"{name}.png")
    for name in ("1.bmp", "4.png", "no [b]one.png"):
        Image.new("RGB", (128, 64) if name[0] == "1" else (128, 128)).save(root / "masks" / name)
    masks = {
        "id": "masks",
        "type": "local",
        "dataset_type": "conditioning",
        "conditioning_type": "mask",
        "instance_data_dir": str(root / "masks"),
        "source_dataset_id": "a/b",
    }
    write(root, masks)
    return root


def test_pairs_are_shown(paired, capsys):
    report, config = paired / "report.json", str(paired / "config.json")
    assert main(["data", config, "--json", str(report)]) == 1
    captured = capsys.readouterr()
    for part in (
        "a/b: conditioning datasets",
        # pairs, missing, unfit, orphans, another extension
        r"masks\s.*mask\s.*\b4\s.*\b1\s.*\b1\s.*\b1\s.*\b1\b",
        "masks: images without a mask: 1\n  3.png",
        r"masks: images whose mask has another shape: 1\n  2.png \(128x64 and 99x99\)",
        r"masks: files that belong to no image: 1\n  no \[b\]one.png",
    ):
        assert re.search(part, captured.out), part
    assert "1 image of" in captured.err and '"a/b" without a mask' in captured.err
    (dataset,) = json.loads(report.read_text())["datasets"]
    assert dataset["conditioning"] == [
        {
            "id": "masks",
            "kind": "mask",
            "folder": str(paired / "masks"),
            "pairs": 4,
            "missing": {"3.png": ""},
            "unfit": {"2.png": "128x64 and 99x99"},
            "orphans": ["no [b]one.png"],
            "other_extension": 1,
        }
    ]
    for name in ("2", "3"):
        Image.new("L", (128, 64)).save(paired / "masks" / f"{name}.png")
    assert main(["data", config]) == 0
    assert "without a mask" not in capsys.readouterr().out


def test_sheets_never_lie_among_masks(paired, capsys):
    inside = paired / "masks" / "sheets"
    assert main(["data", str(paired / "config.json"), "--out", str(inside)]) == 1
    assert 'folder of dataset "masks"' in capsys.readouterr().err and not inside.exists()


def test_no_sheets(root, capsys):
    assert main(["data", str(root / "config.json"), "--images", "0"]) == 0
    assert "contact sheet" not in capsys.readouterr().out and not (root / "out").exists()


def test_lists_are_short_unless_all_are_asked_for(root, capsys):
    for i in range(9):
        (root / "images" / f"broken {i}.png").write_bytes(b"no image")
    words = ["data", str(root / "config.json"), "--images", "0"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "left out, unreadable: 10" in printed and "… and 5 more (--all names them)" in printed
    assert main([*words, "--all"]) == 0
    printed = capsys.readouterr().out
    assert all(f"broken {i}.png" in printed for i in range(9)) and "more (--all" not in printed


def test_it_needs_no_models(root):
    """Neither diffusers nor transformers is imported, which take seconds."""
    import subprocess
    import sys

    code = (
        "import sys; from fluxfast.cli.main import main; "
        f"assert main(['data', {str(root / 'config.json')!r}, '--images', '2']) == 0; "
        "assert not {'diffusers', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
