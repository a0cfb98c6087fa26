"""What was found on this machine, kept in the user's cache: a file for each combination of device,
driver and versions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fluxfast.doctor import machine
from fluxfast.doctor.checks import Check, Outcome
from fluxfast.doctor.scope import Scope
from fluxfast.files import write_atomic
from fluxfast.ops.verdicts import Verdicts

# what the files' fields mean
VERSION = 1


def folder() -> Path:
    """Where the files are."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fluxfast" / "doctor"


class Store:
    """The outcomes of one machine. A file that can't be read counts as none: everything is checked
    again.
    """

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
        """Those that could run here, and of which nothing is known in the scope's mode."""
        return [
            c
            for c in checks
            if c.obstacle is None and (c.name, scope.dtype, mode_of(scope)) not in self._outcomes
        ]

    def add(self, outcomes: Iterable[Outcome], scope: Scope) -> None:
        """Takes in what need not be tried again; it takes the place of what the same checks failed
        at before, in any mode.
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
        """Raises OSError where the folder can't be written to."""
        entries = [
            {"dtype": dtype, "mode": mode, "outcome": outcome.as_json()}
            for (_, dtype, mode), outcome in self._outcomes.items()
        ]
        stored: dict[str, Any] = {"version": VERSION, "machine": self.machine, "outcomes": entries}
        write_atomic(self.path, (json.dumps(stored, indent=1) + "\n").encode())

    def failures(self, dtype: str) -> list[Outcome]:
        """Checks that failed with such activations, in whatever mode."""
        return [
            outcome
            for (_, of, _), outcome in self._outcomes.items()
            if of == dtype and outcome.status == "fail"
        ]


def mode_of(scope: Scope) -> str:
    """What a check's name does not say of how it was made."""
    dropout = "dropout" if scope.dropout else "no dropout"
    rank = f"rank {scope.rank}, scale {scope.lora_scale:g}"
    return f"{rank}, {scope.adapter_dtype} adapters, {dropout}, {scope.outliers} outliers"


def verdicts_of(failures: Iterable[Outcome]) -> Verdicts:
    """What `ops.verdicts` is to know of them."""
    return {(f.what, f.way): f"{f.name}: {f.cause}" for f in failures if f.what}
