"""`fluxfast-train cache`: what runs have computed once and kept, by kind; and how to clear it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.complain import complain
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.files import short_path, user_cache
from fluxfast.train.cache_contents import KINDS, Kept, contents, remove
from fluxfast.train.cache_use import clearing, used_since
from fluxfast.train.run_lock import FolderInUse

_DAY = 86400.0


def main(words: Sequence[str]) -> int:
    arguments = _parser().parse_args(words)
    unknown = [kind for kind in arguments.clear or () if kind not in KINDS]
    if unknown:
        complain(f"error: there is no kind {unknown[0]}; kinds are {', '.join(KINDS)}")
        return 2
    try:
        cache_dir = load_config(arguments.config).cache_dir if arguments.config else user_cache()
        if arguments.clear is None and arguments.older_than is None:
            _show(list(contents(cache_dir)), cache_dir)
            return 0
        return _clear(cache_dir, arguments)
    except ConfigError as error:
        complain(error)
        return 2
    except FolderInUse:
        complain("error: somebody else is clearing this cache; try again then")
        return 1
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        "fluxfast-train cache",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "List what runs have computed once and kept: sizes, and when each was used last.\n"
            "Clearing loses nothing but time, since the next run computes it again. What a\n"
            "run that is going on uses always stays. Kinds:\n\n"
            + "\n".join(f"  {kind:9} {what}" for kind, what in KINDS.items())
        ),
    )
    parser.add_argument(
        "config", metavar="CONFIG.json", nargs="?", help="list this config's cache_dir instead"
    )
    parser.add_argument(
        "--clear", metavar="KIND", nargs="*", help="remove these kinds, or everything"
    )
    parser.add_argument(
        "--older-than",
        metavar="DAYS",
        type=_days,
        help="remove only what was not used for so many days",
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"expected days, 0 or more, not {text}")
    return days


def _clear(cache_dir: Path, arguments: argparse.Namespace) -> int:
    """Remove what was asked for, after a question; returns the exit status."""
    kinds = arguments.clear or list(KINDS)
    before = time.time() - (arguments.older_than or 0) * _DAY

    def wanted() -> list[Kept]:
        return [each for each in contents(cache_dir) if each.kind in kinds and each.used <= before]

    if not (found := wanted()):
        print(f"nothing to remove from {short_path(cache_dir)}")
        return 0
    _show(found, cache_dir)
    if not arguments.yes:
        if not sys.stdin.isatty():
            complain("error: nobody is there to be asked; add --yes to remove this")
            return 2
        if input("Remove this? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing removed")
            return 1
    with clearing(cache_dir, print) as since:
        now = wanted()
        kept = [each for each in now if _is_in_use(each, since)]
        freed = remove(each for each in now if each not in kept)
    print(f"removed {decimal(freed)}")
    if kept:
        print(f"kept {decimal(_size(kept))}, which a run that is going on uses")
    return 0


def _is_in_use(kept: Kept, since: float | None) -> bool:
    """Whether a live run may need it, which took the cache at that time."""
    # a run goes on reading what it compiled before, and nothing notes that
    return since is not None and (kept.kind == "compiled" or kept.used >= since)


def _show(found: Sequence[Kept], cache_dir: Path) -> None:
    """Print a table with a row for each owner of a kind."""
    console = Console()
    if not found:
        console.print(f"{short_path(cache_dir)}: nothing is cached", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("kind")
    table.add_column("of", overflow="fold")
    table.add_column("entries", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", justify="right", no_wrap=True)
    order = list(KINDS)

    def by_owner(kept: Kept) -> tuple[int, str]:
        return order.index(kept.kind), kept.owner

    idle = 0
    for (kind, owner), group in groupby(sorted(found, key=by_owner), key=by_owner):
        items = list(group)
        last = max(each.used for each in items)
        # what the last start of this owner had no use for, as its images have gone or changed
        left = [each for each in items if each.used < last] if len(items) > 1 else []
        idle += _size(left)
        table.add_row(
            order[kind], escape(owner), str(len(items)), decimal(_size(items)), _ago(last)
        )
    console.print(table, highlight=False)
    lines = [f"{decimal(_size(found))} in {short_path(cache_dir)}"]
    if idle:
        lines.append(
            f"{decimal(idle)} of it was not needed when its dataset was last used; "
            "`--older-than 30` removes what was not used for 30 days"
        )
    if used_since(cache_dir) is not None:
        lines.append("a run is using this cache; what it needs is not removed")
    console.print(escape("\n".join(["", *lines])), highlight=False)


def _size(kept: Iterable[Kept]) -> int:
    return sum(each.size for each in kept)


def _ago(when: float) -> str:
    days = int((time.time() - when) / _DAY)
    return "today" if days <= 0 else "yesterday" if days == 1 else f"{days} days ago"
