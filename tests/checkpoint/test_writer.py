"""Files are whole or absent, whatever becomes of their writer; each tensor is aligned."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from checkpoint_cases import leftovers, load, open_source, same
from safetensors.torch import load_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint import writer
from fluxfast.checkpoint.keys import TensorSource
from fluxfast.checkpoint.reader import BrokenFile, TensorFiles
from fluxfast.checkpoint.writer import Spec, header, write_tensors
from fluxfast.quant import FORMATS


def test_header_aligns_everything():
    specs = {
        "a.packed": Spec((3, 5), torch.int8),
        "a.scale": Spec((3,), torch.float32),
        "b.scale": Spec((7,), torch.bfloat16),
        "c": Spec((1,), torch.float64),
    }
    first, begins = header(specs, {"key": "välue"})
    assert all(begins[name] % spec.dtype.itemsize == 0 for name, spec in specs.items())
    assert len(first) % 4096 == 0 and min(begins.values()) == len(first)


def test_no_room(source, target, monkeypatch):
    monkeypatch.setattr(writer, "free_bytes", lambda path: 1000)
    with pytest.raises(
        ValueError, match=r"base\.safetensors: needs .* GB, and its disk has 0\.0 GB left"
    ):
        open_source(source).quantize(FluxTransformer, target, FORMATS["int8"])
    assert leftovers(target) == []


def test_a_source_that_shrinks_while_it_is_read(source):
    files = TensorFiles([source])
    stream = files.stream({key: TensorSource(key) for key in files.shapes})
    next(stream)
    os.truncate(source, 5000)
    with pytest.raises(BrokenFile, match=r"flux\.safetensors: became shorter"):
        list(stream)


KILLED = """
import os, signal, sys
from pathlib import Path
from fluxfast import FluxTransformer
from fluxfast.checkpoint import tensor_stream
from fluxfast.checkpoint.opening import open_single_file
from fluxfast.quant import FORMATS

quantized = tensor_stream.quantized

def up_to(*args):
    for i, pair in enumerate(quantized(*args)):
        if i == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair

tensor_stream.quantized = up_to
open_single_file(sys.argv[1]).quantize(FluxTransformer, Path(sys.argv[2]), FORMATS["int8"])
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_killed_midway(source, target):
    # by then almost all of the file is there
    last = len(open_source(source).files.shapes)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(target), str(last)]
    ended = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not target.exists() and len(leftovers(target)) == 1
    open_source(source).quantize(FluxTransformer, target, FORMATS["int8"])
    assert leftovers(target) == []
    same(
        load(target),
        open_source(source).load(FluxTransformer, torch.float32, format=FORMATS["int8"]),
    )


@pytest.mark.skipif(os.name != "posix", reason="no locks on files")
def test_a_writer_at_work_is_left_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    specs = {"x": Spec((2,), torch.float32)}
    neighbour = tmp_path / ".y.safetensors.1.tmp"
    neighbour.touch()

    def tensors():
        (working,) = tmp_path.glob(".x.*")
        abandoned = Path(f"{working}".replace(str(os.getpid()), "1"))
        abandoned.touch()
        writer.remove_abandoned(path)
        assert working.exists() and not abandoned.exists()
        yield "x", torch.ones(2)

    write_tensors(path, specs, {}, tensors())
    assert torch.equal(load_file(path)["x"], torch.ones(2)) and neighbour.exists()
