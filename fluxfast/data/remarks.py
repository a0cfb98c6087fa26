"""What of a dataset may surprise its owner: its captions as they are trained, enlarged images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fluxfast.config.datasets import ImageDataset
from fluxfast.data.image_kinds import looks_like_an_image
from fluxfast.data.images import files_below
from fluxfast.data.scan import Candidate, Scan
from fluxfast.text import printable

_SAMPLES = 2
# of a caption within a sentence
_QUOTED_CHARACTERS = 40
# where captions come from that are neither in text files nor in a table
_ORIGINS = {"filename": "the file names", "instanceprompt": 'the "instance_prompt"'}
# an image that is enlarged further looks soft, and the LoRA learns to draw so
_MUCH_ENLARGED = 1.5


@dataclass(frozen=True)
class CaptionFiles:
    """Caption files beside a dataset's images.

    alone: those without an image, as paths below the folder. ignored: how many images have one that
    the dataset doesn't read.
    """

    alone: list[str]
    ignored: int


@dataclass(frozen=True)
class Remarks:
    """Prints as a sample of the captions, and as lines on what may surprise.

    samples: pairs of a file and its caption. warnings: what has probably gone wrong. notes: what
    may be as it should.
    """

    id: str
    samples: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The remarks for `rich.print` and `Console.print`; a caption is cut to the width."""
        # as Text, since captions and names may look like markup
        if self.samples:
            yield Text(f"captions of {printable(self.id)}, as they are trained:")
            names = [Text(printable(file)) for file, _ in self.samples]
            width = min(options.max_width // 3, max(name.cell_len for name in names))
            for name, (_, caption) in zip(names, self.samples, strict=True):
                name.truncate(width, overflow="ellipsis", pad=True)
                line = Text.assemble("  ", name, "  ", printable(caption))
                line.truncate(options.max_width, overflow="ellipsis")
                yield line
        for warning in self.warnings:
            yield Text(f"! {printable(self.id)}: {warning}", style="bold")
        for note in self.notes:
            yield Text(f"· {printable(self.id)}: {note}")


def caption_files(dataset: ImageDataset, skip: Iterable[Path] = ()) -> CaptionFiles:
    """Look for the .txt files in a dataset's folder. skip: as `scan` takes it."""
    root = Path(dataset.instance_data_dir)
    images, texts = set(), []
    for path in files_below(root, skip=skip):
        if path.suffix == ".txt":
            texts.append(path)
        elif looks_like_an_image(path):
            images.add(path.with_suffix(""))
    paired = [path for path in texts if path.with_suffix("") in images]
    if not _reads_files(dataset):
        return CaptionFiles([], len(paired))
    alone = sorted(set(texts) - set(paired))
    return CaptionFiles([path.relative_to(root).as_posix() for path in alone], 0)


def remarks(dataset: ImageDataset, scan: Scan, files: CaptionFiles) -> Remarks:
    """What may surprise in a dataset that has been scanned. files: what `caption_files` found."""
    factor, enlarged = _enlarged(scan.candidates)
    warnings = [*_ignored_files(dataset, scan, files), *_missing(scan), *_all_equal(dataset, scan)]
    notes: list[str] = []
    if enlarged:
        (warnings if factor > _MUCH_ENLARGED else notes).append(enlarged)
    return Remarks(dataset.id, _samples(scan.candidates), warnings, notes)


def _reads_files(dataset: ImageDataset) -> bool:
    return dataset.caption_strategy == "textfile" and not dataset.only_instance_prompt


def _samples(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """Captions of images that lie apart in the folder; one, if all are the same."""
    captioned = [each for each in candidates if each.captions]
    if not captioned:
        return []
    if len({each.captions for each in captioned}) == 1:
        captioned = captioned[:1]
    chosen = captioned[:: -(-len(captioned) // _SAMPLES)]
    return [(each.file, each.captions[0]) for each in chosen]


def _ignored_files(dataset: ImageDataset, scan: Scan, files: CaptionFiles) -> Iterator[str]:
    if not files.ignored or not scan.candidates:
        return
    number = "1 image has" if files.ignored == 1 else f"{files.ignored} images have"
    if dataset.only_instance_prompt:
        origin, remedy = 'the "instance_prompt"', 'remove "only_instance_prompt"'
    else:
        origin = _ORIGINS.get(dataset.caption_strategy, "those of the table")
        remedy = 'set "caption_strategy": "textfile"'
    yield (
        f"{number} a .txt file that is NOT read: the captions are {origin}, such as "
        f"{_quoted(scan.candidates[0].captions[0])}. To train on the text files, {remedy}"
    )


def _missing(scan: Scan) -> Iterator[str]:
    """A line on images that are left out for their captions."""
    without = [each for each in scan.skipped if "caption" in each.reason]
    if without and scan.candidates:
        yield (
            f"{len(without)} of {scan.found} images {'is' if len(without) == 1 else 'are'} NOT "
            f"trained on: {without[0].reason} (such as {printable(without[0].file)})"
        )


def _all_equal(dataset: ImageDataset, scan: Scan) -> Iterator[str]:
    """A line where every image has the same caption, and nobody asked for that."""
    asked = dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt"
    captions = {each.captions for each in scan.candidates}
    if not asked and len(scan.candidates) > 1 and len(captions) == 1 and captions != {()}:
        (same,) = captions
        yield f"all {len(scan.candidates)} images have the same caption, {_quoted(same[0])}"


def _enlarged(candidates: Sequence[Candidate]) -> tuple[float, str]:
    """How far images are enlarged to reach their training size, at most, and a line on it."""
    found = [(each.crop_plan.intermediary[0] / each.size[0], each) for each in candidates]
    found = [(factor, each) for factor, each in found if factor > 1]
    if not found:
        return 1.0, ""
    factor, most = max(found, key=lambda pair: pair[0])
    told = (
        f"{len(found)} of {len(candidates)} images {'is' if len(found) == 1 else 'are'} enlarged "
        f"to reach the training size, by up to {factor:.2f} times ({printable(most.file)}, "
        f"{most.size[0]}x{most.size[1]} pixels)"
    )
    if factor > _MUCH_ENLARGED:
        told += (
            '. They will look soft, and so will what the LoRA draws: "minimum_image_size" leaves '
            'small images out, and a lower "resolution" enlarges less'
        )
    return factor, told


def _quoted(caption: str) -> str:
    text = printable(caption)
    return f'"{text}"' if len(text) <= _QUOTED_CHARACTERS else f'"{text[:_QUOTED_CHARACTERS]}…"'
