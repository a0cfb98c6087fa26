"""What was found on this machine, kept in the user's cache.

There is one file for each combination of device, driver and versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fluxfast.doctor import machine
from fluxfast.doctor.checks import Check, Outcome
from fluxfast.doctor.scope import Scope
from fluxfast.files import user_cache, write_atomic
from fluxfast.ops.verdicts import Verdicts

# of the files; raise it when their fields change their meaning
VERSION = 1


def folder() -> Path:
    """The folder of the files."""
    return user_cache() / "doctor"


class Store:
    """The outcomes of one machine; a file that can't be read counts as having none."""

    def __init__(self, device: torch.device) -> None:
        self.machine = machine.facts(device)
        self.path = folder() / f"{machine.key(self.machine)}.json"
        # (check, dtype, mode) to its outcome
        self._outcomes: dict[tuple[str, str, str], Outcome] = {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["version"] == VERSION:
                for entry in stored["outcomes"]:
                    outcome = Outcome.from_json(entry["outcome"])
                    self._outcomes[outcome.name, entry["dtype"], entry["mode"]] = outcome
        except (OSError, ValueError, KeyError, TypeError):
            self._outcomes = {}

    def __len__(self) -> int:
        return len(self._outcomes)

    def missing(self, checks: Sequence[Check], scope: Scope) -> list[Check]:
        """The checks that could run here and have no outcome in the scope's mode yet."""
        return [
            c
            for c in checks
            if c.obstacle is None and (c.name, scope.dtype, mode_of(scope)) not in self._outcomes
        ]

    def add(self, outcomes: Iterable[Outcome], scope: Scope) -> None:
        """Take in outcomes that need not be tried again.

        Each replaces earlier failures of the same check, in whatever mode they were found.
        """
        for outcome in outcomes:
            if outcome.again or not (outcome.parts or outcome.cause):
                continue
            for name, dtype, mode in list(self._outcomes):
                if (name, dtype) == (outcome.name, scope.dtype) and self._outcomes[
                    name, dtype, mode
                ].status == "fail":
                    del self._outcomes[name, dtype, mode]
            self._outcomes[outcome.name, scope.dtype, mode_of(scope)] = outcome

    def save(self) -> None:
        """Write the file. Raises OSError where the folder can't be written to."""
        entries = [
            {"dtype": dtype, "mode": mode, "outcome": outcome.as_json()}
            for (_, dtype, mode), outcome in self._outcomes.items()
        ]
        stored: dict[str, Any] = {"version": VERSION, "machine": self.machine, "outcomes": entries}
        write_atomic(self.path, (json.dumps(stored, indent=1) + "\n").encode())

    def failures(self, dtype: str) -> list[Outcome]:
        """The checks that failed with activations of this dtype, in whatever mode."""
        return [
            outcome
            for (_, of, _), outcome in self._outcomes.items()
            if of == dtype and outcome.status == "fail"
        ]


def mode_of(scope: Scope) -> str:
    """How a check was made, as far as its name does not say it."""
    dropout = "dropout" if scope.dropout else "no dropout"
    rank = f"rank {scope.rank}, scale {scope.lora_scale:g}"
    return f"{rank}, {scope.adapter_dtype} adapters, {dropout}, {scope.outliers} outliers"


def verdicts_of(failures: Iterable[Outcome]) -> Verdicts:
    """The failures as `ops.verdicts` takes them."""
    return {(f.what, f.way): f"{f.name}: {f.cause}" for f in failures if f.what}
