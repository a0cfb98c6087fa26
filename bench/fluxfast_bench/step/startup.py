"""`fluxfast-bench startup`: time and host memory from a checkpoint to the first training step.

    diffusers    the checkpoint as it is, loaded by diffusers, with PEFT's LoRA
    quantise     the checkpoint, quantised while it is read
    cached       the file that fluxfast quantised before, opened
    imports      what a process pays before any of that (`imports`)

Each runs in a fresh process. The page cache is warm for all: each reads what a plain copy of the
same files, timed just before, has read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from rich.table import Table
from rich.text import Text

from fluxfast.adapters.lora import add_lora
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast_bench.options import chosen, chosen_device, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import CONFIGS, Shape, model_inputs
from fluxfast_bench.step import imports
from fluxfast_bench.step.contestants import TARGETS
from fluxfast_bench.step.make_checkpoint import make_checkpoint
from fluxfast_bench.step.runner import MAX_GRAD_NORM, flow_loss, make_optimizer

WAYS = ("diffusers", "quantise", "cached", "imports")
# below this a checkpoint loads in no time, and says nothing of a target
LARGE = 1 << 30
RANK = 16


def peak_rss() -> int:
    """The most bytes that this process has held in memory."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            # of this program alone; getrusage's figure starts at that of the process that started
            # it
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except FileNotFoundError:
        pass
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def start(way: str, path: Path, format: str, device: torch.device) -> dict[str, Any]:
    """In a process of its own: loads, adds a LoRA, steps once."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    begun, imported = time.perf_counter(), peak_rss()
    model: Any
    if way == "diffusers":
        model = FluxTransformer2DModel.from_pretrained(path, torch_dtype=dtype).to(device)
    elif way == "quantise":
        checkpoint = open_checkpoint(path)
        model = checkpoint.load(
            FluxTransformer, dtype, device=device, format=FORMATS[format], quantize_on=device
        )
    else:
        model = open_checkpoint(path).load(FluxTransformer, dtype, device=device)
    loaded, held = time.perf_counter(), peak_rss()
    parameters = add_lora(model.train(), targets=TARGETS, rank=RANK, dtype=dtype)
    # few tokens on a CPU, where a step of a whole model is not for waiting
    shape = Shape(
        "first", "", 32 if device.type == "cuda" else 4, 512 if device.type == "cuda" else 16, 1
    )
    inputs = model_inputs(shape, device, dtype, config=model.config)
    optimizer = make_optimizer("torch-adamw", parameters)
    loss, prediction = flow_loss(model, inputs, torch.zeros_like(inputs["hidden_states"]))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    if not torch.isfinite(loss) or prediction.shape != inputs["hidden_states"].shape:
        return {"reason": f"wrong: the first loss is {loss.item()}"}
    return {
        "load_seconds": round(loaded - begun, 3),
        "seconds": round(time.perf_counter() - begun, 3),
        "load_rss_gib": round((held - imported) / 2**30, 3),
        "peak_rss_gib": round(peak_rss() / 2**30, 3),
    }


def _child(sender: Any, *args: Any) -> None:
    sender.send(start(*args))


def started(
    way: str, path: Path, format: str, device: torch.device, limit: float
) -> dict[str, Any]:
    """`start` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, way, path, format, device), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        return {"reason": f"no answer for {limit:g} s"}
    except EOFError:
        process.join()
        return {"reason": f"its process died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def copy_seconds(files: Sequence[Path], folder: Path) -> float:
    """Of a copy of the files, the second one, for which they are in the page cache."""
    for _ in range(2):
        begun = time.perf_counter()
        for file in files:
            shutil.copyfile(file, folder / "copy")
        seconds = time.perf_counter() - begun
        (folder / "copy").unlink()
    return seconds


def measure(
    path: Path, formats: Sequence[str], ways: Sequence[str], device: torch.device, limit: float
) -> list[dict[str, Any]]:
    """A record for each way and format; targets are only for a large checkpoint's."""
    checkpoint = open_checkpoint(path)
    base: dict[str, Any] = {"case": f"{checkpoint.nbytes / 1e9:.3g} GB"}
    records = []
    own_ways = [way for way in ways if way in ("quantise", "cached")]
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".startup-") as temporary,
        Steps(("diffusers" in ways) + len(formats) * len(own_ways)) as steps,
    ):
        folder = Path(temporary)
        copied = copy_seconds(checkpoint.files.files, folder)
        base["copy_seconds"] = round(copied, 4)
        if "diffusers" in ways:
            steps.begin("diffusers")
            start = started("diffusers", path, "", device, limit)
            records.append({**base, "contestant": "diffusers", "ours": False, **start})
        for format in formats:
            quantised = folder / "quantised.safetensors"
            size = checkpoint.quantize(
                FluxTransformer, quantised, FORMATS[format], quantize_on=device
            )
            for way in own_ways:
                steps.begin(f"{way} {format}")
                record = {
                    **base,
                    "contestant": f"{way} {format}",
                    "ours": True,
                    "quantised_gib": round(size / 2**30, 3),
                }
                record |= started(
                    way, quantised if way == "cached" else path, format, device, limit
                )
                if way == "quantise" and checkpoint.nbytes >= LARGE and "reason" not in record:
                    held = record["load_rss_gib"] - (
                        record["quantised_gib"] if device.type == "cpu" else 0
                    )
                    record |= {
                        "extra_gib": round(held, 3),
                        "times_copy": round(record["load_seconds"] / copied, 3),
                    }
                records.append(record)
            quantised.unlink()
    return records


def from_checkpoint(
    path: Path | None,
    formats: Sequence[str],
    ways: Sequence[str],
    device: torch.device,
    limit: float,
) -> list[dict[str, Any]]:
    """`measure` of a checkpoint, or of a small one that is made for the purpose."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder, "checkpoint")
            make_checkpoint(path, CONFIGS["small"])
        return measure(path, formats, ways, device, limit)


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """The ways from a checkpoint to a step."""
    table = Table()
    for column in (
        "checkpoint",
        "way",
        "loaded s",
        "first step s",
        "loading took GiB",
        "peak RSS GiB",
        "a copy takes s",
    ):
        table.add_column(column, no_wrap=True)
    for record in records:
        names = record["case"], record["contestant"]
        if "reason" in record:
            table.add_row(*names, Text(record["reason"], style="red"))
            continue
        keys = ("load_seconds", "seconds", "load_rss_gib", "peak_rss_gib", "copy_seconds")
        table.add_row(*names, *(f"{record[key]:.2f}" for key in keys))
    return table


def imports_table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table("imports", "processor s")
    for record in records:
        table.add_row(record["contestant"], f"{record['import_seconds']:.2f}")
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench startup",
        description=(
            "Measure the way from a checkpoint to the first step. Exit status 1: one of ours fails."
        ),
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="folder or file (default: a small one, made for the purpose)",
    )
    parser.add_argument(
        "--formats",
        default="int8",
        help=f"to quantise to, of {', '.join(FORMATS)} (default: %(default)s)",
    )
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--limit",
        type=float,
        default=1800,
        help="seconds that one start may take (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        device = chosen_device(options.device)
        ways = chosen("--ways", options.ways, WAYS)
        formats = chosen("--formats", options.formats, list(FORMATS))
        if options.checkpoint is not None:
            # before a result is begun
            open_checkpoint(options.checkpoint)
        run = Run(options.results, device, ["startup", *argv])
        records = []
        if set(ways) != {"imports"}:
            records = from_checkpoint(options.checkpoint, formats, ways, device, options.limit)
        imported = imports.measure() if "imports" in ways else []
    except ValueError as error:
        print(f"fluxfast-bench startup: {error}", file=sys.stderr)
        return 1
    console = wide_console()
    if records:
        console.print(table_of(records))
    if imported:
        console.print(imports_table_of(imported))
    records += imported
    for record in records:
        run.journal.record(record)
    run.finish(console)
    return 1 if any(record["ours"] and "reason" in record for record in records) else 0
