"""What `check` says of a figure: what was asked, of whom, what was wanted, and what was found."""

from __future__ import annotations

from dataclasses import dataclass

MET, MISSED, WORSENED, UNMEASURED = "met", "missed", "worse", "not measured"
COLOURS = {MET: "green", MISSED: "red", WORSENED: "red", UNMEASURED: "yellow"}


@dataclass(frozen=True)
class Verdict:
    """One line: what was asked, of whom, what was wanted, what was found."""

    name: str
    where: str
    wanted: str
    found: str
    verdict: str

    @property
    def red(self) -> bool:
        return self.verdict in (MISSED, WORSENED)
