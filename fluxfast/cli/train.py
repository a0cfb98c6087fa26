"""`fluxfast-train [train] [CONFIG.json] [--option=value ...]`: train a LoRA."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from fluxfast.cli.complain import complain
from fluxfast.config.places import load_run
from fluxfast.config.settings import ConfigError

HELP = """fluxfast-train [train] [CONFIG.json] [--option=value ...]

Train a LoRA from a SimpleTuner config. Without CONFIG.json: $CONFIG_PATH, else
config/$ENV/config.json, else config/config.json. Options are the config's keys
and count more than it: --max_train_steps=100. A run that was stopped goes on
with the same command.

While it runs, SIGUSR1 (or a file request.save in the output folder) saves a
checkpoint, SIGUSR2 (request.validate) draws validation images, and SIGTERM or
Ctrl-C (request.stop) saves and ends it. Exit codes: 0 complete, 75 stopped and
saved, 1 or 2 an error, 128 + n ended at once by signal n."""

# a shell reports a command that a signal ended as this number plus the signal's
SIGNAL_EXIT = 128


def main(words: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    path = words[0] if words and not words[0].startswith("-") else None
    try:
        config, _ = load_run(path, list(words[1:] if path else words))
    except ConfigError as error:
        complain(error)
        return 2
    # the heavy imports come after the config has been found right
    from fluxfast.train.control import STOPPED_EXIT, Interrupted, Stopped
    from fluxfast.train.reporting import NonFiniteLoss
    from fluxfast.train.state import SaveError
    from fluxfast.train.trainer import train

    try:
        train(config)
    except Stopped as stopped:
        complain(stopped)
        return STOPPED_EXIT
    except KeyboardInterrupt as interrupt:
        complain(
            "interrupted before a step could be saved; the same command goes on from the last "
            "checkpoint"
        )
        number = interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT
        return SIGNAL_EXIT + number
    # an OSError is a full or vanished disk, which the end of the run may meet too
    except (ValueError, OSError, NonFiniteLoss, SaveError) as error:
        complain(f"error: {error}")
        return 1
    return 0
