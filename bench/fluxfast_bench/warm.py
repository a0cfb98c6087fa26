"""Commands from a process that has imported everything: each is a fork of it, and starts at once.

    python -m fluxfast_bench.warm serve SOCKET              imports; then waits for commands
    python -m fluxfast_bench.warm run SOCKET MODULE WORD…   MODULE.main(WORDs), there

The imports of a command that trains take 4 to 25 s, each time anew, which is much of the time that
a GPU is lent for. The process itself never touches the GPU, because a fork of one that has could
not use it. Where an import has, or nobody serves, `run` runs the command itself, and says so.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

# what commands import, and do not touch the GPU by
MODULES = (
    "fluxfast_bench.step.step",
    "fluxfast_bench.step.profile",
    "fluxfast_bench.ops.smoke",
    "fluxfast_bench.ops.sweep",
    "fluxfast_bench.report.report",
    "fluxfast.cli.main",
    "pytest",
)
# asked about GPUs, torch then asks the driver's management library, which leaves forks usable
WITHOUT_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# there where a GPU of CUDA's is
DRIVER = Path("/dev/nvidia0")
# seconds that a command waits for the process to be ready
PATIENCE = 90.0


def serve(path: Path) -> None:
    """Imports, and then runs what is asked for at the socket `path`, which is there once it can.

    Where its forks can't use the GPU, a file of that name with the ending .unusable is left.
    """
    os.environ |= WITHOUT_CUDA
    begun = time.monotonic()
    for name in MODULES:
        importlib.import_module(name)
        print(f"{time.monotonic() - begun:6.1f} s  {name}", flush=True)
    if not _forks_have_gpu():
        path.with_suffix(".unusable").touch()
        print("an import has touched the GPU, so that forks can't use it")
        return
    server = socket.socket(socket.AF_UNIX)
    unready = path.with_suffix(".new")
    unready.unlink(missing_ok=True)
    server.bind(str(unready))
    server.listen()
    unready.rename(path)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([server, *running.values()], [], [], 0.02)
        if server in ready:
            connection, _ = server.accept()
            running[_start(connection)] = connection
        for pid, connection in list(running.items()):
            # who asked says no more, so that this is the end of it
            if connection in ready:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    connection.send(bytes([os.waitstatus_to_exitcode(status) & 255]))
                connection.close()
                del running[pid]


def _forks_have_gpu() -> bool:
    """Whether a fork of this process can use the GPU; true where there is none."""
    import torch

    if not (pid := os.fork()):
        usable = False
        try:
            # not torch's own answer, which may be no for the very reason that is looked for
            if DRIVER.exists():
                torch.zeros(1, device="cuda")
            usable = True
        finally:
            os._exit(not usable)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _start(connection: socket.socket) -> int:
    """Forks a process for the command that comes through the connection; its number."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    asked = json.loads(message)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for number, descriptor in enumerate(descriptors, 1):
                os.dup2(descriptor, number)
            os.chdir(asked["folder"])
            os.environ.clear()
            os.environ.update(asked["environment"] | WITHOUT_CUDA)
            sys.argv = asked["words"]
            code = importlib.import_module(asked["words"][0]).main(asked["words"][1:])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def run(path: Path, words: list[str]) -> int:
    """The exit status of the command, which writes to this process's output, and ends with it."""
    connection = _connected(path)
    if connection is None:
        print(f"nobody serves {path}: {words[0]} starts by itself", file=sys.stderr)
        return int(importlib.import_module(words[0]).main(words[1:]))
    asked = {"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(asked).encode()], [1, 2])
    answer = connection.recv(1)
    # nothing comes where the process itself has died
    return answer[0] if answer else 1


def _connected(path: Path) -> socket.socket | None:
    """Where `path` is served, as soon as it is; None where it will not be."""
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE and not path.with_suffix(".unusable").exists():
        if path.exists():
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
            except ConnectionRefusedError:
                return None
            return connection
        time.sleep(0.05)
    return None


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", path]:
            serve(Path(path))
        case ["run", path, module, *words]:
            sys.exit(run(Path(path), [module, *words]))
        case _:
            sys.exit(__doc__)
