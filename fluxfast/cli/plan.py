"""`fluxfast-train plan CONFIG.json [--gpu NAME] [--vram GiB] [--json] [--option=value ...]`"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console

from fluxfast.cli import plan_text
from fluxfast.cli.arguments import mistyped
from fluxfast.cli.complain import complain
from fluxfast.cli.plan_report import plan_report
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError

HELP = """fluxfast-train plan CONFIG.json [--gpu NAME] [--vram GiB] [--option=value ...]

What a run takes, before anything is downloaded: VRAM by part, RAM, disk, and
time; where it does not fit, what makes it fit. Needs no weights, network or
GPU. Of images that are here already, only the sizes are read.

  --gpu NAME   a card such as "RTX 3080" (default: this machine's); `--gpu list`
               shows the table, with --verbose its sources too
  --vram GiB   a card with so much memory: one that is not in the table, or with
               --gpu that card with another amount of memory
  --verbose    say why each choice is made
  --json       everything as one JSON object, in bytes and seconds

Exit status 1: it does not fit, or does not run on that card."""


class Asked(NamedTuple):
    """The command's own options, and the words that are left: the config and its options."""

    rest: list[str]
    gpu: str | None = None
    vram: float | None = None
    as_json: bool = False
    verbose: bool = False


def main(words: Sequence[str]) -> int:
    if not words or any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0 if words else 2
    try:
        asked = _options(words)
        if asked.gpu == "list":
            plan_text.show_gpus(Console(), verbose=asked.verbose)
            return 0
        path = asked.rest[0] if asked.rest and not asked.rest[0].startswith("-") else None
        config = load_config(path, asked.rest[1:] if path else asked.rest)
        report = plan_report(config, asked.gpu, asked.vram)
    except (ConfigError, ValueError) as error:
        complain(error)
        return 2
    if asked.as_json:
        print(json.dumps(report, indent=1))
    else:
        plan_text.show(report, Console(), title=path or "this config", verbose=asked.verbose)
    runs = report["fits"] is not False and report["encoders_fit"] is not False
    return 0 if runs and not report["unsupported"] else 1


def _options(words: Sequence[str]) -> Asked:
    found: dict[str, Any] = {"rest": []}
    left = list(words)
    while left:
        word, equals, value = left.pop(0).partition("=")
        if word in ("--json", "--verbose") and not equals:
            found["as_json" if word == "--json" else "verbose"] = True
        elif word in ("--gpu", "--vram"):
            example = '--gpu "RTX 3080"' if word == "--gpu" else "--vram 12"
            value = value if equals else left.pop(0) if left else ""
            if not value:
                raise ValueError(f"{word} needs a value, such as {example}")
            found[word.removeprefix("--")] = value if word == "--gpu" else _gib(value)
        else:
            found["rest"].append(word + equals + value)
    if (problem := mistyped(found["rest"], ("--gpu", "--vram", "--json", "--verbose"))) is not None:
        raise ValueError(problem)
    return Asked(**found)


def _gib(value: str) -> float:
    number = value.lower().removesuffix("gib").removesuffix("gb").removesuffix("g")
    try:
        if 0 < float(number) < float("inf"):
            return float(number)
    except ValueError:
        pass
    raise ValueError(f"--vram expects GiB, a number above 0 such as --vram 12, not {value!r}")
