"""The last lines of a run, and its report: what was made, where it lies, and how to use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.find_lora import header_of
from fluxfast.adapters.readers import readers
from fluxfast.config.run import TrainConfig
from fluxfast.text import printable
from fluxfast.train.adapter import kind_of
from fluxfast.train.events import METRICS_NAME, Numbers, tell
from fluxfast.train.finished import Finished
from fluxfast.train.image_files import FOLDER, grid_name
from fluxfast.train.loss_chart import CHART_NAME
from fluxfast.train.model_card import loading_function, pipeline_class
from fluxfast.train.report import REPORT_NAME, write_report


@contextmanager
def reported(config: TrainConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Write the report of the run in the block, however it ends, once it has trained a step.

    A run that was stopped or has failed then says where it can be looked at.
    """
    folder = config.output_dir
    try:
        yield
    except Finished:
        raise
    except BaseException:
        if _write(folder, say):
            say(f"how it went so far: {_named(folder, CHART_NAME, REPORT_NAME)}")
        raise
    _write(folder, say)


def _write(folder: Path, say: Callable[[str], None]) -> bool:
    if not (folder / METRICS_NAME).exists():
        return False
    with Numbers(say).guard(REPORT_NAME):
        write_report(folder)
        return True
    return False


def show(console: Console, config: TrainConfig, lora: Path) -> None:
    """Print what a complete run has made: its adapter's file, pictures, and how to use them."""
    for line in lines(config, lora):
        tell(console, line)


def lines(config: TrainConfig, lora: Path) -> list[str]:
    """What `show` prints."""
    folder, label = config.output_dir, kind_of(config).label
    size = lora.stat().st_size
    amount = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"
    told = ["", f"{label}: {printable(lora)} ({amount})"]
    told.append(f"how it went: {_named(folder, CHART_NAME, REPORT_NAME)}")
    if grid := _last_grid(folder):
        told.append(f"images: {printable(grid)}")
    if config.trains_all:
        return [*told, *_whole_in_diffusers(config, lora.parent)]
    shapes, metadata = header_of(lora)
    try:
        found = readers(read_adapter(lora), shapes, metadata)
    except ValueError:
        # a kind of somebody's own, which no other program knows
        return told
    return [*told, *_in_diffusers(config, found["diffusers"]), *_in_comfyui(lora, found["ComfyUI"])]


def _named(folder: Path, *names: str) -> str:
    """The files of these names that are in a folder."""
    return ", ".join(printable(folder / name) for name in names if (folder / name).exists())


def _last_grid(folder: Path) -> Path | None:
    grids = sorted((folder / FOLDER).glob(grid_name(0).replace("000000", "*")))
    return grids[-1] if grids else None


def _in_diffusers(config: TrainConfig, obstacle: str | None) -> list[str]:
    if obstacle is not None:
        return [
            f"diffusers does not read it: {obstacle}. "
            f'fluxfast.load_lora(pipeline.transformer, "{printable(config.output_dir)}") does'
        ]
    pipeline, base = pipeline_class(config), config.base_source.path
    return [
        "in diffusers:",
        f"  import torch; from diffusers import {pipeline}",
        f"  pipeline = {pipeline}.from_pretrained(",
        f"      {base!r}, torch_dtype=torch.bfloat16",
        "  )",
        f"  {loading_function(config)}({str(config.output_dir)!r})",
    ]


def _whole_in_diffusers(config: TrainConfig, folder: Path) -> list[str]:
    """How diffusers draws with a transformer that was trained as a whole."""
    pipeline, base = pipeline_class(config), config.base_source.path
    return [
        "in diffusers:",
        f"  import torch; from diffusers import {pipeline}, FluxTransformer2DModel",
        "  transformer = FluxTransformer2DModel.from_pretrained(",
        f"      {str(folder)!r}, torch_dtype=torch.bfloat16",
        "  )",
        f"  pipeline = {pipeline}.from_pretrained(",
        f"      {base!r}, transformer=transformer, torch_dtype=torch.bfloat16",
        "  )",
    ]


def _in_comfyui(lora: Path, obstacle: str | None) -> list[str]:
    if obstacle is None:
        return ["in ComfyUI: copy the file into models/loras"]
    return [
        f"in ComfyUI, which does not read it as it is ({obstacle}):",
        f"  fluxfast-train convert {printable(lora)} FILE.safetensors --format comfyui",
        "  and copy that into models/loras",
    ]
