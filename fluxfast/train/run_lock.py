"""One run at a time in an output folder.

A run holds `run.lock` while it lives: a JSON file with its process, when that started, and the
machine's name. A file that a killed run left behind holds nobody back: on the same machine its
process is gone, or is another one with the same number; a run on another machine, which may share
the folder or be the same container under a new name, touches its file every 20 seconds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from fluxfast.files import temporary_name

LOCK_NAME = "run.lock"
# seconds between touches, and after how many without one a run elsewhere counts as dead
TOUCH, SILENT = 20.0, 70.0
# a process's start is told in hundredths of a second, and the machine's clock may be set
_SAME_START = 2.0


class FolderInUse(ValueError):
    """Another run works in the output folder."""


class RunLock:
    """The lock of an output folder, as a context manager.

    Entering it raises FolderInUse where another run holds it. A run on another machine that has
    been silent may have died; that takes a minute to know, in which `say` is told once.
    """

    def __init__(self, output_dir: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = output_dir / LOCK_NAME, say
        self._ended = threading.Event()
        self._content = json.dumps(_this_process(), indent=1).encode()

    def __enter__(self) -> RunLock:
        while not self._create():
            self._take_away_if_dead()
        threading.Thread(target=self._touch, name="fluxfast-lock", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if _read(self.path) == self._content:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file, whole or not at all; False where there is one."""
        whole = temporary_name(self.path)
        whole.write_bytes(self._content)
        try:
            os.link(whole, self.path)
        except FileExistsError:
            return False
        except OSError:
            # a file system without links: the file is empty for a moment
            try:
                with self.path.open("xb") as stream:
                    stream.write(self._content)
            except FileExistsError:
                return False
        finally:
            whole.unlink(missing_ok=True)
        return True

    def _take_away_if_dead(self) -> None:
        """Remove a dead run's file; raises FolderInUse where the run lives."""
        found = _read(self.path)
        if found is None:
            return
        if _lives(_parse(found), self.path, self._say):
            raise FolderInUse(_told(self.path, _parse(found)))
        aside = temporary_name(self.path)
        try:
            self.path.replace(aside)
        except FileNotFoundError:
            return
        # somebody else may have been faster, and this be their lock
        if _read(aside) != found:
            aside.replace(self.path)
        else:
            aside.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH):
            try:
                os.utime(self.path)
            except OSError:
                # a folder that was moved away ends no run by its lock
                continue


def holder(output_dir: Path) -> dict[str, Any] | None:
    """What `run.lock` says of the live run in a folder; None where there is none."""
    path = output_dir / LOCK_NAME
    content = _read(path)
    if content is None or not _lives(_parse(content), path, None):
        return None
    return _parse(content)


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
    }


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {}


def _lives(held: dict[str, Any], path: Path, say: Callable[[str], None] | None) -> bool:
    """Whether the run that wrote a lock lives. say: may wait for a run on another machine."""
    if held.get("host") == socket.gethostname():
        try:
            started = psutil.Process(int(held["pid"])).create_time()
            return abs(started - float(held["process_started"])) < _SAME_START
        except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
            return False
    return _is_touched(path, say, str(held.get("host", "an unknown machine")))


def _is_touched(path: Path, say: Callable[[str], None] | None, host: str) -> bool:
    """Whether somebody touches a file that another machine wrote. say: as long as it takes."""
    try:
        before = path.stat().st_mtime
    except FileNotFoundError:
        return False
    # the file system's clock, which need not be this machine's
    probe = temporary_name(path)
    probe.write_bytes(b"")
    age = probe.stat().st_mtime - before
    probe.unlink()
    if age >= SILENT or say is None:
        return age < SILENT
    say(
        f"{path}: a run on {host} had this folder {max(0, age):.0f} s ago; waiting "
        f"{SILENT - age:.0f} s to see whether it still does"
    )
    end = time.monotonic() + SILENT - age
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENT / 10))
        try:
            if path.stat().st_mtime != before:
                return True
        except FileNotFoundError:
            return False
    return False


def _told(path: Path, held: dict[str, Any]) -> str:
    who = f"process {held.get('pid', '?')} on {held.get('host', 'an unknown machine')}"
    return (
        f"{path.parent}: another run works in this folder ({who}, since "
        f"{held.get('started', '?')}). Wait for its end or stop it (a file {path.parent}/request."
        "stop ends it after its step, saved), or take another output_dir"
    )
