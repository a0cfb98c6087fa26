"""A checkpoint that is quantised while it is read is, bit for bit, the model that was quantised in
memory; and what becomes of files that are stale, cut short, somebody else's, or whose writer was
killed.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bfl_reference import BflFlux
from fluxfast import FluxTransformer
from fluxfast.checkpoint import naming, quantized, writer
from fluxfast.checkpoint.flux import open_folder, open_single_file
from fluxfast.checkpoint.quantized import StaleFile
from fluxfast.checkpoint.reader import AHEAD, BrokenFile, CheckpointError, TensorFiles
from fluxfast.checkpoint.side_by_side import groups, side_by_side
from fluxfast.checkpoint.writer import BEHIND, Spec, header, write_tensors
from fluxfast.quant import FORMATS
from fluxfast.quant.format import Format
from fluxfast.quant.rules import quantize_model
from support import SMALL, randomise

CONFIG = SMALL | {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}
BFL = {
    "in_channels": 16,
    "dim": 64,
    "n_heads": 2,
    "depth": 1,
    "depth_single": 2,
    "context": 24,
    "pooled": 20,
}
LAYOUTS = ("folder", "sharded", "diffusers", "bfl", "comfy")
INT8 = FORMATS["int8"]


def make_model(dtype=torch.bfloat16):
    model = FluxTransformer(**CONFIG)
    randomise(model)
    return model.to(dtype)


def save_source(root, layout, dtype=torch.bfloat16):
    """A checkpoint in one of LAYOUTS; returns its path."""
    if layout in ("bfl", "comfy"):
        torch.manual_seed(0)
        prefix = naming.COMFY_PREFIX if layout == "comfy" else ""
        state = BflFlux(**BFL, axes=(4, 14, 14), guidance=True).state_dict()
        save_file(
            {prefix + name: tensor.to(dtype).contiguous() for name, tensor in state.items()},
            root / "flux.safetensors",
        )
        return root / "flux.safetensors"
    model = make_model(dtype)
    if layout == "diffusers":
        save_file(model.state_dict(), root / "flux.safetensors")
        return root / "flux.safetensors"
    model.save_pretrained(root / "flux", max_shard_size="50KB" if layout == "sharded" else "10GB")
    return root / "flux"


def open_source(path):
    return open_folder(path) if path.is_dir() else open_single_file(path)


def load(path, **kwargs):
    return (FluxTransformer.from_pretrained if path.is_dir() else FluxTransformer.from_single_file)(
        path, **kwargs
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.fixture
def source(tmp_path):
    return save_source(tmp_path, "diffusers")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "base.safetensors"


@pytest.fixture
def written(source, target):
    open_source(source).quantize(FluxTransformer, target, INT8)
    return target


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def leftovers(target):
    return sorted(path.name for path in target.parent.iterdir() if path != target)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_quantised_in_memory(tmp_path, target, layout, format):
    path = save_source(tmp_path, layout)
    expected = load(path, torch_dtype=torch.bfloat16)
    quantize_model(expected, FORMATS[format])

    placed = open_source(path).load(FluxTransformer, torch.bfloat16, format=FORMATS[format])
    same(placed, expected)
    size = open_source(path).quantize(FluxTransformer, target, FORMATS[format])
    assert size == target.stat().st_size and leftovers(target) == []
    mapped = FluxTransformer.from_single_file(target, torch_dtype=torch.bfloat16)
    same(mapped, expected)
    assert (
        dict(mapped.config).items()
        >= {k: v for k, v in CONFIG.items() if k != "axes_dims_rope"}.items()
    )
    for model in (placed, mapped):
        state = model.state_dict()
        assert all(side_by_side([state[name] for name in group]) for group in groups(state))
        assert not model.training and all(
            parameter.grad_fn is None for parameter in model.parameters()
        )


def test_the_library_reads_it(written):
    """Whole for safetensors' own reader, which checks that the data has no gap; and with every
    tensor where ours finds it.
    """
    ours = FluxTransformer.from_single_file(written).state_dict()
    for name, tensor in load_file(written).items():
        assert torch.equal(tensor.view(torch.uint8), ours[name].to(tensor.dtype).view(torch.uint8))
    with safe_open(written, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_folder(tmp_path, source):
    checkpoint, folder = open_source(source), tmp_path / "folder"
    checkpoint.quantize(
        FluxTransformer, folder / "diffusion_pytorch_model.safetensors", FORMATS["nf4"]
    )
    (folder / "config.json").write_text(checkpoint.config_json(FluxTransformer, FORMATS["nf4"]))
    expected = load(source, torch_dtype=torch.bfloat16)
    quantize_model(expected, FORMATS["nf4"])
    same(FluxTransformer.from_pretrained(folder, torch_dtype=torch.bfloat16), expected)
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "nf4"
    )


def test_dtype_of_the_rest(written):
    model = FluxTransformer.from_single_file(written, torch_dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.transformer_blocks[0].attn.to_q.compute_dtype == torch.float32
    state = model.state_dict()
    assert all(side_by_side([state[name] for name in group]) for group in groups(state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_quantised_from_the_stored_values(tmp_path, target, dtype):
    """Not from what rounding to the run's dtype would leave of them."""
    path = save_source(tmp_path, "bfl", dtype)
    open_source(path).quantize(FluxTransformer, target, INT8)
    weight = load_file(path)["double_blocks.0.img_attn.proj.weight"]
    parts = INT8.quantize(weight.float())
    stored = load_file(target)
    for part, value in parts.items():
        assert torch.equal(stored[f"transformer_blocks.0.attn.to_out.0.weight.{part}"], value)
    assert stored["x_embedder.weight"].dtype == dtype
    model = FluxTransformer.from_single_file(target, torch_dtype=torch.bfloat16)
    same(model, open_source(path).load(FluxTransformer, torch.bfloat16, format=INT8))


def test_mapped_not_copied(written):
    """What a second start holds is the file: one storage, no bytes beside it."""
    model = FluxTransformer.from_single_file(written, torch_dtype=torch.bfloat16)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for tensor in model.state_dict().values()
    }
    assert [storage.nbytes() for storage in storages.values()] == [written.stat().st_size]
    before = written.read_bytes()
    model.transformer_blocks[0].attn.to_q.bias.data.zero_()
    assert written.read_bytes() == before


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


def live_bytes():
    storages = {}
    for thing in gc.get_objects():
        # what torch.compile has traced leaves tensors without memory of their own
        real = type(thing) in (
            torch.Tensor,
            torch.nn.Parameter,
        ) and not torch._is_functional_tensor(thing)
        if real and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def peak(monkeypatch):
    """The most bytes of tensors that were alive whenever a weight was quantised, beyond those alive
    now.
    """
    quantize, before, seen, calls = Format.quantize, live_bytes(), [0], count()

    def counted(self, weight, **kwargs):
        parts = quantize(self, weight, **kwargs)
        # a look at every object takes its time
        if next(calls) % 7 == 5:
            seen[0] = max(seen[0], live_bytes() - before)
        return parts

    monkeypatch.setattr(Format, "quantize", counted)
    return seen


def test_memory_while_writing(tmp_path, source, target, peak):
    checkpoint = open_source(source)
    largest = max(checkpoint.files.nbytes([naming.Source(key)]) for key in checkpoint.files.shapes)
    size = checkpoint.quantize(FluxTransformer, target, INT8)
    # buffers read ahead; parts that wait or are being written, at int8's half of the source; the
    # library's own tables
    bound = (AHEAD + 1) * largest + (BEHIND + 3) * (largest // 2 + 4096) + 16384
    assert 0 < peak[0] <= bound < size


def test_memory_while_placing(source, peak):
    checkpoint = open_source(source)
    largest = max(checkpoint.files.nbytes([naming.Source(key)]) for key in checkpoint.files.shapes)
    model = checkpoint.load(FluxTransformer, torch.bfloat16, format=INT8)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert size <= peak[0] <= size + (AHEAD + 2) * largest + 16384 < checkpoint.nbytes


def change_one_weight(path):
    """Other values under the same header: what a fine-tune of the same shape looks like."""
    state = load_file(path)
    save_file({name: tensor + (name == "proj_out.weight") for name, tensor in state.items()}, path)


def test_stale(source, written):
    info = open_single_file(written).quantized
    info.check([source], INT8)
    info.check_own_source()
    with pytest.raises(
        StaleFile, match=r"base\.safetensors: holds int8, expected nf4: make it anew"
    ):
        info.check([source], FORMATS["nf4"])
    size = source.stat().st_size
    change_one_weight(source)
    assert source.stat().st_size == size
    for check in (info.check_own_source, lambda: info.check([source], INT8)):
        with pytest.raises(
            StaleFile,
            match=r"base\.safetensors: made from .*flux\.safetensors, which has changed since",
        ):
            check()
    source.unlink()
    info.check_own_source()


def test_a_source_with_one_more_file(tmp_path, target):
    path = save_source(tmp_path, "sharded")
    open_source(path).quantize(FluxTransformer, target, INT8)
    info = open_single_file(target).quantized
    files = open_source(path).files.files
    info.check(files, INT8)
    with pytest.raises(StaleFile, match="no file"):
        info.check(files[:-1], INT8)


def test_copies_are_as_good(tmp_path, source, written):
    """Neither a new date nor another folder makes a file stale."""
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copyfile(source, tmp_path / "elsewhere" / source.name)
    open_single_file(written).quantized.check([copy], INT8)


def test_other_layouts_of_the_file(source, written, monkeypatch):
    monkeypatch.setattr(quantized, "LAYOUT", "3")
    with pytest.raises(
        StaleFile,
        match=r"base\.safetensors: int8 in layout 2, this version reads layout 3.*make it anew",
    ):
        FluxTransformer.from_single_file(written)


def test_what_was_written_before_checksums(written):
    """Layout 1 had the same tensors, which nothing can verify."""
    metadata = metadata_of(written)
    told = json.loads(metadata["fluxfast_quantized"]) | {"layout": "1"}
    save_file(load_file(written), written, {"format": "pt", "fluxfast_quantized": json.dumps(told)})
    with pytest.raises(StaleFile, match=r"int8 in layout 1, .*make it anew"):
        FluxTransformer.from_single_file(written)


@pytest.mark.parametrize("cut", [1, 1000, 5000, 30_000])
def test_truncated(written, cut):
    written.write_bytes(written.read_bytes()[:-cut])
    with pytest.raises(BrokenFile, match=r"base\.safetensors: not a whole safetensors file"):
        FluxTransformer.from_single_file(written)


def test_tensors_that_are_not_the_formats(written):
    metadata = metadata_of(written)
    state = load_file(written)
    name = "transformer_blocks.0.attn.to_q.weight"
    for change, message in (
        (
            {f"{name}.packed": state[f"{name}.packed"].view(torch.uint8)},
            f"{name}.packed holds torch.uint8, expected torch.int8",
        ),
        ({f"{name}.scale": state[f"{name}.scale"][:5]}, f"{name}.scale has shape"),
        ({f"{name}.bonus": torch.zeros(1)}, f"1 unexpected: {name}.bonus"),
        ({"proj_out.bias": torch.zeros(16, dtype=torch.int32)}, "proj_out.bias holds torch.int32"),
    ):
        tensors = state | change
        specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        write_tensors(written, specs, metadata, tensors.items(), checked=True)
        for read in (
            FluxTransformer.from_single_file,
            lambda path: open_single_file(path).check(FluxTransformer),
        ):
            with pytest.raises(CheckpointError, match=message):
                read(written)


def test_foreign(source, written):
    with pytest.raises(
        CheckpointError, match=r"flux\.safetensors: not a transformer that fluxfast quantised"
    ):
        quantized.read_info(TensorFiles([source]))
    assert open_single_file(source).quantized is None
    with pytest.raises(CheckpointError, match="is quantised already"):
        open_single_file(written).quantize(
            FluxTransformer, written.with_name("again.safetensors"), INT8
        )
    with pytest.raises(CheckpointError, match="holds int8, asked for nf4"):
        open_single_file(written).load(FluxTransformer, torch.bfloat16, format=FORMATS["nf4"])


def test_what_may_be_written_over(tmp_path, source, written):
    other = shutil.copyfile(source, tmp_path / "other.safetensors")
    for path, message in (
        (source, "is the checkpoint itself"),
        (other, "is there already, and not made by fluxfast"),
    ):
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=message):
            open_source(source).quantize(FluxTransformer, path, INT8)
        assert path.read_bytes() == before
    open_source(source).quantize(FluxTransformer, written, FORMATS["int4"])
    assert open_single_file(written).quantized.format is FORMATS["int4"]


def test_a_weight_that_is_not_finite(source, target):
    state = load_file(source)
    state["transformer_blocks.0.attn.to_k.weight"][3, 5] = torch.nan
    save_file(state, source)
    with pytest.raises(
        CheckpointError,
        match=r"flux\.safetensors: transformer_blocks\.0\.attn\.to_k\.weight: .*nan at \[3, 5\]",
    ):
        open_source(source).quantize(FluxTransformer, target, INT8)
    assert not target.exists() and leftovers(target) == []


def test_no_room(source, target, monkeypatch):
    monkeypatch.setattr(
        writer.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 1000)
    )
    with pytest.raises(
        ValueError, match=r"base\.safetensors: needs .* GB, and its disk has 0\.0 GB left"
    ):
        open_source(source).quantize(FluxTransformer, target, INT8)
    assert leftovers(target) == []


def test_a_source_that_shrinks_while_it_is_read(source):
    files = TensorFiles([source])
    stream = files.stream({key: naming.Source(key) for key in files.shapes})
    next(stream)
    os.truncate(source, 5000)
    with pytest.raises(BrokenFile, match=r"flux\.safetensors: became shorter"):
        list(stream)


KILLED = """
import os, signal, sys
from pathlib import Path
from fluxfast import FluxTransformer
from fluxfast.checkpoint import stream
from fluxfast.checkpoint.flux import open_single_file
from fluxfast.quant import FORMATS

quantized = stream.quantized

def up_to(*args):
    for i, pair in enumerate(quantized(*args)):
        if i == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair

stream.quantized = up_to
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
    open_source(source).quantize(FluxTransformer, target, INT8)
    assert leftovers(target) == []
    same(load(target), open_source(source).load(FluxTransformer, torch.float32, format=INT8))


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
