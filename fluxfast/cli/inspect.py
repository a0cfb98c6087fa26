"""`fluxfast-train inspect`: what is in an adapter's file, and which programs read it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.checkpoints import answer
from fluxfast.text import printable

if TYPE_CHECKING:
    from fluxfast.adapters.kind import AdapterFile

# metadata that is shown first, and how much of a value is shown
FIRST = ("modelspec.", "fluxfast_version", "global_step", "ss_network", "ss_base_model")
SHOWN, LENGTH = 10, 100


class Module(NamedTuple):
    """What a line says of one module: `norm` is None where the base decides it."""

    name: str
    algorithm: str
    rank: int
    alpha: float | None
    norm: float | None


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        "fluxfast-train inspect",
        description=(
            "Say what an adapter's file of any program holds: its algorithms, rank, alpha, "
            "targets, who reads it, and how much it changes each weight."
        ),
    )
    parser.add_argument(
        "file", metavar="FILE", help="safetensors file, folder with one, or hub repository"
    )
    parser.add_argument("--modules", action="store_true", help="a line for each module")
    parser.add_argument(
        "--plot",
        metavar="OUT.png",
        type=Path,
        help="draw the norms of the change, by block and kind of linear",
    )
    arguments = parser.parse_args(words)
    return answer(lambda: run(arguments), arguments.plot or arguments.file)


def run(arguments: argparse.Namespace) -> int:
    """Print what the file holds, and draw it if asked."""
    # torch and diffusers take seconds to import; `--help` doesn't need them
    from fluxfast.adapters.adapter_read import read_adapter
    from fluxfast.adapters.norms import model_order, plot_norms

    file = read_adapter(arguments.file)
    modules = sorted(look_at(file), key=lambda module: model_order(module.name))
    print("\n".join([*about(file, modules), "", *lines_of(modules, each=arguments.modules)]))
    if arguments.plot is not None:
        norms = {module.name: module.norm for module in modules if module.norm is not None}
        if not norms:
            raise ValueError(
                f"{file.path}: nothing to draw, since what its algorithms change depends on the "
                "base"
            )
        plot_norms(norms, arguments.plot, printable(file.path.name))
        print(f"\n{arguments.plot}: the norms of {len(norms)} modules")
    return 0


def look_at(file: AdapterFile) -> Iterable[Module]:
    """What there is to say of each module of a file."""
    from fluxfast.adapters.algorithms import ALGORITHMS, measure
    from fluxfast.adapters.norms import change_norm

    for name, tensors in file.tensors().items():
        algorithm = file.algorithm(name)
        label = ALGORITHMS[algorithm].label
        if "lora_magnitude_vector" in tensors or "dora_scale" in tensors:
            label = "DoRA" if algorithm == "lora" else f"{label} with magnitude"
        rank = measure(algorithm, {part: t.shape for part, t in tensors.items()}).rank
        alpha = tensors["alpha"].item() if rank else None
        yield Module(name, label, rank, alpha, change_norm(algorithm, tensors))


def about(file: AdapterFile, modules: Sequence[Module]) -> Iterable[str]:
    """Lines about the whole file."""
    from fluxfast.adapters.find_lora import header_of
    from fluxfast.adapters.readers import readers

    shapes, metadata = header_of(file.path)
    labels = ", ".join(dict.fromkeys(module.algorithm for module in modules))
    count = sum(t.numel() for name, t in file.state.items() if not name.endswith(".alpha"))
    yield (
        f"{file.path}: {labels}, {len(modules)} modules, {count:,} parameters, "
        f"{str(file.dtype).removeprefix('torch.')}, {file.path.stat().st_size / 1e6:,.1f} MB"
    )
    if ranks := [module.rank for module in modules if module.rank]:
        alphas = [module.alpha for module in modules if module.alpha is not None]
        yield f"rank {several(ranks)}, alpha {several(alphas)}"
    if (preset := preset_of(modules)) is not None:
        yield f"targets: those of flux_lora_target {preset}"
    found = readers(file, shapes, metadata)
    yield f"read by: {', '.join(['fluxfast', *(p for p, reason in found.items() if not reason)])}"
    yield from (f"not by {program}: {reason}" for program, reason in found.items() if reason)
    yield from highlights(metadata)
    yield from (f"note: {note}" for note in file.notes)


def preset_of(modules: Sequence[Module]) -> str | None:
    """The preset whose kinds of linears these are; None for none, and for one of single modules."""
    from fluxfast.adapters.norms import LINEARS, place_of
    from fluxfast.adapters.presets import PRESETS, is_target

    kinds = {place_of(module.name).kind for module in modules}
    return next(
        (
            name
            for name, preset in PRESETS.items()
            if kinds == {linear for linear in LINEARS if is_target(linear, preset.targets)}
        ),
        None,
    )


def highlights(metadata: Mapping[str, str]) -> Iterable[str]:
    """Lines for the first of the metadata, those that say the most before the others."""
    keys = sorted(metadata.keys() - {"format"}, key=lambda k: (not k.startswith(FIRST), k))
    for key in keys[:SHOWN]:
        value = printable(metadata[key])
        cut = value if len(value) <= LENGTH else f"{value[:LENGTH]}… ({len(value):,} characters)"
        yield f"metadata {printable(key)}: {cut}"
    if rest := keys[SHOWN:]:
        yield f"metadata: {len(rest)} more, {printable(', '.join(rest[:3]))} …"


def lines_of(modules: Sequence[Module], *, each: bool) -> list[str]:
    """A table of the modules, or of the kinds of linears that they are."""
    from fluxfast.adapters.norms import place_of

    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.name if each else place_of(module.name).kind, []).append(module)
    heads = ("linear", "modules", "algorithm", "rank", "‖change‖ least", "mean", "largest")
    rows = [heads, *(_row(name, group) for name, group in groups.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return [
        "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _row(name: str, group: Sequence[Module]) -> tuple[str, ...]:
    norms = [module.norm for module in group if module.norm is not None]
    shown = (f"{n:.4g}" for n in (min(norms), sum(norms) / len(norms), max(norms))) if norms else ()
    return (
        name,
        str(len(group)),
        ", ".join(dict.fromkeys(module.algorithm for module in group)),
        several([module.rank for module in group]) if any(m.rank for m in group) else "",
        *(shown or ("by the base", "", "")),
    )


def several(values: Sequence[float]) -> str:
    """One number, or the range of several."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
