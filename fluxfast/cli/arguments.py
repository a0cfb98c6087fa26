"""The command line of a command that has options of its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from fluxfast.text import nearest

_UNKNOWN = "unrecognized arguments: "


class CommandLine(argparse.ArgumentParser):
    """A parser that names the nearest option where it does not know one."""

    def parse_beside_config(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """(the command's own options, the words left: a config and its options)."""
        arguments, rest = self.parse_known_args(words)
        if (problem := mistyped(rest, self._options())) is not None:
            self.error(problem)
        return arguments, rest

    def _options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            options = self._options()
            unknown = message.removeprefix(_UNKNOWN).split()
            for word in (word.partition("=")[0] for word in unknown if word.startswith("--")):
                if (near := nearest(word, options)) is not None:
                    message += f"; did you mean {near}?"
                    break
        super().error(message)


def mistyped(words: Iterable[str], own: Sequence[str]) -> str | None:
    """What is wrong with the first word that is no option, and nearest to one of the command's own.

    None where there is no such word: what is nearer to a config's key is left to the config.

    words: those that the command itself does not know. own: its options, such as `--gpu`.
    """
    # the commands without a config start more quickly without it
    from fluxfast.config.run import TrainConfig
    from fluxfast.config.simpletuner import known_names

    keys = known_names(TrainConfig.model_fields)
    by_key = {_key(option): option for option in own}
    for word in words:
        option = word.partition("=")[0]
        if not option.startswith("--") or _key(option) in keys:
            continue
        # the first of equally near names counts, and keys are in no order of their own
        near = nearest(_key(option), [*by_key, *sorted(keys - by_key.keys())])
        if near in by_key:
            return f"there is no option {option}; did you mean {by_key[near]}?"
    return None


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
