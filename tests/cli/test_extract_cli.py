"""`fluxfast-train extract`: what it reads, writes, reports and refuses."""

import re

import pytest
import torch
from safetensors.torch import load_file

from fluxfast import FluxTransformer
from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.cli.main import main
from fluxfast.config.adapters import LORA_FORMATS
from support import SMALL, randomise, relative_error

QKV = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
NORM = "transformer_blocks.0.attn.norm_q.weight"


def saved(folder, change=0.0, rank=2, seed=5):
    """A small transformer; `change` times a matrix of that rank is added to q, k and v."""
    model = FluxTransformer(**SMALL | {"in_channels": 64, "num_layers": 1, "num_single_layers": 1})
    randomise(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in QKV:
            weight = model.get_submodule(module).weight
            out, ins = weight.shape
            weight += (
                change * torch.randn(out, rank, generator=g) @ torch.randn(rank, ins, generator=g)
            )
        if change:
            model.get_parameter(NORM).mul_(1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path):
    return saved(tmp_path / "tuned", change=0.1)


def extract(*words):
    return main(["extract", *map(str, words)])


@pytest.mark.parametrize("style", LORA_FORMATS)
def test_every_style_merges_back(tmp_path, base, tuned, style, capsys):
    """base + extracted is tuned, in the targets."""
    file = tmp_path / "lora.safetensors"
    words = [base, tuned, file, "--rank", "2", "--format", style, "--dtype", "fp32"]
    assert extract(*words) == 0
    out = capsys.readouterr().out
    assert f"lora.safetensors: rank 2, {style}, {file.stat().st_size:,} bytes" in out
    assert re.search(r"100\.00% of the difference's energy kept, in 3 modules; least: \S+to_", out)
    # norms of 1.5 times the size
    assert (
        f"1 tensors outside the targets differ too, and the LoRA has nothing of that: {NORM}" in out
    )
    assert f"most: {NORM}, by 50.00% of its norm" in out
    assert re.search(r"[\d.]+ s on (cpu|cuda); peak memory [\d.]+ GB", out)
    assert main(["merge", str(base), str(file), str(tmp_path / "back"), "--format", "fp32"]) == 0
    actual, expected = (
        FluxTransformer.from_pretrained(path).state_dict() for path in (tmp_path / "back", tuned)
    )
    for name, tensor in expected.items():
        if name != NORM:
            assert relative_error(actual[name], tensor) < 1e-6, name


def test_types_and_targets(tmp_path, base, tuned, capsys):
    words = [base, tuned, tmp_path / "out", "--rank", "1", "--targets", "to_q,attn.to_k"]
    assert extract(*words) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    lora = read_adapter(tmp_path / "out")
    assert lora.targets == sorted(QKV[:2])
    out = capsys.readouterr().out
    kept = re.search(r"([\d.]+)% of the difference's energy kept, in 2 modules", out)
    assert 50 < float(kept[1]) < 100
    assert f"{QKV[2]}.weight" in out
    # the same bytes every time
    data = file.read_bytes()
    assert extract(*words, "--overwrite") == 0
    assert file.read_bytes() == data


def test_a_quantised_checkpoint_is_told(tmp_path, base, tuned, capsys):
    assert main(["quantize", str(tuned), str(tmp_path / "q"), "--format", "int8"]) == 0
    assert extract(base, tmp_path / "q", tmp_path / "out", "--rank", "4") == 0
    assert "is quantised to int8, and its rounding counts" in capsys.readouterr().out


def test_refused(tmp_path, base, tuned, capsys):
    out = tmp_path / "out.safetensors"

    def refused(message, *words):
        assert extract(*words) == 1
        assert re.search(message, capsys.readouterr().err)

    refused("nothing to extract", base, saved(tmp_path / "same"), out, "--rank", "2")
    refused(r"rank 65: \S+ is a 64 to 64 linear", base, tuned, out, "--rank", "65")
    refused("match no module", base, tuned, out, "--rank", "2", "--targets", "to_x")
    refused("absent: no such folder", base, tmp_path / "absent", out, "--rank", "2")
    assert not out.exists()
    out.write_bytes(b"theirs")
    refused("is there already", base, tuned, out, "--rank", "2")
    assert out.read_bytes() == b"theirs"
    weights = base / "diffusion_pytorch_model.safetensors"
    refused("one of the files to read", base, tuned, weights, "--rank", "2", "--overwrite")
    assert open_checkpoint(base).weights(FluxTransformer).shapes
