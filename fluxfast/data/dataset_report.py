"""What became of each dataset: data preparation's closing table, and its errors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path, PurePosixPath

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fluxfast.data.image_kinds import how_to_read, readable
from fluxfast.data.scan import Skipped, other_files
from fluxfast.text import printable

_LISTED_FILES = 20
_LISTED_UNREAD = 3

# what to do about images that were left out, by how their reason begins
_ADVICE = {
    "smaller than": 'lower "minimum_image_size", or bring larger images',
    "upscaled by": 'raise "max_upscale_threshold", lower "resolution", or bring larger images',
    "narrower than": 'lower "minimum_aspect_ratio"',
    "wider than": 'raise "maximum_aspect_ratio"',
    "no caption file": (
        'write the text files, or set "caption_strategy" to "filename" or "instanceprompt"'
    ),
    "its caption": "give these images a caption",
    "its name": 'rename these files, or set "caption_strategy" to "textfile"',
    "unreadable": "replace or remove these files",
}


@dataclass(frozen=True)
class DatasetReport:
    """What became of one dataset: a row of the table.

    `buckets` counts the usable images of each target size, `unread` names files of kinds that
    aren't read.
    """

    id: str
    root: Path
    found: int
    skipped: Sequence[Skipped]
    buckets: Counter[str]
    repeats: int
    encoded: int = 0
    unread: Sequence[str] = ()

    @property
    def used(self) -> int:
        """The number of images to train on."""
        return self.buckets.total()

    @property
    def samples_per_epoch(self) -> int:
        """How many samples an epoch draws, `repeats` included."""
        return self.used * (1 + self.repeats)


@dataclass(frozen=True)
class DataReport:
    """The whole report: prints as the table, the files that were left out, and notes."""

    datasets: Sequence[DatasetReport]
    texts_encoded: int
    notes: Sequence[str] = field(default=())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The report for `rich.print` and `Console.print`."""
        table = Table(title="Datasets", title_justify="left")
        for column in ("dataset", "found", "used", "left out", "repeats", "an epoch", "sizes"):
            justify: JustifyMethod = (
                "left" if column in ("dataset", "left out", "sizes") else "right"
            )
            # fold wide columns rather than cut them: a name that is cut off is of no use
            table.add_column(column, justify=justify, overflow="fold")
        for row in self.datasets:
            reasons = Counter(skipped.reason for skipped in row.skipped)
            table.add_row(
                escape(row.id),
                str(row.found),
                str(row.used),
                "\n".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "0",
                str(row.repeats),
                str(row.samples_per_epoch),
                "\n".join(f"{size}: {count}" for size, count in row.buckets.most_common()),
            )
        yield table
        for row in self.datasets:
            if row.skipped:
                # as Text, since a file's name may look like markup
                yield Text("\n".join([f"Left out of {row.id}:", *_named(row.skipped)]))
            if row.unread:
                yield Text(f"{row.id}: {unread_kinds(row.unread)}")
        yield from (Text(f"· {note}") for note in self.notes)
        images = sum(row.encoded for row in self.datasets)
        if images or self.texts_encoded:
            yield Text(f"newly encoded: {images} images, {self.texts_encoded} texts")


def unread_kinds(files: Sequence[str]) -> str:
    """How many files of which kinds aren't read, and what to do about them."""
    kinds = Counter(PurePosixPath(file).suffix.lower() for file in files)
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    examples = ", ".join(printable(file) for file in files[:_LISTED_UNREAD])
    packages = {kind: help for kind in kinds if (help := how_to_read(kind))}
    helps = "".join(f", or, for {kind}: {help}" for kind, help in packages.items())
    number = (
        "1 file of a kind that is" if len(files) == 1 else f"{len(files)} files of kinds that are"
    )
    return f"{number} not read: {counts} (such as {examples}); convert to PNG or JPEG{helps}"


def nothing_usable(row: DatasetReport) -> str:
    """Why a dataset has no usable image, and what to change."""
    start = f'dataset "{row.id}": no images detected in dataset: '
    root = printable(row.root)
    if not row.found:
        others = ", ".join(
            f"{count} {printable(suffix)}" for suffix, count in other_files(row.root).most_common(5)
        )
        held = f"it holds only {others}" if others else "it is empty"
        unread = f" {unread_kinds(row.unread)}." if row.unread else ""
        known = " ".join(sorted(suffix.removeprefix(".") for suffix in readable()))
        return f"{start}{root} has no image files ({held}).{unread} Known kinds: {known}."
    lines = [f"{start}{row.found} found in {root}, none of them usable:"]
    for reason, count in Counter(skipped.reason for skipped in row.skipped).most_common():
        example = next(skipped for skipped in row.skipped if skipped.reason == reason)
        advice = next(
            (advice for begin, advice in _ADVICE.items() if reason.startswith(begin)), None
        )
        detail = f": {printable(example.detail)}" if example.detail else ""
        lines.append(
            f"  {count}x {reason} (such as {printable(example.file)}{detail})"
            + (f"; {advice}" if advice else "")
        )
    return "\n".join(lines)


def too_few(
    row: DatasetReport, *, batch_size: int, gradient_accumulation_steps: int, vae_batch_size: int
) -> str | None:
    """Why a dataset can't fill a step, with the `repeats` that would do; None if it can.

    An epoch needs at least train_batch_size * gradient_accumulation_steps samples, and more than
    vae_batch_size: the rule of SimpleTuner's quickstart.
    """
    of_a_step = batch_size * gradient_accumulation_steps
    needed = max(of_a_step, vae_batch_size + 1)
    if row.samples_per_epoch >= needed:
        return None
    repeats = ceil(needed / row.used) - 1
    lower = "" if row.samples_per_epoch >= of_a_step else ", lower train_batch_size"
    return (
        f'dataset "{row.id}": too few samples for a step: {row.used} usable images * '
        f"(1 + {row.repeats} repeats) = {row.samples_per_epoch}. At least "
        f"train_batch_size {batch_size} * gradient_accumulation_steps "
        f"{gradient_accumulation_steps} = {of_a_step} are needed, "
        f'and more than vae_batch_size {vae_batch_size}. Set "repeats": {repeats} (gives '
        f"{row.used * (1 + repeats)}){lower}, or bring more images."
    )


def filling_repeats(
    row: DatasetReport, *, batch_size: int, gradient_accumulation_steps: int, vae_batch_size: int
) -> int:
    """The least `repeats` with which every bucket fills a step, at least the dataset's own."""
    smallest = min(row.buckets.values())
    for_steps = ceil(batch_size * gradient_accumulation_steps / smallest) - 1
    return max(row.repeats, for_steps, ceil((vae_batch_size + 1) / row.used) - 1)


def _named(skipped: Sequence[Skipped]) -> list[str]:
    whole = (
        f"{each.file}: {each.reason}{f' ({each.detail})' if each.detail else ''}"
        for each in skipped
    )
    lines = [f"  {printable(line)}" for line in whole]
    hidden = len(lines) - _LISTED_FILES
    return lines if hidden <= 0 else [*lines[:_LISTED_FILES], f"  … and {hidden} more"]
