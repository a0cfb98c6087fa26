"""A checkpoint becomes the model that it describes, quantised while it is read or not."""

import gc
import json
from itertools import count

import pytest
import torch
from checkpoint_cases import CONFIG, SOURCES, leftovers, load, open_source, same, save_source
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint.keys import TensorSource
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.checkpoint.reader import AHEAD, CheckpointError, TensorFiles
from fluxfast.checkpoint.side_by_side import groups, side_by_side
from fluxfast.checkpoint.writer import BEHIND
from fluxfast.quant import FORMATS
from fluxfast.quant.format import Format
from fluxfast.quant.rules import quantize_model

INT8 = FORMATS["int8"]


def test_diffusers_single_file_and_dtype(folder, tmp_path):
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
    save_file(state, tmp_path / "one.safetensors")
    model = FluxTransformer.from_single_file(
        tmp_path / "one.safetensors", torch_dtype=torch.bfloat16
    )
    again = FluxTransformer.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert (
            a.dtype == torch.bfloat16
            and torch.equal(a, b)
            and torch.equal(a, state[name].bfloat16())
        )
    assert not model.training


def test_fp8_file_loads(bfl_file, bfl_state):
    path = bfl_file(
        {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in bfl_state.items()}
    )
    weight = (
        FluxTransformer.from_single_file(path, torch_dtype=torch.bfloat16)
        .transformer_blocks[0]
        .attn.to_out[0]
        .weight
    )
    assert torch.equal(
        weight, bfl_state["double_blocks.0.img_attn.proj.weight"].to(torch.float8_e4m3fn).bfloat16()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("double_blocks.0.txt_attn.proj.bias"),
            "1 missing: double_blocks.0.txt_attn.proj.bias",
        ),
        (
            lambda s: s.update({"double_blocks.0.extra": torch.zeros(1)}),
            "1 unexpected: double_blocks.0.extra",
        ),
        (
            lambda s: s.update({"txt_in.bias": torch.zeros(63)}),
            r"txt_in.bias has shape \(63,\), expected \(64,\)",
        ),
        (lambda s: s.pop("img_in.weight"), "tensor img_in.weight is missing"),
        (
            lambda s: s.update({"img_in.weight": torch.zeros(64)}),
            r"img_in.weight has shape \(64,\), expected 2 dimensions",
        ),
        (
            lambda s: s.update({"txt_in.weight": torch.zeros(1, 64, 24)}),
            r"txt_in.weight has shape .*, expected 2 dimensions",
        ),
        (
            lambda s: s.update({"double_blocks.0.img_mlp.0.weight": torch.zeros(128, 64)}),
            "not the proportions of FLUX.1",
        ),
        (
            lambda s: s.update({"txt_in.bias": torch.zeros(64, dtype=torch.int32)}),
            "txt_in.bias holds torch.int32",
        ),
        (lambda s: [s.pop(k) for k in list(s) if "blocks" in k], "not a FLUX.1 transformer"),
    ],
)
def test_wrong_tensors_are_named(bfl_file, bfl_state, change, message):
    change(bfl_state)
    with pytest.raises(CheckpointError, match=message) as error:
        FluxTransformer.from_single_file(bfl_file(bfl_state))
    assert "flux.safetensors" in str(error.value)


def test_check_reads_no_weight(bfl_file, bfl_state, folder, monkeypatch):
    bfl_state["img_in.weight"][0] = torch.nan
    path = bfl_file(bfl_state)
    monkeypatch.setattr(TensorFiles, "stream", lambda *args: pytest.fail("a weight was read"))
    open_checkpoint(path).check(FluxTransformer)
    open_checkpoint(folder).check(FluxTransformer)
    for name, tensor, message in (
        ("txt_in.bias", torch.zeros(63), "txt_in.bias has shape"),
        ("txt_in.bias", torch.zeros(64, dtype=torch.int8), "txt_in.bias holds torch.int8"),
        ("extra", torch.zeros(1), "1 unexpected: extra"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(bfl_file(bfl_state | {name: tensor})).check(FluxTransformer)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", SOURCES)
def test_as_quantised_in_memory(tmp_path, target, kind, format):
    path = save_source(tmp_path, kind)
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
    """safetensors' own reader, which forbids gaps, finds the same tensors as ours."""
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
    """Not from those values rounded to the run's dtype."""
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
    """A second start holds nothing but the mapped file, which is one storage."""
    model = FluxTransformer.from_single_file(written, torch_dtype=torch.bfloat16)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for tensor in model.state_dict().values()
    }
    # but for the RMS norms' weights, which kernels read side by side
    norms = [t for name, t in model.state_dict().items() if ".norm_" in name and t.ndim == 1]
    sizes = sorted((storage.nbytes() for storage in storages.values()), reverse=True)
    assert sizes[0] == written.stat().st_size
    assert sum(sizes[1:]) <= sum(t.nbytes for t in norms)
    before = written.read_bytes()
    model.transformer_blocks[0].attn.to_q.bias.data.zero_()
    assert written.read_bytes() == before


def live_bytes():
    storages = {}
    for thing in gc.get_objects():
        # torch.compile leaves tensors behind that have no memory of their own
        real = type(thing) in (
            torch.Tensor,
            torch.nn.Parameter,
        ) and not torch._is_functional_tensor(thing)
        if real and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def peak(monkeypatch):
    """The most bytes of tensors alive while weights were quantised, beyond those before."""
    quantize, before, seen, calls = Format.quantize, live_bytes(), [0], count()

    def counted(self, weight, **kwargs):
        parts = quantize(self, weight, **kwargs)
        # looking at every object takes long, so not at each call
        if next(calls) % 7 == 5:
            seen[0] = max(seen[0], live_bytes() - before)
        return parts

    monkeypatch.setattr(Format, "quantize", counted)
    return seen


def test_memory_while_writing(tmp_path, source, target, peak):
    checkpoint = open_source(source)
    largest = max(checkpoint.files.nbytes([TensorSource(key)]) for key in checkpoint.files.shapes)
    size = checkpoint.quantize(FluxTransformer, target, INT8)
    # buffers that are read ahead; parts that wait or are being written, which int8 makes half as
    # large as the source; and the library's own tables
    bound = (AHEAD + 1) * largest + (BEHIND + 3) * (largest // 2 + 4096) + 16384
    assert 0 < peak[0] <= bound < size


def test_memory_while_placing(source, peak):
    checkpoint = open_source(source)
    largest = max(checkpoint.files.nbytes([TensorSource(key)]) for key in checkpoint.files.shapes)
    model = checkpoint.load(FluxTransformer, torch.bfloat16, format=INT8)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert size <= peak[0] <= size + (AHEAD + 2) * largest + 16384 < checkpoint.nbytes
