"""A run's frozen base: quantised once, opened from the cache after that, never from a file that is
not what it should be.
"""

import gc
import hashlib
import io
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

from fluxfast import FluxTransformer
from fluxfast.checkpoint import reader
from fluxfast.checkpoint.opening import open_folder
from fluxfast.config.run import load_config
from fluxfast.data import encode, encoders
from fluxfast.model.apply import Choices
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from fluxfast.train import base_model, build
from fluxfast.train.base_model import CachedBase, load_transformer, open_base, quantizing_device
from support import SMALL, randomise

CPU = torch.device("cpu")


@pytest.fixture
def transformer(tmp_path):
    """A pipeline's folder with a transformer, whose weights are the test's own to change."""
    model = FluxTransformer(**SMALL | {"in_channels": 64, "num_layers": 1, "num_single_layers": 1})
    randomise(model)
    model.bfloat16().save_pretrained(tmp_path / "pipeline" / "transformer")
    return tmp_path / "pipeline"


@pytest.fixture
def load(transformer, write_config):
    """Load the base as a run with these keys would; returns it, and what was printed."""

    def load_base(**changes):
        changes = {
            "pretrained_transformer_model_name_or_path": str(transformer),
            "quantize_via": "cpu",
        } | changes
        config, out = load_config(write_config(**changes)), io.StringIO()
        resident, console = Choices(recompute=()), Console(file=out, width=200)
        model = load_transformer(config, open_base(config), resident, CPU, console)
        return model, out.getvalue()

    return load_base


@pytest.fixture
def reads(monkeypatch):
    """The files whose tensors were read from then on."""
    files, stream = [], reader.TensorFiles.stream

    def noted(self, *args):
        files.extend(path.name for path in self.files)
        return stream(self, *args)

    monkeypatch.setattr(reader.TensorFiles, "stream", noted)
    return files


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def cached(tmp_path):
    return sorted((tmp_path / "user" / "fluxfast" / "transformer").iterdir())


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def in_memory(transformer, format, dtype=torch.bfloat16):
    model = FluxTransformer.from_pretrained(transformer / "transformer", torch_dtype=dtype)
    quantize_model(model, FORMATS[format])
    return model


@pytest.mark.parametrize(("precision", "format"), [("int8-quanto", "int8"), ("nf4-bnb", "nf4")])
def test_the_second_start_reads_the_cache_only(
    tmp_path, transformer, load, reads, precision, format
):
    first, said = load(base_model_precision=precision)
    (file,) = cached(tmp_path)
    assert (
        f"in {format}, kept in {file}" in said and reads[0] == "diffusion_pytorch_model.safetensors"
    )
    same(first, in_memory(transformer, format))
    reads.clear()
    second, said = load(base_model_precision=precision)
    # once, to verify it
    assert f"base: {format} from {file}" in said and reads == [file.name]
    same(first, second)
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_one_file_for_each_format(tmp_path, load):
    load(base_model_precision="int8-quanto")
    load(base_model_precision="int4-quanto")
    names = [path.name.rsplit("-", 1) for path in cached(tmp_path)]
    assert len({digest for digest, _ in names}) == 1
    assert [format for _, format in names] == ["int4.safetensors", "int8.safetensors"]


def test_no_cache_of_what_is_not_quantised(tmp_path, load):
    load()
    assert not (tmp_path / "user" / "fluxfast" / "transformer").exists()


def test_a_changed_source_is_quantised_anew(tmp_path, transformer, load):
    load(base_model_precision="int8-quanto")
    (before,) = cached(tmp_path)
    file = transformer / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({name: tensor * 2 for name, tensor in state.items()}, file)
    model, said = load(base_model_precision="int8-quanto")
    assert f"{before}: made from" in said and "which has changed since" in said
    # nobody can use the first one any more
    assert len(cached(tmp_path)) == 1 and cached(tmp_path) != [before]
    same(model, in_memory(transformer, "int8"))


def test_runs_share_it_by_its_content(tmp_path, transformer, load, reads):
    """Another output folder, and a copy of the weights elsewhere, take what the first run made."""
    first, _ = load(base_model_precision="int8-quanto")
    shutil.copytree(transformer, tmp_path / "copy")
    reads.clear()
    second, said = load(
        name="second",
        pretrained_transformer_model_name_or_path=str(tmp_path / "copy"),
        base_model_precision="int8-quanto",
    )
    (file,) = cached(tmp_path)
    assert f"base: int8 from {file}" in said and reads == [file.name]
    same(first, second)


def test_two_runs_may_make_it_at_once(tmp_path, transformer, load, monkeypatch):
    """Both find no file, and both write it: it is whole whoever comes last."""
    other, made = [], CachedBase.make

    def late(self, *args):
        if not other:
            other.append(None)
            other.append(load(name="other", base_model_precision="int8-quanto")[0])
        return made(self, *args)

    monkeypatch.setattr(CachedBase, "make", late)
    first, _ = load(base_model_precision="int8-quanto")
    assert len(cached(tmp_path)) == 1
    same(first, other[1])
    _, said = load(base_model_precision="int8-quanto")
    assert "base: int8 from" in said


def test_another_base_takes_no_other_ones_place(tmp_path, transformer, load):
    load(base_model_precision="int8-quanto")
    other = shutil.copytree(transformer, tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    names = {"pretrained_transformer_model_name_or_path": str(other)}
    model, said = load(base_model_precision="int8-quanto", **names)
    assert len(cached(tmp_path)) == 2 and "kept in" in said
    same(model, in_memory(other, "int8"))
    _, said = load(base_model_precision="int8-quanto")
    assert "kept in" not in said


def test_an_earlier_versions_cache_goes_on_being_used(tmp_path, transformer, load, reads):
    """It lies in the output folder, and is named after the path that it was made from."""
    first, _ = load(base_model_precision="int8-quanto")
    (file,) = cached(tmp_path)
    where = transformer / "transformer"
    digest = hashlib.sha256(str(where).encode()).hexdigest()[:8]
    earlier = (
        tmp_path / "output" / "cache" / "transformer" / f"transformer-{digest}-int8.safetensors"
    )
    earlier.parent.mkdir(parents=True)
    file.rename(earlier)
    reads.clear()
    second, said = load(base_model_precision="int8-quanto")
    assert f"base: int8 from {earlier.parent}" in said and len(reads) == 1
    assert len(list(earlier.parent.iterdir())) == 1 and not cached(tmp_path)
    same(first, second)


def test_a_damaged_cache_is_made_anew(tmp_path, transformer, load):
    load(base_model_precision="int8-quanto")
    (file,) = cached(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    model, said = load(base_model_precision="int8-quanto")
    assert f"{file}: not a whole safetensors file" in said
    same(model, in_memory(transformer, "int8"))


def flip(file, begin):
    """Turn eight bytes into others."""
    data = bytearray(file.read_bytes())
    data[begin : begin + 8] = bytes(byte ^ 0x55 for byte in data[begin : begin + 8])
    file.write_bytes(data)


@pytest.mark.parametrize("place", ["config", "tensor"])
def test_flipped_bytes_in_the_cache(tmp_path, transformer, load, place):
    load(base_model_precision="int8-quanto")
    (file,) = cached(tmp_path)
    whole = file.read_bytes()
    flip(file, whole.index(b"num_layers") if place == "config" else len(whole) - 1000)
    model, said = load(base_model_precision="int8-quanto")
    assert (
        f"{file}: " in said
        and "damaged" in said
        and "(done now)" in said
        and f"kept in {file}" in said
    )
    same(model, in_memory(transformer, "int8"))
    assert file.read_bytes() == whole
    _, said = load(base_model_precision="int8-quanto")
    assert "damaged" not in said


def test_flipped_bytes_in_a_file_of_ones_own(tmp_path, transformer, load, monkeypatch):
    """Refused and kept; where reading it would take long, the run says that it was not verified."""
    target = tmp_path / "mine.safetensors"
    open_folder(transformer / "transformer").quantize(FluxTransformer, target, FORMATS["int8"])
    flip(target, target.stat().st_size - 1000)
    damaged = target.read_bytes()
    base = {"pretrained_transformer_model_name_or_path": str(target)}
    with pytest.raises(
        ValueError,
        match=r"mine\.safetensors: tensor .* has changed since it was written.*make it anew",
    ):
        load(**base)
    assert target.read_bytes() == damaged
    monkeypatch.setattr("fluxfast.checkpoint.transformer.VERIFIED_BYTES", 0)
    _, said = load(**base)
    assert "not verified (`fluxfast-train quantize --verify` reads it through)" in said


@pytest.mark.parametrize("name", ["flux1-dev.sft", "flux1-dev"])
def test_a_single_file(tmp_path, transformer, load, name):
    (file,) = (transformer / "transformer").glob("*.safetensors")
    shutil.copyfile(file, tmp_path / name)
    model, _ = load(pretrained_transformer_model_name_or_path=str(tmp_path / name))
    same(
        model,
        FluxTransformer.from_pretrained(transformer / "transformer", torch_dtype=torch.bfloat16),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_embedder.weight": torch.zeros(64, 384)},
            r"base\.sft: 384 input channels: FLUX\.1 Fill.*take flux1-dev",
        ),
        (
            {"x_embedder.weight": torch.zeros(64, 16)},
            r"base\.sft: 16 input channels: .*take flux1-dev",
        ),
        (
            {"proj_out.weight.absmax": torch.zeros(1)},
            r"base\.sft: holds weights quantised by bitsandbytes.*take .*flux1-dev",
        ),
    ],
)
def test_bases_that_are_not_trained(tmp_path, transformer, write_config, change, message):
    """Refused when they are opened, before anything is read."""
    (file,) = (transformer / "transformer").glob("*.safetensors")
    save_file(load_file(file) | change, tmp_path / "base.sft")
    config = load_config(
        write_config(pretrained_transformer_model_name_or_path=str(tmp_path / "base.sft"))
    )
    with pytest.raises(ValueError, match=message):
        open_base(config)


@pytest.mark.parametrize("transformer_too", [False, True])
def test_a_file_in_the_pipelines_place(tmp_path, transformer, write_config, transformer_too):
    (tmp_path / "flux1-dev.sft").touch()
    keys = (
        {"pretrained_transformer_model_name_or_path": str(transformer)} if transformer_too else {}
    )
    config = load_config(
        write_config(pretrained_model_name_or_path=str(tmp_path / "flux1-dev.sft"), **keys)
    )
    with pytest.raises(
        ValueError,
        match=r'flux1-dev\.sft: is one file, .*as "pretrained_transformer_model_name_or_path"',
    ):
        open_base(config)


def test_somebody_elses_file_is_refused_and_kept(tmp_path, transformer, load):
    load(base_model_precision="int8-quanto")
    (file,) = cached(tmp_path)
    file.write_bytes(
        (transformer / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    before = file.read_bytes()
    with pytest.raises(reader.CheckpointError, match="not made by fluxfast"):
        load(base_model_precision="int8-quanto")
    assert file.read_bytes() == before


def test_without_room_it_is_placed_in_memory(tmp_path, transformer, load, monkeypatch):
    monkeypatch.setattr(base_model, "free_bytes", lambda path: 1 << 30)
    model, said = load(base_model_precision="int8-quanto")
    assert "int8, not kept" in said and "has 1.1 GB left" in said
    assert not (tmp_path / "user" / "fluxfast" / "transformer").exists()
    same(model, in_memory(transformer, "int8"))


def test_a_quantised_file_by_name(tmp_path, transformer, load):
    target = tmp_path / "mine.safetensors"
    open_folder(transformer / "transformer").quantize(FluxTransformer, target, FORMATS["int4"])
    for changes in ({}, {"base_model_precision": "int4-quanto"}):
        model, said = load(pretrained_transformer_model_name_or_path=str(target), **changes)
        assert f"{target}: int4, quantised before" in said
        same(model, in_memory(transformer, "int4"))
    with pytest.raises(
        ValueError,
        match=r"mine\.safetensors: is quantised to int4, but base_model_precision is int8-quanto",
    ):
        load(
            pretrained_transformer_model_name_or_path=str(target),
            base_model_precision="int8-quanto",
        )
    file = transformer / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        ValueError, match=r"mine\.safetensors: made from .*, which has changed since"
    ):
        load(pretrained_transformer_model_name_or_path=str(target))


def test_default_dtype(transformer, load):
    keys = {"base_model_precision": "int8-quanto", "optimizer": "torch-adamw"}
    for changes, dtype in (
        ({}, torch.bfloat16),
        ({"base_model_default_dtype": "fp32"}, torch.float32),
        ({"mixed_precision": "no"}, torch.bfloat16),
        ({"mixed_precision": "no", "base_model_default_dtype": "fp32"}, torch.float32),
    ):
        model, _ = load(**keys, **changes)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model, _ = load(optimizer="torch-adamw", mixed_precision="no")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_where_it_is_quantised():
    cuda = torch.device("cuda", 1)
    assert quantizing_device(None, cuda) == quantizing_device("accelerator", cuda) == cuda
    assert (
        quantizing_device("cpu", cuda)
        == quantizing_device(None, CPU)
        == quantizing_device("cpu", CPU)
        == CPU
    )
    with pytest.raises(ValueError, match='quantize_via is "accelerator", and there is no CUDA'):
        quantizing_device("accelerator", CPU)


def test_one_model_at_a_time(run, monkeypatch, tmp_path):
    """Text encoders, VAE and transformer are loaded with none of the others in memory."""
    seen: dict[str, list[str]] = {}
    kinds = (T5EncoderModel, CLIPTextModel, AutoencoderKL, FluxTransformer)

    def models():
        return [thing for thing in gc.get_objects() if type(thing) in kinds]

    def noting(place, name, what):
        load = getattr(place, name)

        def noted(*args, **kwargs):
            seen[what] = [type(thing).__name__ for thing in models() if id(thing) not in before]
            return load(*args, **kwargs)

        monkeypatch.setattr(place, name, noted)

    noting(encoders, "load_t5", "T5")
    noting(encode.LatentEncoder, "from_pretrained", "VAE")
    noting(build, "load_transformer", "transformer")
    gc.collect()
    # other tests' models that a library still holds
    before = {id(thing) for thing in models()}
    # caches of its own, so that the encoders are needed
    run(
        dataset={"cache_dir_vae": str(tmp_path / "vae")},
        text_encoder_1_precision="int8-quanto",
        text_encoder_2_precision="int8-quanto",
        base_model_precision="int8-quanto",
        max_train_steps=1,
    )
    # CLIP, of 250 MB, is beside T5
    assert seen == {"T5": ["CLIPTextModel"], "VAE": [], "transformer": []}
