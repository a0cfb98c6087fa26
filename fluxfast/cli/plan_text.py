"""What `fluxfast-train plan` prints for people, from the report that `--json` prints."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fluxfast.config.precision_words import in_words
from fluxfast.text import duration

GIB = 2**30
# lines are no longer than this, however wide the terminal is
WIDEST = 100
# the width of the words before a fact, and of an amount
LABEL, AMOUNT = 16, 10
# cards that are named where a run fits several
NAMED = 5
# the report's parts in a newcomer's words, with the engine's terms behind them
PARTS = {
    "weights": "the model's weights",
    "transposed codes": "a second copy of them, turned (transposed codes)",
    "modulation": "shifts and scales of the blocks (modulation)",
    "adapters": "the LoRA",
    "gradients": "gradients",
    "optimiser": "the optimiser's state",
    "moving average": "the moving average of what trains (EMA)",
    "saved activations": "kept for the backward pass (activations)",
    "working set": "the block at work (working set)",
    "VAE": "the autoencoder, which encodes beside the steps",
    "ring": "the blocks on their way through (ring)",
    "CUDA context": "the driver and the kernels (CUDA context)",
    "process": "Python, PyTorch and its libraries",
    "streamed blocks": "the model's blocks (streamed)",
    "blocks' inputs": "the blocks' inputs",
    "text encoders": "text encoders, T5 and CLIP",
    "autoencoder": "autoencoder (VAE)",
    "latents": "encoded images (latents)",
    "text embeddings": "encoded captions (text embeddings)",
    "quantised base": "the quantised model",
}


def show(report: Mapping[str, Any], console: Console, *, title: str, verbose: bool = False) -> None:
    """Print the report. title: the config's name; verbose: say why each choice is made."""
    width = min(console.width, WIDEST)

    def say(text: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    gpu = report["gpu"]
    on = ", without a GPU (--gpu NAME has one)" if gpu is None else f" on {gpu['name']}"
    if gpu and "GiB" not in gpu["name"]:
        on += f" ({gpu['memory']:.4g} GiB)"
    say(f"Plan of {title}{on}")
    for heading, facts in (
        ("The run", _run(report)),
        ("How it computes", _choices(report["chosen"])),
        ("Why", report["chosen"]["reasons"].items() if verbose else ()),
    ):
        _section(say, heading, facts, width)
    for heading, parts, total in (
        ("VRAM at a step's peak", report["vram"], report["vram_needed"]),
        ("VRAM before that, one after the other", report["preparing"], None),
        ("VRAM besides, while validation draws", report["validating"], None),
        ("Memory of the computer (RAM)", report["host"], None),
        ("Disk, besides downloads", report["disk"], None),
    ):
        _amounts(say, heading, parts, total)
    say()
    for line in [*report["notes"], *_verdict(report)]:
        for part in _wrapped(line, width, "  " if line.startswith("- ") else ""):
            say(part)


def _section(say: Any, heading: str, facts: Any, width: int) -> None:
    facts = list(facts)
    if not facts:
        return
    say(f"\n{heading}")
    for label, text in facts:
        label = label.replace("_", " ")
        for number, line in enumerate(_wrapped(text, width - LABEL - 4)):
            say(f"  {'' if number else label:{LABEL}}  {line}")


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of whole words, so that options can be copied; indent: of all lines but the first."""
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _amounts(say: Any, heading: str, parts: Mapping[str, int], total: int | None) -> None:
    """A column of amounts; what takes nothing is left out, and so is a section of nothing."""
    rows = [(PARTS.get(name, name), count) for name, count in parts.items() if count]
    if not rows:
        return
    if total is not None:
        rows.append(("all together, with what lies between", total))
    say(f"\n{heading}")
    for name, count in rows:
        say(f"  {name:52}{size(count):>{AMOUNT}}")


def _run(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    run, batch, trained = report["run"], report["batch"], report["trained"]
    what = "beside the frozen model" if trained["rank"] else "(all of the model)"
    yield "trains", f"{trained['numbers'] / 1e6:.3g} million numbers {what}"
    if run["images"] is not None:
        yield "images", f"{run['images']} that can be used"
    many = "1 image" if batch["samples"] == 1 else f"{batch['samples']} images"
    shape = "{}x{}".format(*batch["size"])
    yield "largest batch", f"{many} of {shape}, of dataset {batch['dataset']}"
    if run["steps"] is not None:
        epoch = run["steps_per_epoch"]
        yield "steps", f"{run['steps']}" + (f", {epoch} to a pass over the images" if epoch else "")
    else:
        yield "steps", "known once the images are here, or by max_train_steps"
    if "step" not in report:
        if not trained["rank"]:
            yield "time", "not predicted where the model itself trains"
        elif report["gpu"] is not None and not report["unsupported"]:
            yield "time", "not known of such a card; --gpu NAME has that of a card in the table"
        return
    step = report["step"]
    yield (
        "largest step",
        f"{_step(step['seconds'])} ({step['images_per_second']:.2f} images a second), "
        f"predicted {report['rates']}",
    )
    if run["training_seconds"] is not None:
        yield "training", f"about {duration(run['training_seconds'])}"
    if run["encoding_seconds"] is not None:
        encoding = duration(max(1, run["encoding_seconds"]))
        yield "before that", f"about {encoding} to encode captions and images, unless cached"
    yield "not counted", ", ".join(run["not_counted"])


def _choices(chosen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the engine does, in plain words."""
    if chosen["slots"]:
        yield (
            "model",
            f"its blocks stay in RAM and pass through the GPU, {chosen['slots']} at a time "
            f"(streamed through a ring of {chosen['slots']})",
        )
    else:
        yield "model", "stays whole on the GPU (resident)"
    policies = list(chosen["recompute"])
    blocks = {policy: policies.count(policy) for policy in dict.fromkeys(policies)}
    words = {
        "none": "keep all that the backward pass needs (recompute: none)",
        "selective": "compute a part of the forward pass twice (recompute: selective)",
        "full": "compute the forward pass twice, to save memory (recompute: full)",
    }
    for number, (policy, count) in enumerate(blocks.items()):
        which = "all blocks" if count == len(policies) else f"{count} of {len(policies)} blocks"
        yield "" if number else "memory", f"{which} {words[policy]}"
    if chosen["host_inputs"]:
        yield "", "what blocks start from waits in RAM (inputs in host memory)"
    if chosen["modulation_ahead"]:
        yield "", "the CPU computes shifts and scales a step ahead (modulation ahead)"
    if chosen["compute"] == "same":
        yield "speed", "matrix products in the type of the activations, unrounded"
    else:
        yield (
            "speed",
            f"matrix products in {in_words(chosen['compute'])}, which rounds activations to 8 bits "
            '("compute_precision": "same" turns it off)',
        )
    if chosen["transposed_codes"]:
        yield "", "weights lie on the GPU in both orders (transposed codes)"
    if chosen["graphs"]:
        yield "", "steps are recorded and replayed (CUDA graphs)"
    if chosen["compile"]:
        yield "", "torch.compile compiles a part of the model"


def _verdict(report: Mapping[str, Any]) -> Iterator[str]:
    """Whether it fits, and what to do where it does not."""
    gpu, needed = report["gpu"], report["vram_needed"]
    if gpu is None:
        yield f"A step needs {size(needed)} of VRAM. {_cards(report['fits_on'])}"
        return
    if report["unsupported"]:
        yield f"It does not run: {report['unsupported']}."
        return
    room = size(report["budget"])
    if report["reserve"] is not None:
        room += f' that a run may take ("vram_reserve" leaves {report["reserve"]:g} GiB free)'
    if report["fits"]:
        it = "It fits" if report["encoders_fit"] else "The steps fit"
        yield f"{it}: a step needs {size(needed)} of the {room}."
    else:
        yield f"It does not fit: a step needs {size(needed)} of the {room}."
        yield from _what_helps(report["changes"])
    if not report["encoders_fit"]:
        yield from _encoders(report["preparing"])


def _what_helps(changes: Mapping[str, Any]) -> Iterator[str]:
    """What makes a step fit, or why nothing does."""
    if not changes["possible"]:
        yield from changes["why"]
        return
    asked = json.dumps(changes["config"]["vram_budget"])
    yield f'"vram_budget": {asked} makes it fit, in {size(changes["vram_needed"])}:'
    for _, text in _choices(changes["chosen"]):
        yield f"- {text}"
    if "step" in changes:
        yield f"- a step takes {_step(changes['step']['seconds'])}"


def _encoders(preparing: Mapping[str, int]) -> Iterator[str]:
    """What to do where the encoders, which run before the training, do not fit."""
    helps = {
        "text encoders": '"text_encoder_2_precision": "int8-quanto" halves it',
        "autoencoder": '"vae_batch_size": 1 and "vae_enable_tiling": true lower it',
    }
    name = max(preparing, key=lambda part: preparing[part])
    yield f"What comes before does not fit: {size(preparing[name])} for the {name}; {helps[name]}."


def _cards(names: Sequence[str]) -> str:
    """The smallest of the cards that a run fits."""
    from fluxfast.memory.gpus import GPUS

    cards = sorted((gpu for gpu in GPUS if gpu.name in names), key=lambda gpu: gpu.memory)
    if not cards:
        return "No card of `--gpu list` has as much."
    named = [gpu.name for gpu in cards[:NAMED]]
    more = f" and {len(cards) - len(named)} larger ones" if len(cards) > len(named) else ""
    return f"Cards that have it: {', '.join(named)}{more} (--gpu plans for one)."


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a whole one."""
    for unit, bytes in (("GiB", GIB), ("MiB", 2**20)):
        if count >= bytes:
            return f"{count / bytes:.2f} {unit}" if unit == "GiB" else f"{count / bytes:.0f} {unit}"
    return f"{count / 1024:.0f} KiB"


def _step(seconds: float) -> str:
    """The time of a step, to three digits."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def show_gpus(console: Console, *, verbose: bool = False) -> None:
    """Print the table of cards; verbose: with their multiprocessors and public sources."""
    from fluxfast.memory.gpus import GPUS

    def say(text: str, indent: str = "") -> None:
        for line in _wrapped(text, min(console.width, WIDEST), indent):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(
        "GB/s of memory, and of the link to the computer (PCIe); products of bf16, int8 and fp8 in "
        "tera-operations a second. fluxfast needs bf16."
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("GPU", no_wrap=True)
    sources = list(dict.fromkeys(gpu.source for gpu in GPUS))
    columns = ["GiB", "GB/s", "bf16", "int8", "fp8", "PCIe", *(["SMs", "source"] * verbose)]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for gpu in GPUS:
        amounts = (gpu.memory, gpu.bandwidth, gpu.bf16, gpu.int8, gpu.fp8, gpu.pcie)
        cells = [f"{amount:g}" if amount else "-" for amount in amounts]
        if verbose:
            cells += [str(gpu.multiprocessors), str(1 + sources.index(gpu.source))]
        table.add_row(gpu.name, *cells)
    console.print(table)
    if not verbose:
        say("--verbose names the sources. --vram GiB plans for a card that is not listed.")
    for number, source in enumerate(sources if verbose else (), 1):
        say(f"{number:2} {source}", "   ")
