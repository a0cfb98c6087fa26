"""`fluxfast-train doctor`: check this machine, and keep and report what was found."""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from fluxfast.cli.arguments import mistyped
from fluxfast.cli.complain import complain
from fluxfast.cli.doctor_report import as_json, show
from fluxfast.config.run import TrainConfig, load_config
from fluxfast.config.settings import ConfigError
from fluxfast.progress import counting

HELP = """\
fluxfast-train doctor [CONFIG.json] [--all] [--short] [--json] [--device D]
                      [--workers N] [--option=value ...]

Check this machine: every op of a training step in the formats and modes that
the config uses, on this device beside a reference, forward and backward;
attention's back ends, CUDA graphs, streamed blocks; then what the machine does
a second, beside what `plan` reckons with. What is found is kept, and training
minds it: `auto` passes over what failed.

  CONFIG.json  a training config, and options in front of it (without one: the
               defaults)
  --all        every format and mode that there is
  --short      what the first training run on a machine checks by itself
  --json       one JSON object on stdout, for a bug report
  --device D   cuda, cuda:1 or cpu (default: the GPU, if there is one)
  --workers N  processes that check side by side (default: by cores and memory
               on a GPU; 0, this one, on a CPU)

Exit status: 0 if everything that could be checked passed, 1 if something
failed, 2 for a mistake in the command or config."""


@dataclass
class Options:
    """The command line."""

    path: str | None = None
    everything: bool = False
    short: bool = False
    as_json: bool = False
    device: str | None = None
    workers: int | None = None
    overrides: list[str] = field(default_factory=list)


def parse(words: Sequence[str]) -> Options:
    """Parse the command line. Raises ValueError for a word that makes no sense in its place."""
    options, left = Options(), list(words)
    while left:
        word = left.pop(0)
        name, _, value = word.partition("=")
        if word in ("--all", "--short", "--json"):
            setattr(
                options,
                {"--all": "everything", "--short": "short", "--json": "as_json"}[word],
                True,
            )
        elif name in ("--device", "--workers"):
            if "=" not in word:
                if not left:
                    raise ValueError(f"{name} needs a value")
                value = left.pop(0)
            if name == "--workers" and not value.isdecimal():
                raise ValueError(f"--workers: expected a number, 0 or more, got {value!r}")
            setattr(options, name.removeprefix("--"), int(value) if name == "--workers" else value)
        elif word.startswith("--"):
            options.overrides.append(word)
        elif options.path is None:
            options.path = word
        elif options.overrides and "=" not in options.overrides[-1]:
            # the value of the option before it
            options.overrides.append(word)
        else:
            raise ValueError(f"one config, not two: {options.path} and {word}")
    own = ("--all", "--short", "--json", "--device", "--workers")
    if (problem := mistyped(options.overrides, own)) is not None:
        raise ValueError(problem)
    if options.overrides and options.path is None:
        raise ValueError(f"{options.overrides[0]} is an option of a config: name the config, too")
    if options.everything and (options.short or options.path):
        raise ValueError("--all checks everything: leave --short and the config out")
    return options


def main(words: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    try:
        options = parse(words)
        config = load_config(options.path, options.overrides) if options.path else None
        device = _device(options.device)
        scope = scope_for(options, config, device)
    except (ConfigError, ValueError) as error:
        complain(error)
        return 2
    return run(options, scope)


def _device(asked: str | None) -> Any:
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if found else []), *(f"cuda:{i}" for i in range(found))]
    if asked is not None and asked not in known:
        raise ValueError(f"--device {asked}: there is no such device; there are {', '.join(known)}")
    device = torch.device(asked or ("cuda" if found else "cpu"))
    if device.type == "cuda":
        # kernels launch on the current device
        torch.cuda.set_device(device)
        return torch.device("cuda", torch.cuda.current_device())
    return device


def scope_for(options: Options, config: TrainConfig | None, device: Any) -> Any:
    """What the command asks to be checked.

    Raises ValueError where the device lacks what the config asks for.
    """
    from fluxfast.config.run import default_config
    from fluxfast.doctor.scope import everything, sizes_for
    from fluxfast.ops import dispatch, verdicts
    from fluxfast.train.health import scope_of

    interpreted = device.type == "cpu" and dispatch.HAS_TRITON and dispatch._interpreted()
    if options.everything:
        return everything(device, interpreted=interpreted)
    with verdicts.ignored():
        scope = scope_of(config or default_config(), device, interpreted=interpreted)
    if options.short:
        return replace(
            scope, short=True, sizes=sizes_for(device, short=True, interpreted=interpreted)
        )
    return scope


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log lines on which implementation `auto` chooses, as all of them are tried."""
    logger = logging.getLogger("fluxfast")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def run(options: Options, scope: Any) -> int:
    """Check, keep what was found, and report it; returns the exit status."""
    from fluxfast.doctor.catalogue import checks_for
    from fluxfast.doctor.executor import run_checks, workers_for
    from fluxfast.doctor.store import Store

    start = time.perf_counter()
    # if this process crashes, print where
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    device = scope.torch_device
    checks = checks_for(scope)
    workers = workers_for(device) if options.workers is None else options.workers
    with _quiet(), counting(Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("checking", total=len(checks))
        outcomes = run_checks(checks, scope, workers, lambda _: progress.advance(bar))
    store = Store(device)
    store.add(outcomes, scope)
    note = ""
    try:
        store.save()
    except OSError as error:
        note = f"what was found can't be kept, so that training won't know of it: {error}"
    seconds = time.perf_counter() - start
    if options.as_json:
        print(json.dumps(as_json(store.machine, scope, outcomes, seconds), indent=1))
        if note:
            complain(note)
    else:
        show(Console(), store.machine, outcomes, seconds, note)
    return 1 if any(outcome.status == "fail" for outcome in outcomes) else 0
