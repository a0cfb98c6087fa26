"""An adapter in a checkpoint's weights: the outputs are those of the base with the adapter."""

import json
from dataclasses import replace
from pathlib import Path

import lycoris
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from tiny_flux import run, tiny_transformer, train

from bfl_reference import BflFlux
from fluxfast import FluxTransformer, __version__
from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.kind import AdapterFile
from fluxfast.adapters.merge import MERGED, Merge, record
from fluxfast.checkpoint.opening import open_folder, open_single_file
from fluxfast.checkpoint.reader import CheckpointError
from fluxfast.cli.checkpoints import write_config
from fluxfast.quant import FORMATS
from support import relative_error

# the rank of each of LyCORIS' algorithms; BOFT's blocks have to fit the widths
DIMS = {"locon": 4, "lokr": 4, "loha": 4, "glora": 4, "full": 4, "ia3": 4, "diag-oft": 4, "boft": 8}
WRAPPER = lycoris.LycorisNetwork
TO_Q = "transformer_blocks.0.attn.to_q"
PROJ_OUT = "single_transformer_blocks.1.proj_out"


def base(tmp_path, dtype=torch.float32):
    tiny_transformer(dtype).save_pretrained(tmp_path / "base")
    return open_folder(tmp_path / "base")


def lora_file(tmp_path, modules=(TO_Q, PROJ_OUT), model=None, size=0.1):
    """A LoRA of rank 2 and alpha 1 for some linears of a transformer, or of the tiny one."""
    g = torch.Generator().manual_seed(3)
    model, state = tiny_transformer() if model is None else model, {}
    for module in modules:
        out, ins = model.get_submodule(module).weight.shape
        state[f"{module}.lora_A.weight"] = torch.randn(2, ins, generator=g)
        state[f"{module}.lora_B.weight"] = size * torch.randn(out, 2, generator=g)
        state[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "lora.safetensors")
    return read_adapter(tmp_path / "lora.safetensors")


def merged(tmp_path, checkpoint, file, storage, strength=1.0):
    """The folder of what was written, and the merge that wrote it."""
    merge = Merge(file, checkpoint.weights(FluxTransformer).shapes, strength)
    path = tmp_path / "merged" / "diffusion_pytorch_model.safetensors"
    checkpoint.write_changed(FluxTransformer, path, storage, merge, "merging", metadata={})
    write_config(path.parent, checkpoint.config_json(FluxTransformer, storage))
    return path.parent, merge


def with_lora(model, file, strength=1.0):
    """The model with the LoRA in its weights, by the formula."""
    with torch.no_grad():
        for module in file.targets:
            a, b = (file.state[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
            weight = model.get_submodule(module).weight
            weight.copy_(weight.double() + strength / 2 * b @ a)
    return model


@pytest.mark.parametrize("algo", DIMS)
def test_outputs_of_every_algorithm(tmp_path, algo):
    """The merged file's outputs are those of the base with lycoris-lora's adapter applied to it."""
    checkpoint, model = base(tmp_path), tiny_transformer()
    plain = run(model)
    WRAPPER.apply_preset(
        {
            "target_module": ["FluxAttention", "FeedForward", "FluxSingleTransformerBlock"],
            "target_name": [],
        }
    )
    net = lycoris.create_lycoris(model, 1.0, DIMS[algo], 2.0, algo=algo, factor=4)
    names = {id(module): name for name, module in model.named_modules()}
    modules = {names[id(each.org_module[0])]: each for each in net.loras}
    net.apply_to()
    train([p for p in net.parameters() if p.requires_grad])
    state = {
        f"{name}.{key}": tensor.detach()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "x.safetensors")
    file = read_adapter(tmp_path / "x.safetensors")
    path, merge = merged(tmp_path, checkpoint, file, torch.float32)
    expected = run(model)
    assert relative_error(plain, expected) > 1e-2
    # fp32 with other sums: W x + dW x instead of (W + dW) x
    assert relative_error(run(FluxTransformer.from_pretrained(path)), expected) < 1e-5
    assert merge.changes.keys() == modules.keys()


def test_what_changes_and_what_stays(tmp_path):
    """Of the weights, only the adapter's change, by as much as the merge says."""
    checkpoint, file = base(tmp_path), lora_file(tmp_path)
    path, merge = merged(tmp_path, checkpoint, file, torch.float32, strength=0.7)
    before, after = tiny_transformer().state_dict(), open_folder(path)
    expected = with_lora(tiny_transformer(), file, 0.7).state_dict()
    weights = after.weights(FluxTransformer)
    for name, tensor in before.items():
        actual = weights.read(name)
        if name.removesuffix(".weight") in file.targets:
            assert relative_error(actual, expected[name]) < 1e-6
            change = merge.changes[name.removesuffix(".weight")].relative
            assert change == pytest.approx(relative_error(expected[name], tensor), rel=1e-5)
        else:
            assert torch.equal(actual, tensor), name
    largest = max(merge.changes, key=lambda name: merge.changes[name].relative)
    assert str(merge).startswith("2 of the adapter's 2 weights changed, together by ")
    assert f"most: {largest}, " in str(merge)


def test_into_a_file_of_bfl(tmp_path):
    """Linears that it has as one, and one of which it stores the halves the other way round."""
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "dim": 64, "n_heads": 2, "depth": 1, "depth_single": 1}
    model = BflFlux(**sizes, context=24, pooled=20, axes=(4, 14, 14), guidance=True)
    save_file({k: t.contiguous() for k, t in model.state_dict().items()}, tmp_path / "bfl.sft")
    before = FluxTransformer.from_single_file(tmp_path / "bfl.sft")
    single = "single_transformer_blocks.0"
    file = lora_file(
        tmp_path, [f"{single}.attn.to_k", f"{single}.proj_mlp", "norm_out.linear"], before
    )
    path, _ = merged(tmp_path, open_single_file(tmp_path / "bfl.sft"), file, torch.float32)
    after = FluxTransformer.from_pretrained(path).state_dict()
    for name, tensor in with_lora(before, file).state_dict().items():
        assert relative_error(after[name], tensor) < 1e-6, name


def test_rounded_once(tmp_path):
    """A bf16 base is merged in fp32, not in bf16."""
    checkpoint, file = base(tmp_path, torch.bfloat16), lora_file(tmp_path)
    path, _ = merged(tmp_path, checkpoint, file, torch.bfloat16)
    model = with_lora(tiny_transformer(torch.bfloat16).double(), file)
    written = open_folder(path).weights(FluxTransformer)
    for module in file.targets:
        exact = model.get_submodule(module).weight
        # half of the last of bf16's bits, and a few of fp32's roundings before it
        error = (written.read(f"{module}.weight").double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 + exact.abs().max() * 2**-22).all()


@pytest.mark.parametrize("format", FORMATS)
def test_into_a_format(tmp_path, format):
    """The bytes are those of quantising the merged weights."""
    checkpoint, file = base(tmp_path), lora_file(tmp_path)
    path, _ = merged(tmp_path, checkpoint, file, torch.float32)
    direct = tmp_path / "direct.safetensors"
    open_folder(path).quantize(FluxTransformer, direct, FORMATS[format])
    direct = open_single_file(direct).files.mapped()
    path, _ = merged(tmp_path, checkpoint, file, FORMATS[format])
    written = open_folder(path)
    assert written.quantized.format is FORMATS[format]
    written.files.verify()
    # nothing that quantising a checkpoint gives, so no checkpoint makes it stale
    written.quantized.check_own_source()
    assert written.files.mapped().keys() == direct.keys()
    for name, tensor in written.files.mapped().items():
        assert torch.equal(tensor.view(torch.uint8), direct[name].view(torch.uint8)), name


@pytest.mark.parametrize("format", FORMATS)
def test_from_a_quantised_base(tmp_path, format):
    """Its weights are decoded, changed, and stay where nothing changes them."""
    base(tmp_path).quantize(FluxTransformer, tmp_path / "q.safetensors", FORMATS[format])
    checkpoint, file = open_single_file(tmp_path / "q.safetensors"), lora_file(tmp_path)
    path, _ = merged(tmp_path, checkpoint, file, torch.float32)
    quantised = FluxTransformer.from_single_file(tmp_path / "q.safetensors")
    after = open_folder(path).weights(FluxTransformer)
    for module in (*file.targets, "transformer_blocks.0.attn.to_k", "x_embedder"):
        decoded = quantised.get_submodule(module).weight.detach()
        expected = decoded
        if module in file.targets:
            a, b = (file.state[f"{module}.lora_{factor}.weight"] for factor in "AB")
            expected = decoded + 0.5 * b @ a
        assert relative_error(after.read(f"{module}.weight"), expected) < 1e-6


def test_one_in_another(tmp_path):
    """Both merges are told, in order, and a kept linear keeps its dtype in a format."""
    checkpoint, file = base(tmp_path, torch.bfloat16), lora_file(tmp_path, ["x_embedder"])
    first = record(file, 1.0, checkpoint.where, checkpoint.files.files, None)
    second = record(file, 0.5, "/home/me/other", [], first[MERGED])
    told = json.loads(second[MERGED])
    assert [entry["strength"] for entry in told] == [1.0, 0.5]
    assert [entry["base"] for entry in told] == ["base", "other"]
    assert {entry["adapter"]["name"] for entry in told} == {"lora.safetensors"}
    assert {entry["fluxfast"] for entry in told} == {__version__}
    assert "/home" not in second[MERGED] and str(tmp_path) not in second[MERGED]
    path, _ = merged(tmp_path, checkpoint, file, FORMATS["int8"])
    assert open_folder(path).files.dtypes["x_embedder.weight"] == torch.bfloat16
    changed = with_lora(tiny_transformer(torch.bfloat16).float(), file).x_embedder.weight
    actual = open_folder(path).weights(FluxTransformer).read("x_embedder.weight")
    assert relative_error(actual, changed) < 2**-8


def test_an_adapter_of_another_model(tmp_path):
    shapes = base(tmp_path).weights(FluxTransformer).shapes
    file = lora_file(tmp_path)
    elsewhere = {f"x.{key}": tensor for key, tensor in file.state.items()}
    names = [f"x.{name}" for name in file.targets]
    absent = AdapterFile(Path("l"), elsewhere, names, algos=dict.fromkeys(names, "lora"))
    with pytest.raises(ValueError, match=rf"l: the checkpoint has no such .* x\.{TO_Q}"):
        Merge(absent, shapes)
    narrower = {k: t[:, :-1] if "lora_A" in k else t for k, t in file.state.items()}
    message = rf"l: ({TO_Q}|{PROJ_OUT}): its lora is for a weight \[32, \d+\], and the base's is"
    with pytest.raises(ValueError, match=message):
        Merge(replace(file, path=Path("l"), state=narrower), shapes)
    norm = {"proj_out.diff": torch.zeros(8, 32), "proj_out.diff_b": torch.zeros(8)}
    biased = AdapterFile(Path("l"), norm, ["proj_out"], algos={"proj_out": "full"})
    with pytest.raises(ValueError, match="l: proj_out: the checkpoint has no bias there"):
        Merge(biased, {"proj_out.weight": (8, 32)})
    with pytest.raises(ValueError, match="strength: expected a finite number, got nan"):
        Merge(file, shapes, float("nan"))


def test_a_value_too_large(tmp_path):
    """fp16 ends at 65504; nothing is written then."""
    checkpoint, file = base(tmp_path), lora_file(tmp_path, size=1e6)
    with pytest.raises(CheckpointError, match=r"reaches .*, which torch\.float16 can't hold"):
        merged(tmp_path, checkpoint, file, torch.float16)
    assert not list((tmp_path / "merged").iterdir())


def test_nothing_changes(tmp_path):
    checkpoint, file = base(tmp_path), lora_file(tmp_path, size=0.0)
    _, merge = merged(tmp_path, checkpoint, file, torch.float32)
    assert str(merge) == "none of the adapter's 2 weights changed: at strength 1 it adds nothing"


def test_diffusers_reads_it(tmp_path):
    """A folder in bf16 loads as diffusers' own transformer."""
    checkpoint, file = base(tmp_path), lora_file(tmp_path)
    path, _ = merged(tmp_path, checkpoint, file, torch.bfloat16)
    loaded = FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32)
    # the weights' rounding to bf16
    assert relative_error(run(loaded), run(with_lora(tiny_transformer(), file))) < 2**-7
