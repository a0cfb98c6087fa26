"""`fluxfast-train merge`: what it reads, writes, reports and refuses."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fluxfast import FluxTransformer
from fluxfast.adapters.merge import MERGED
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.checkpoint.quantized import fingerprint
from fluxfast.cli.main import main
from fluxfast.config.precision_words import in_words
from fluxfast.quant import FORMATS
from support import SMALL, randomise, relative_error

TO_Q = "transformer_blocks.0.attn.to_q"
PROJ_OUT = "single_transformer_blocks.0.proj_out"


@pytest.fixture
def base(tmp_path):
    model = FluxTransformer(**SMALL | {"in_channels": 64, "num_layers": 1, "num_single_layers": 1})
    randomise(model)
    model.bfloat16().save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    return tmp_path / "pipeline"


@pytest.fixture
def lora(tmp_path, base):
    shapes = open_checkpoint(base).weights(FluxTransformer).shapes
    g = torch.Generator().manual_seed(0)
    state = {}
    for module in (TO_Q, PROJ_OUT):
        out, ins = shapes[f"{module}.weight"]
        state[f"transformer.{module}.lora_A.weight"] = torch.randn(3, ins, generator=g)
        state[f"transformer.{module}.lora_B.weight"] = 0.1 * torch.randn(out, 3, generator=g)
        state[f"transformer.{module}.alpha"] = torch.tensor(1.5)
    save_file(state, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def merge(*words):
    return main(["merge", *map(str, words)])


def expected(base, lora, module, strength=1.0):
    weight = open_checkpoint(base).weights(FluxTransformer).read(f"{module}.weight").double()
    a, b = (
        load_file(lora)[f"transformer.{module}.lora_{factor}.weight"].double() for factor in "AB"
    )
    return weight + strength * 0.5 * b @ a


def test_a_folder_and_a_file(tmp_path, base, lora, capsys):
    assert merge(base, lora, tmp_path / "out") == 0
    out = capsys.readouterr().out
    size = (tmp_path / "out" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert f"diffusion_pytorch_model.safetensors: bf16, {size:,} bytes" in out
    assert re.search(
        rf"2 of the adapter's 2 weights changed, together by [\d.]+% of their norm; "
        rf"most: ({TO_Q}|{PROJ_OUT}), [\d.]+%",
        out,
    )
    assert re.search(r"[\d.]+ s on (cpu|cuda); peak memory [\d.]+ GB", out)
    model = FluxTransformer.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    plain = FluxTransformer.from_pretrained(base / "transformer", torch_dtype=torch.bfloat16)
    for name, tensor in plain.state_dict().items():
        changed = name.removesuffix(".weight") in (TO_Q, PROJ_OUT)
        assert torch.equal(model.state_dict()[name], tensor) != changed, name
    assert (
        relative_error(model.get_submodule(TO_Q).weight, expected(base, lora, TO_Q).bfloat16())
        < 2**-9
    )

    file = tmp_path / "merged.safetensors"
    assert merge(base / "transformer", lora, file, "--format", "fp32", "--strength", "0.5") == 0
    weights = open_checkpoint(file).weights(FluxTransformer)
    assert set(weights.dtypes.values()) == {torch.float32}
    for module in (TO_Q, PROJ_OUT):
        actual = weights.read(f"{module}.weight")
        assert relative_error(actual, expected(base, lora, module, 0.5)) < 1e-6


def test_what_the_file_says(tmp_path, base, lora):
    file = tmp_path / "merged.safetensors"
    assert merge(base, lora, file, "--strength", "0.5") == 0
    assert merge(file, lora, tmp_path / "again.safetensors", "--format", "int8") == 0
    with safe_open(tmp_path / "again.safetensors", "pt") as reader:
        first, second = json.loads(reader.metadata()[MERGED])
    assert first["adapter"]["sha256"] == fingerprint(lora).sha256
    assert (first["base"], first["strength"]) == ("transformer", 0.5)
    assert (second["base"], second["strength"]) == ("merged.safetensors", 1.0)
    assert second["base_files"][0]["sha256"] == fingerprint(file).sha256


@pytest.mark.parametrize("format", FORMATS)
def test_a_format(tmp_path, base, lora, format, capsys):
    """A run loads the result as it loads what `quantize` made; a quantised base is told."""
    assert merge(base, lora, tmp_path / "q", "--format", format, "--quantize-via", "cpu") == 0
    assert main(["quantize", "--verify", str(tmp_path / "q")]) == 0
    info = open_checkpoint(tmp_path / "q").quantized
    assert info.format is FORMATS[format]
    info.check_own_source()
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["format"] == format
    model = FluxTransformer.from_pretrained(tmp_path / "q", torch_dtype=torch.bfloat16)
    linear = FORMATS[format].quantize(expected(base, lora, TO_Q).float())
    assert torch.equal(model.get_submodule(TO_Q).packed().parts["packed"], linear["packed"])
    capsys.readouterr()
    assert merge(tmp_path / "q", lora, tmp_path / "twice.safetensors") == 0
    assert f"is quantised to {in_words(format)}: the adapter goes into" in capsys.readouterr().out


def test_refused_before_anything_is_written(tmp_path, base, lora, capsys):
    out = tmp_path / "out"

    def refused(message, *words):
        assert merge(*words) == 1
        assert re.search(message, capsys.readouterr().err)

    state = load_file(lora)
    other = tmp_path / "other.safetensors"
    save_file({k.replace("blocks.0", "blocks.7"): t for k, t in state.items()}, other)
    refused(r"the checkpoint has no such linear layers: \S*transformer_blocks\.7", base, other, out)
    narrower = {k: t[..., :-1].clone() if "lora_A" in k else t for k, t in state.items()}
    save_file(narrower, other)
    refused(
        r"its lora is for a weight \[64, 319\], and the base's is \[64, 320\]", base, other, out
    )
    refused("absent: no such LoRA", base, tmp_path / "absent", out)
    refused("absent: no such folder", tmp_path / "absent", lora, out)
    refused("strength: expected a finite number", base, lora, out, "--strength", "nan")
    assert not out.exists()


def test_what_is_there_stays(tmp_path, base, lora, capsys):
    folder, file = tmp_path / "out", tmp_path / "out.safetensors"
    for target in (folder, file):
        assert merge(base, lora, target) == 0
        assert merge(base, lora, target, "--format", "fp32") == 1
        assert "is there already: write elsewhere, or add --overwrite" in capsys.readouterr().err
        assert open_checkpoint(target).files.dtypes["proj_out.weight"] == torch.bfloat16
        assert merge(base, lora, target, "--format", "fp32", "--overwrite") == 0
        assert open_checkpoint(target).files.dtypes["proj_out.weight"] == torch.float32
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert merge(base, lora, folder, "--overwrite") == 1
    assert "holds other weights" in capsys.readouterr().err
    for source in (lora, base / "transformer" / "diffusion_pytorch_model.safetensors"):
        before = source.read_bytes()
        assert merge(base, lora, source, "--overwrite") == 1
        assert "is one of the files to read" in capsys.readouterr().err
        assert source.read_bytes() == before


def test_interrupted(tmp_path, base, lora, capsys, monkeypatch):
    """Nothing is left of a merge that is stopped in the middle."""

    def stop(self, name, tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr("fluxfast.adapters.merge.Merge.__call__", stop)
    assert merge(base, lora, tmp_path / "out.safetensors") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
