"""The command line of a command that has options of its own."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fluxfast.text import nearest

_UNKNOWN = "unrecognized arguments: "


class CommandLine(argparse.ArgumentParser):
    """A parser that names the nearest option where it does not know one."""

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            options = [name for name in self._option_string_actions if name.startswith("--")]
            unknown = message.removeprefix(_UNKNOWN).split()
            for word in (word.partition("=")[0] for word in unknown if word.startswith("--")):
                if (near := nearest(word, options)) is not None:
                    message += f"; did you mean {near}?"
                    break
        super().error(message)
