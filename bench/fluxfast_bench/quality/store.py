"""`quality.json`: every run of `fluxfast-bench quality`, written down when it is done.

A command that was interrupted finds there what is done already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxfast.files import write_atomic

NAME = "quality.json"


class Store:
    """The result file of one base, length of runs, number of images and device.

    `records` are as `summary` has them; each is written when it is added.
    """

    def __init__(
        self, folder: Path, conditions: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> None:
        """settings: what all runs share: `base`, a fingerprint, `steps`, `images` and `device`.

        Raises ValueError where the folder's file is not such a file, or is one of other settings.
        """
        self.path, self.settings = folder / NAME, dict(settings)
        self.records: list[dict[str, Any]] = []
        self._now = self.conditions = dict(conditions)
        if self.path.exists():
            # those of the runs that are there, until there is another one
            self.conditions, self.records = self._read()

    def _read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        instead = "remove it, or name another folder with --out"
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            stored, records = data["settings"], list(data["records"])
            run = dict(data["conditions"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path}: not what `fluxfast-bench quality` writes; {instead}"
            ) from None
        if stored != self.settings:
            other = ", ".join(
                f"{key} {stored.get(key)} and not {value}"
                for key, value in self.settings.items()
                if stored.get(key) != value
            )
            raise ValueError(f"{self.path}: holds runs of {other}; {instead}")
        return run, records

    def drop_stale(self, digests: Mapping[str, str]) -> list[str]:
        """Drop the runs of modes that have changed since, or that are no modes any more.

        digests: of each mode's config now. Returns the modes whose runs are dropped.
        """
        before = {record["mode"] for record in self.records}
        self.records = [
            record
            for record in self.records
            if "config" not in record or digests.get(record["mode"]) == record["config"]
        ]
        return sorted(before - {record["mode"] for record in self.records})

    @property
    def commit(self) -> str:
        """What runs that are added now are of."""
        return self._now["commit"]

    def has(self, mode: str, seed: int | None) -> bool:
        """Whether there is a run of that mode and seed that went to its end."""
        return any(
            (record["mode"], record["seed"]) == (mode, seed)
            for record in self.records
            if "failed" not in record and "reason" not in record
        )

    def add(self, record: dict[str, Any]) -> None:
        """Write a record down, in place of what was known of that mode and seed."""
        if record in self.records:
            return
        self.records = [
            other
            for other in self.records
            if other["mode"] != record["mode"]
            or ("reason" not in other and other["seed"] != record.get("seed"))
        ]
        self.records.append(record)
        self.conditions = self._now
        lines = ",\n".join(f"  {json.dumps(each)}" for each in self.records)
        head = json.dumps({"conditions": self.conditions, "settings": self.settings}, indent=1)
        write_atomic(self.path, f'{head[:-2]},\n "records": [\n{lines}\n ]\n}}\n'.encode())


def config_digest(config: Mapping[str, Any]) -> str:
    """A hash of what a mode's run is told; config: without what belongs to a machine."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
