"""`fluxfast-train quantize`: what it finds, writes, reports and refuses."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint.opening import open_single_file
from fluxfast.cli import quantize
from fluxfast.cli.main import main
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from support import SMALL, randomise


@pytest.fixture
def pipeline(tmp_path):
    model = FluxTransformer(**SMALL | {"in_channels": 64, "num_layers": 1, "num_single_layers": 1})
    randomise(model)
    model.bfloat16().save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    return tmp_path / "pipeline"


def expected(pipeline, format):
    model = FluxTransformer.from_pretrained(pipeline / "transformer", torch_dtype=torch.bfloat16)
    quantize_model(model, FORMATS[format])
    return model.state_dict()


def same(model, state):
    assert model.state_dict().keys() == state.keys()
    assert all(
        torch.equal(t.view(torch.uint8), state[name].view(torch.uint8))
        for name, t in model.state_dict().items()
    )


def test_a_file_and_a_folder(tmp_path, pipeline, capsys):
    assert (
        main(["quantize", str(pipeline), str(tmp_path / "base.safetensors"), "--format", "int4"])
        == 0
    )
    out = capsys.readouterr().out
    size = (tmp_path / "base.safetensors").stat().st_size
    source = next(pipeline.glob("transformer/*.safetensors")).stat().st_size
    assert f"base.safetensors: int4, {size:,} bytes from {source:,}" in out
    assert re.search(
        r"[\d.]+ s on (cpu|cuda): [\d.]+ GB/s read, [\d.]+ GB/s written; peak memory [\d.]+ GB", out
    )
    same(
        FluxTransformer.from_single_file(tmp_path / "base.safetensors", torch_dtype=torch.bfloat16),
        expected(pipeline, "int4"),
    )

    assert (
        main(
            ["quantize", str(pipeline / "transformer"), str(tmp_path / "base"), "--format", "int8"]
        )
        == 0
    )
    same(
        FluxTransformer.from_pretrained(tmp_path / "base", torch_dtype=torch.bfloat16),
        expected(pipeline, "int8"),
    )
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["num_single_layers"] == 1 and config["quantization_config"] == {
        "quant_method": "fluxfast",
        "format": "int8",
    }


def test_diffusers_refuses_the_folder(tmp_path, pipeline):
    """diffusers refuses it rather than load codes as weights."""
    from diffusers import FluxTransformer2DModel

    assert main(["quantize", str(pipeline), str(tmp_path / "base"), "--format", "int8"]) == 0
    with pytest.raises(ValueError, match="fluxfast"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "base")


def test_compared_with_a_copy(tmp_path, pipeline, capsys):
    target = tmp_path / "out" / "base.safetensors"
    assert (
        main(
            [
                "quantize",
                str(pipeline),
                str(target),
                "--format",
                "nf4",
                "--quantize-via",
                "cpu",
                "--compare-cp",
            ]
        )
        == 0
    )
    assert re.search(
        r"copying the source: [\d.]+ s; quantising took [\d.]+ times as long",
        capsys.readouterr().out,
    )
    assert list(target.parent.iterdir()) == [target]
    assert open_single_file(target).quantized.format is FORMATS["nf4"]


def test_a_single_file_by_a_relative_name(tmp_path, pipeline, monkeypatch, capsys):
    """Files with any ending are read and written."""
    (file,) = pipeline.glob("transformer/*.safetensors")
    file.rename(tmp_path / "flux1-dev.sft")
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "flux1-dev.sft", "base.sft", "--format", "int8"]) == 0
    assert "base.sft: int8" in capsys.readouterr().out
    assert open_single_file(tmp_path / "base.sft").quantized.format is FORMATS["int8"]


def test_verify(tmp_path, pipeline, capsys):
    """A file and a folder are verified; the exit status tells what was found."""
    file, folder = tmp_path / "base.safetensors", tmp_path / "base"
    for target in (file, folder):
        assert main(["quantize", str(pipeline), str(target), "--format", "int8"]) == 0
        capsys.readouterr()
        assert main(["quantize", "--verify", str(target)]) == 0
        assert re.search(
            r"int8, [\d,]+ bytes in [\d,]+ tensors, all as they were written",
            capsys.readouterr().out,
        )
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["quantize", "--verify", str(file)]) == 1
    assert re.search(
        r"base\.safetensors: tensor \S+ has changed since it was written", capsys.readouterr().err
    )
    assert main(["quantize", "--verify", str(pipeline)]) == 1
    assert "not quantised by fluxfast" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["a", "b"],
        ["a", "--format", "int8"],
        ["--verify", "x", "a"],
        ["--verify", "x", "--format", "int8"],
        [],
    ],
)
def test_words_that_do_not_go_together(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *words])
    assert ended.value.code == 2 and "--verify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [
                "{pipeline}/transformer/diffusion_pytorch_model.safetensors",
                "{pipeline}/transformer",
            ],
            "is the checkpoint itself",
        ),
        (["{pipeline}/absent.safetensors", "{pipeline}/x"], "absent.safetensors: no such file"),
        (["{pipeline}/absent", "{pipeline}/x"], "absent: no such folder"),
        (["{pipeline}", "{pipeline}/x", "--subfolder", "vae"], "vae/config.json: no such file"),
        (
            ["{pipeline}/theirs.safetensors", "{pipeline}/x"],
            "theirs.safetensors: a text, not a checkpoint",
        ),
        (
            ["{pipeline}", "{pipeline}/theirs.safetensors"],
            "theirs.safetensors: is there already, and not made by fluxfast",
        ),
    ],
)
def test_refused(pipeline, capsys, words, message):
    (pipeline / "theirs.safetensors").write_bytes(b"theirs")
    words = [word.format(pipeline=pipeline) for word in words]
    assert main(["quantize", *words, "--format", "int8"]) == 1
    assert message in capsys.readouterr().err
    assert (pipeline / "theirs.safetensors").read_bytes() == b"theirs"
    assert load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_no_accelerator(pipeline, tmp_path, capsys):
    words = [
        "quantize",
        str(pipeline),
        str(tmp_path / "x"),
        "--format",
        "int8",
        "--quantize-via",
        "accelerator",
    ]
    assert main(words) == 1 and "no CUDA or ROCm device" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_interrupted(tmp_path, pipeline, capsys, monkeypatch):
    monkeypatch.setattr(quantize, "run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["quantize", str(pipeline), str(tmp_path / "x"), "--format", "int8"]) == 130
    assert "interrupted" in capsys.readouterr().err
