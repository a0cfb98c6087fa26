"""`fluxfast-train data`: what each dataset of a run will become, before anything is encoded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.checkpoints import answer
from fluxfast.cli.complain import complain
from fluxfast.config.datasets import DataConfig
from fluxfast.config.places import load_run
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.files import safe_name, write_atomic
from fluxfast.text import printable

if TYPE_CHECKING:
    # torch loads once the config is known to be right
    from fluxfast.data.caption_lengths import LongCaption, TokenCounter
    from fluxfast.data.inspection import Inspected, PairRow
    from fluxfast.data.scan import Skipped

# how many names a list shows without --all, and how much of a caption
LISTED, CAPTION_SHOWN = 5, 60
MOST_IMAGES = 1000

DESCRIPTION = """Show what each dataset of a run's config will become, before anything is encoded
or loaded: buckets, what is left out and why, duplicates, captions that are too
long, caption files without an image, which masks and references belong to which
images, and a contact sheet. It needs no weights, network or GPU, and decides by
the same functions as a run. What it learns of the files is kept in the
datasets' caches, so that a second look and the run itself open only files that
have changed.

Options of the config go behind it: --train_batch_size=2. The exit status is 0
if a run could start with these datasets, 1 if not, 2 for mistakes in the
configs."""


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        "fluxfast-train data",
        usage="fluxfast-train data CONFIG.json [--out DIR] [--images N] [--all]\n"
        "                           [--json FILE] [--option=value ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_epilog(),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder of the contact sheets (default: data-report in the run's output_dir)",
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=60,
        help="images on a sheet at most, 0 for no sheets (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="name every file, not the first few")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all of it as JSON, too")
    arguments, rest = parser.parse_beside_config(words)
    if not 0 <= arguments.images <= MOST_IMAGES:
        parser.error(f"--images {arguments.images}: expected 0 to {MOST_IMAGES}")
    path = rest[0] if rest and not rest[0].startswith("-") else None
    try:
        config, data = load_run(path, rest[1:] if path else rest, needs_models=False)
    except ConfigError as error:
        complain(error)
        return 2
    out = arguments.out or config.output_dir / "data-report"
    return answer(lambda: run(config, data, arguments, out), out)


def _epilog() -> str:
    from fluxfast.data.duplicates import MAX_BITS, MAX_COLOUR

    return (
        f"Images look the same if their hashes differ in at most {MAX_BITS} of 144 bits (and a\n"
        "quarter of those that are set), and no colour of their miniatures by more than\n"
        f"{MAX_COLOUR} of 255."
    )


def run(config: TrainConfig, data: DataConfig, arguments: argparse.Namespace, out: Path) -> int:
    """Look, print, and write what was asked for; 1 if a run could not start."""
    from fluxfast.data.caption_lengths import token_counter
    from fluxfast.data.inspection import inspect
    from fluxfast.data.survey import survey
    from fluxfast.progress import counting
    from fluxfast.train.data_options import survey_options

    _check_outside(out, config, data)
    counter = token_counter(config.base_source, max_length=config.tokenizer_max_length)
    with counting(Console(stderr=True)) as bars:
        found = survey(data, bars, vae_batch_size=config.vae_batch_size, **survey_options(config))
        datasets, problem = inspect(found, counter, bars)
    console = Console()
    for note in data.notes:
        _say(console, f"· {note}")
    sheets = {}
    for inspected in datasets:
        show(inspected, counter, console, limit=None if arguments.all else LISTED)
        if inspected.buckets and arguments.images:
            sheet = _write_sheet(inspected, out, arguments.images)
            _say(console, f"contact sheet: {printable(sheet)}")
            sheets[inspected.dataset.config.id] = sheet
    if arguments.json:
        report = _report(datasets, counter, sheets, problem)
        write_atomic(arguments.json, json.dumps(report, indent=1).encode())
    if problem:
        complain(f"error: a run could not start:\n{_printable_lines(problem)}")
        return 1
    return 0


def _check_outside(out: Path, config: TrainConfig, data: DataConfig) -> None:
    """Raise ValueError if a run would take the sheets for images of a dataset."""
    place = out.resolve()
    if place.is_relative_to(config.output_dir.resolve()):
        return
    for dataset in data.folders:
        if place.is_relative_to(Path(dataset.instance_data_dir).resolve()):
            raise ValueError(
                f'--out {out}: lies in the folder of dataset "{dataset.id}", so that a run would '
                "take the sheets for its images; name another folder"
            )


def _write_sheet(inspected: Inspected, out: Path, images: int) -> Path:
    from fluxfast.data.contact_sheet import write_sheet

    dataset = inspected.dataset
    path = out / f"{safe_name(dataset.config.id)}.png"
    write_sheet(
        path,
        dataset.config.id,
        dataset.scan.candidates,
        images=images,
        pairings=dataset.pairings,
    )
    return path


def show(
    inspected: Inspected, counter: TokenCounter, console: Console, *, limit: int | None
) -> None:
    """Print what was found of a dataset; `limit` is how many names a list shows (None: all)."""
    dataset = inspected.dataset
    row = dataset.report()
    console.print(_bucket_table(inspected))
    _say(
        console,
        f"{row.found} images found, {row.used} used, {len(row.skipped)} left out; "
        f"{row.samples_per_epoch} samples an epoch in batches of {dataset.batch_size}",
    )
    for line in (
        *_left_out_lines(row.skipped, limit),
        *_group_lines("equal files", inspected.equal, limit),
        *_group_lines("images that look the same", inspected.near, limit),
        *_caption_lines(inspected, counter, limit),
        *_caption_file_lines(inspected, limit),
    ):
        _say(console, line)
    console.print(inspected.remarks)
    if inspected.pairs:
        console.print(_pair_table(inspected))
    for line in chain.from_iterable(_pair_lines(row, limit) for row in inspected.pairs):
        _say(console, line)
    if row.unread:
        from fluxfast.data.dataset_report import unread_kinds

        _say(console, unread_kinds(row.unread))
    for note in dataset.own_notes:
        _say(console, f"· {note}")


def _bucket_table(inspected: Inspected) -> Table:
    dataset = inspected.dataset
    title = f"{printable(dataset.config.id)}: {printable(dataset.config.instance_data_dir)}"
    columns = ("aspect", "size", "images", "repeats", "batches an epoch", "filled up")
    # as Text, since a folder's name may look like markup
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for bucket in inspected.buckets:
        table.add_row(
            bucket.aspect,
            bucket.size,
            *map(str, (bucket.images, dataset.repeats, bucket.batches, bucket.filled)),
        )
    if len(inspected.buckets) > 1:
        table.add_section()
        sums = [
            sum(getattr(bucket, name) for bucket in inspected.buckets)
            for name in ("images", "batches", "filled")
        ]
        table.add_row("all", "", str(sums[0]), "", str(sums[1]), str(sums[2]))
    return table


def _pair_table(inspected: Inspected) -> Table:
    title = f"{printable(inspected.dataset.config.id)}: conditioning datasets"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("dataset")
    table.add_column("kind", no_wrap=True)
    for column in ("pairs", "missing", "unfit", "orphans", "another extension"):
        table.add_column(column, justify="right")
    for row in inspected.pairs:
        counts = (row.pairs, len(row.missing), len(row.unfit), len(row.orphans))
        table.add_row(Text(printable(row.id)), row.kind, *map(str, (*counts, row.other_extension)))
    return table


def _pair_lines(row: PairRow, limit: int | None) -> Iterator[str]:
    from fluxfast.data.pairs import with_reasons

    for what, names in (
        (f"images without a {row.kind}", with_reasons(row.missing)),
        (f"images whose {row.kind} has another shape", with_reasons(row.unfit)),
        ("files that belong to no image", [printable(file) for file in row.orphans]),
    ):
        if names:
            yield f"{printable(row.id)}: {what}: {len(names)}"
            yield from _listed(names, limit)


def _left_out_lines(skipped: Sequence[Skipped], limit: int | None) -> Iterator[str]:
    by_reason = sorted(skipped, key=lambda each: each.reason)
    for reason, group in groupby(by_reason, key=lambda each: each.reason):
        names = [
            printable(each.file) + (f" ({printable(each.detail)})" if each.detail else "")
            for each in group
        ]
        yield f"left out, {printable(reason)}: {len(names)}"
        yield from _listed(names, limit)


def _group_lines(what: str, groups: Sequence[Sequence[str]], limit: int | None) -> Iterator[str]:
    if groups:
        yield f"{what}: {sum(map(len, groups))} in {_counted(len(groups), 'group')}"
        yield from _listed([" = ".join(map(printable, group)) for group in groups], limit)


def _caption_lines(inspected: Inspected, counter: TokenCounter, limit: int | None) -> Iterator[str]:
    captions = inspected.captions
    how = f", estimated, since {counter.estimated}" if counter.estimated else ""
    yield f"captions: {captions.total}{how}"
    for encoder, tokens, found in (
        ("T5 cuts", counter.t5_limit, captions.t5),
        ("CLIP cuts, T5 reads on", counter.clip_limit, captions.clip),
    ):
        if found:
            yield f"captions over the {tokens} tokens where {encoder}: {len(found)}"
            yield from _listed([_caption_line(each) for each in found], limit)


def _caption_line(long: LongCaption) -> str:
    text = printable(long.caption)
    cut = f"{text[:CAPTION_SHOWN]}…" if len(text) > CAPTION_SHOWN else text
    return f"{printable(long.file)}: {long.tokens} tokens: {cut}"


def _caption_file_lines(inspected: Inspected, limit: int | None) -> Iterator[str]:
    files = inspected.caption_files
    if files.alone:
        yield f"caption files without an image: {len(files.alone)}"
        yield from _listed([printable(file) for file in files.alone], limit)


def _listed(lines: Sequence[str], limit: int | None) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:limit])
    if limit is not None and len(lines) > limit:
        yield f"  … and {len(lines) - limit} more (--all names them)"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _report(
    datasets: Sequence[Inspected], counter: TokenCounter, sheets: dict[str, Path], problem: str
) -> dict[str, Any]:
    """Everything that is printed, and every name."""
    return {
        "can_start": not problem,
        "problem": problem,
        "tokens": {
            "t5": counter.t5_limit,
            "clip": counter.clip_limit,
            "estimated": counter.estimated,
        },
        "datasets": [_dataset_report(inspected, sheets) for inspected in datasets],
    }


def _dataset_report(inspected: Inspected, sheets: dict[str, Path]) -> dict[str, Any]:
    dataset = inspected.dataset
    row = dataset.report()
    sheet = sheets.get(row.id)
    return {
        "id": row.id,
        "folder": str(row.root),
        "found": row.found,
        "used": row.used,
        "repeats": dataset.repeats,
        "batch_size": dataset.batch_size,
        "buckets": [asdict(bucket) for bucket in inspected.buckets],
        "left_out": [asdict(each) for each in row.skipped],
        "not_read": list(row.unread),
        "equal_files": inspected.equal,
        "near_images": inspected.near,
        "captions": asdict(inspected.captions),
        "captions_without_image": inspected.caption_files.alone,
        "captions_not_read": inspected.caption_files.ignored,
        "caption_samples": list(inspected.remarks.samples),
        "warnings": list(inspected.remarks.warnings),
        "conditioning": [asdict(each) for each in inspected.pairs],
        "notes": [*inspected.remarks.notes, *dataset.all_notes],
        "sheet": None if sheet is None else str(sheet),
    }
