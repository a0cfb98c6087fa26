"""What commands say on standard error."""

from __future__ import annotations

import shutil
import sys

from fluxfast.text import wrapped


def complain(message: object) -> None:
    """Print a message there: to a terminal in lines that end between words, else as it is."""
    text = str(message)
    if sys.stderr.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns)
    print(text, file=sys.stderr)
