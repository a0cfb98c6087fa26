"""Who uses a cache right now, so that nobody clears what a run needs.

A run holds a lock of its own in `<cache_dir>/runs/` while it lives, and whoever clears the cache
holds one in `<cache_dir>/clearing/`. Each makes its own before it looks for the other's, so that
one of two that begin at once sees the other. What a run uses has been used or written since it
began, so the time of the oldest lock says what must stay.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from fluxfast.train.run_lock import LOCK_NAME, SILENT, RunLock, holder

RUNS, CLEARING = "runs", "clearing"
_WAIT = 0.2


@contextmanager
def using(cache_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a cache for a run as long as the block takes; waits for somebody who clears it."""
    folder = cache_dir / RUNS / uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        # where a run can't write, nobody clears anything either
        yield
        return
    try:
        with RunLock(folder, say):
            if holder(cache_dir / CLEARING) is not None:
                say(f"{cache_dir}: somebody clears this cache; waiting for that to end")
            while holder(cache_dir / CLEARING) is not None:
                time.sleep(_WAIT)
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def clearing(cache_dir: Path, say: Callable[[str], None]) -> Iterator[float | None]:
    """Hold a cache to clear it; gives what `used_since` does.

    Raises FolderInUse where somebody else clears it.
    """
    folder = cache_dir / CLEARING
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder, say):
        yield used_since(cache_dir)
    shutil.rmtree(folder, ignore_errors=True)


def used_since(cache_dir: Path) -> float | None:
    """When the oldest of the live runs took this cache, in seconds since 1970; None: none has it.

    What dead runs left is removed.
    """
    began = []
    for folder in (cache_dir / RUNS).glob("*"):
        with suppress(OSError):
            # a run that is about to lock it has just made it
            age = time.time() - folder.stat().st_mtime
            if (held := holder(folder)) is not None:
                began.append(datetime.fromisoformat(held["started"]).timestamp())
            elif (folder / LOCK_NAME).exists() or age > SILENT:
                shutil.rmtree(folder, ignore_errors=True)
    return min(began, default=None)
