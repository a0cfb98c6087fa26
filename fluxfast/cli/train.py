"""`fluxfast-train [train] [CONFIG.json] [--option=value ...]`: train a LoRA."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError

HELP = """fluxfast-train [train] [CONFIG.json] [--option=value ...]

Train a LoRA from a SimpleTuner config. Without CONFIG.json: $CONFIG_PATH, else
config/$ENV/config.json, else config/config.json. Options are the config's keys and go before it:
--max_train_steps=100. A run that was stopped goes on with the same command."""

# a shell reports a command that a signal ended as this number plus the signal's
SIGNAL_EXIT = 128


def main(words: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    path = words[0] if words and not words[0].startswith("-") else None
    try:
        config = load_config(path, list(words[1:] if path else words))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    # the heavy imports come after the config has been found right
    from fluxfast.train.state import SaveError
    from fluxfast.train.trainer import NonFiniteLoss, Stopped, train

    try:
        train(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return SIGNAL_EXIT + stopped.signal
    except KeyboardInterrupt:
        print(
            "interrupted before a step could be saved; the same command goes on from the last "
            "checkpoint",
            file=sys.stderr,
        )
        return SIGNAL_EXIT + signal.SIGINT
    # an OSError is a full or vanished disk, which the end of the run may meet too
    except (ValueError, OSError, NonFiniteLoss, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
