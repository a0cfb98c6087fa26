"""Write the parts of docs/ that are made of the code: the options, and the table of VRAM.

    python tools/make_docs.py           # writes what has changed
    python tools/make_docs.py --check   # exits with 1 if something would change

`tests/docs` holds both current.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fluxfast.cli.keys import as_markdown
from fluxfast.cli.plan import plan_report
from fluxfast.config.run import load_config
from fluxfast.files import write_atomic

DOCS = Path(__file__).parents[1] / "docs"
PRECISIONS = ("no_change", "int8-quanto", "int4-quanto", "nf4-bnb", "int2-quanto")
# decides whether modulation is computed on the host; nothing is chosen to make a run fit
GPU = "RTX 4090"
# what the columns of the table change
COLUMNS = (
    {"resolution": 512},
    {"resolution": 1024},
    {"resolution": 1024, "enable_group_offload": True, "group_offload_use_stream": True},
)
CONFIG = {
    "model_type": "lora",
    "model_family": "flux",
    "model_flavour": "dev",
    "lora_rank": 16,
    "lora_dropout": 0.0,
    "flux_lora_target": "all+ffs",
    "optimizer": "adamw_bf16",
    "train_batch_size": 1,
    "max_train_steps": 1000,
    # products on codes kept in both orders would take room that is there on this GPU alone
    "compute_precision": "same",
}


def pages() -> dict[Path, str]:
    """Each page that is made, or has a part that is, as it should be."""
    quickstart = DOCS / "quickstart.md"
    return {
        DOCS / "options.md": as_markdown(),
        quickstart: with_part(quickstart.read_text(encoding="utf-8"), "vram", list(vram_rows())),
    }


def vram_rows() -> Iterator[str]:
    """The table of VRAM, in lines of Markdown."""
    yield "| `base_model_precision` | 512 px | 1024 px | 1024 px, blocks streamed |"
    yield "| --- | --- | --- | --- |"
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            cells = [f"{_needed(Path(folder), precision, column):.1f} GiB" for column in COLUMNS]
            yield f"| `{precision}` | {' | '.join(cells)} |"


def _needed(folder: Path, precision: str, changes: dict) -> float:
    """GiB that a step needs."""
    resolution = changes["resolution"]
    datasets = [
        {
            "id": "images", "type": "local", "instance_data_dir": str(folder),
            "caption_strategy": "textfile", "resolution": resolution, "crop": True,
        },
        {"id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(datasets))
    config = CONFIG | changes | {
        "base_model_precision": precision,
        "data_backend_config": str(folder / "data.json"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return plan_report(load_config(folder / "config.json"), GPU)["vram_needed"] / 2**30


def with_part(page: str, name: str, lines: list[str]) -> str:
    """The page with other lines between `<!-- table: name -->` and `<!-- /table -->`."""
    before, begins, rest = page.partition(f"<!-- table: {name} -->\n")
    _, ends, after = rest.partition("\n<!-- /table -->")
    assert begins and ends, f"no table {name}"
    return before + begins + "\n".join(lines) + "\n" + ends + after


def main(words: list[str]) -> int:
    changed = [
        (path, text)
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in changed:
        print(path)
        if "--check" not in words:
            write_atomic(path, text.encode())
    return int("--check" in words and bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
