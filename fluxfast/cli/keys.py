"""`fluxfast-train keys [WORD]`: every key of a run's config and of a dataset's."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.complain import complain
from fluxfast.config.dataset_keys import ACCEPTED_NO_EFFECT as DATASETS_NO_EFFECT
from fluxfast.config.describe import Key, keys
from fluxfast.config.settings import did_you_mean
from fluxfast.config.simpletuner import ACCEPTED_NO_EFFECT

_HEAD = """# Options

Every key of a run's config and of its datasets' (`multidatabackend.json`);
`fluxfast-train keys WORD` searches them. Names and defaults are SimpleTuner's; keys marked ✦ are
fluxfast's own. "unset" is `null`, or the key left out. `python tools/make_docs.py` makes this page
of the fields in `fluxfast/config`.
"""
_NO_EFFECT = """## Accepted, without effect

A config that sets one of these runs as one that does not, and a note says so.

"""


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        prog="fluxfast-train keys",
        description="Every key of config.json and of multidatabackend.json: its default, what it "
        "may be, what it means. A terminal shows a list without WORD cut to its width, and "
        "`fluxfast-train keys | grep` sees it whole.",
    )
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="only those with it")
    parser.add_argument("--markdown", action="store_true", help="as docs/options.md has them")
    arguments = parser.parse_args(words)
    if arguments.markdown:
        print(as_markdown(), end="")
        return 0
    word = arguments.word.strip("-").replace("-", "_").lower()
    found = [key for key in keys() if word in key.name or word in key.meaning.lower()]
    if not found:
        near = did_you_mean(word, [key.name for key in keys()])
        complain(f"no key has {arguments.word!r} in its name or meaning{near}")
        return 1
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for section, group in groupby(found, key=lambda key: key.section):
        print(section)
        for key in group:
            print(_line(key, width, whole=bool(word)))
    return 0


def _line(key: Key, width: int | None, *, whole: bool) -> str:
    """A key in one line; where it is longer than `width` columns, wrapped or, not whole, cut."""
    line = f"  {key.name} = {key.default} ({key.values}): {key.meaning}"
    if width is None or len(line) <= width:
        return line
    if not whole:
        return line[: width - 1] + "…"
    return textwrap.fill(line, width, subsequent_indent=" " * 6, break_on_hyphens=False)


def as_markdown() -> str:
    """The page docs/options.md."""
    parts = [_HEAD]
    for section, group in groupby(keys(), key=lambda key: key.section):
        parts.append(f"## {section}\n\n{_table(group)}\n")
    parts.append(_NO_EFFECT + "| key | why that is harmless |\n| --- | --- |\n")
    no_effect = {**DATASETS_NO_EFFECT, **ACCEPTED_NO_EFFECT}
    parts[-1] += "".join(f"| `{name}` | {_cell(no_effect[name])} |\n" for name in sorted(no_effect))
    return "\n".join(parts)


def _table(group: Iterable[Key]) -> str:
    lines = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{key.name}`{' ✦' if key.ours else ''} | {_cell(key.values)} | {_cell(key.default)} | "
        f"{_cell(key.meaning)} |"
        for key in group
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
