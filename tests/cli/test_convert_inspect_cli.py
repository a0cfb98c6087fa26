"""`fluxfast-train convert` and `inspect`: what they write, say and refuse."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.norms import change_norm, place_of
from fluxfast.cli.main import main
from lycoris_cases import OPTIONS, trained

Q = "transformer_blocks.{}.attn.to_q"


def lora_file(path, dtype=torch.float32, alpha=8.0, blocks=3, metadata=None):
    """A LoRA of rank 4 on to_q of some double blocks and on the last linear."""
    g = torch.Generator().manual_seed(1)
    state = {}
    for module in [*(Q.format(i) for i in range(blocks)), "proj_out"]:
        state[f"transformer.{module}.lora_A.weight"] = torch.randn(4, 32, generator=g).to(dtype)
        state[f"transformer.{module}.lora_B.weight"] = torch.randn(32, 4, generator=g).to(dtype)
        state[f"transformer.{module}.alpha"] = torch.tensor(alpha)
    save_file(state, path, metadata=metadata)
    return path


def lycoris_file(path, case):
    torch.manual_seed(0)
    tensors = trained(case, nn.Linear(32, 64))
    module = "transformer_blocks_0_ff_net_0_proj"
    save_file({f"lycoris_{module}.{name}": t for name, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_are_the_same_bits(tmp_path, capsys, dtype):
    source = lora_file(tmp_path / "a.safetensors", dtype, metadata={"modelspec.title": "mine"})
    words = ["convert", str(source), str(tmp_path / "b.safetensors"), "--format", "lycoris"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "b.safetensors: 4 modules in 12 tensors" in out
    assert out.rstrip().endswith("read by fluxfast, ComfyUI, lycoris-lora")
    back = tmp_path / "new" / "c.safetensors"
    assert main(["convert", words[2], str(back), "--format", "comfyui"]) == 0
    first, last = load_file(source), load_file(back)
    assert first.keys() == last.keys()
    assert all(
        torch.equal(t, last[name]) and t.dtype == last[name].dtype for name, t in first.items()
    )
    with safe_open(back, framework="pt") as reader:
        assert reader.metadata()["modelspec.title"] == "mine"


def test_a_folder_a_dtype_and_overwriting(tmp_path, capsys):
    source = lora_file(tmp_path / "a.safetensors")
    words = ["convert", str(source), str(tmp_path / "out"), "--format", "diffusers"]
    assert main([*words, "--dtype", "bf16"]) == 0
    path = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}
    with safe_open(path, framework="pt") as reader:
        assert json.loads(reader.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 8
    before = path.read_bytes()
    capsys.readouterr()
    assert main(words) == 1
    assert "is there already: write elsewhere, or add --overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([*words, "--overwrite"]) == 0
    assert {t.dtype for t in load_file(path).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("case", "format", "reason"),
    [
        ("loha", "diffusers", "diffusers can't read this adapter: it has no LoHa"),
        ("lokr with magnitude", "diffusers", "it leaves dora_scale out"),
        ("lokr", "kohya", "kohya's files hold LoRA alone, and .* is LoKr"),
        ("ia3", "comfyui", "ComfyUI can't read this adapter: it has no IA3"),
        ("diag-oft with constraint", "comfyui", "it takes the constraint of OFT for another"),
    ],
)
def test_what_a_format_can_not_hold_is_refused(tmp_path, capsys, case, format, reason):
    source = lycoris_file(tmp_path / "a.safetensors", case)
    target = tmp_path / "b.safetensors"
    assert main(["convert", str(source), str(target), "--format", format]) == 1
    error = capsys.readouterr().err
    assert re.search(reason, error) and "Traceback" not in error
    assert not target.exists()


def test_what_is_no_adapter_is_named(tmp_path, capsys):
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"not a file")
    for words in (["inspect", str(broken)], ["inspect", str(tmp_path / "nowhere")]):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert words[1] in error and "Traceback" not in error
    target = str(tmp_path / "b.safetensors")
    assert main(["convert", str(broken), target, "--format", "comfyui"]) == 1
    assert "not a whole safetensors file" in capsys.readouterr().err


def test_inspect_says_what_is_in_a_file(tmp_path, capsys):
    metadata = {
        "modelspec.title": "a\x1b[31mred",
        "long": "x" * 300,
        **{f"k{i}": "" for i in range(20)},
    }
    source = lora_file(tmp_path / "a.safetensors", torch.bfloat16, metadata=metadata)
    assert main(["inspect", str(source)]) == 0
    out = capsys.readouterr().out
    assert f"{source}: LoRA, 4 modules, 1,024 parameters, bfloat16, 0.0 MB" in out
    assert "rank 4, alpha 8" in out
    assert "read by: fluxfast, diffusers, ComfyUI\n" in out
    assert "not by kohya's scripts: it looks for keys lora_unet_<BFL>, not transformer.<diff" in out
    assert "metadata modelspec.title: a\\x1b[31mred" in out and "\x1b" not in out
    assert "metadata: 12 more" in out
    row = next(
        line for line in out.splitlines() if line.startswith("transformer_blocks.*.attn.to_q")
    )
    assert row.split()[1:4] == ["3", "LoRA", "4"]
    state = load_file(source)
    norms = [
        (
            2
            * state[f"transformer.{m}.lora_B.weight"].double()
            @ state[f"transformer.{m}.lora_A.weight"].double()
        )
        .norm()
        .item()
        for m in (Q.format(i) for i in range(3))
    ]
    assert row.split()[4:] == [f"{n:.4g}" for n in (min(norms), sum(norms) / 3, max(norms))]
    assert main(["inspect", str(source), "--modules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("transformer_blocks.") for line in lines) == 3


@pytest.mark.parametrize("case", OPTIONS)
def test_inspect_of_every_algorithm(tmp_path, capsys, case):
    source = lycoris_file(tmp_path / "a.safetensors", case)
    assert main(["inspect", str(source), "--plot", str(tmp_path / "a.png")]) in (0, 1)
    out = capsys.readouterr()
    row = next(line for line in out.out.splitlines() if line.startswith("transformer_blocks.*.ff"))
    base_decides = OPTIONS[case]["algo"] in ("glora", "diag-oft", "boft", "ia3")
    assert row.endswith("by the base") == base_decides
    assert (tmp_path / "a.png").exists() == (not base_decides)
    if base_decides:
        assert "nothing to draw" in out.err
    else:
        tensors = read_adapter(source).tensors()["transformer_blocks.0.ff.net.0.proj"]
        assert f"{expected_norm(tensors):.4g}" in row


def expected_norm(tensors):
    """The norm of the change, formed whole in fp64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    if "diff" in t:
        return t["diff"].norm()
    if "lora_A.weight" in t:
        return (
            t["alpha"] / len(t["lora_A.weight"]) * t["lora_B.weight"] @ t["lora_A.weight"]
        ).norm()
    if "hada_w1_a" in t:
        one, two = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2))
        return (t["alpha"] / len(t["hada_w1_b"]) * one * two).norm()
    w1, w2 = (
        t[name] if name in t else t[f"{name}_a"] @ t[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    ranks = [len(tensor) for name, tensor in t.items() if name.endswith("_b")]
    return (t["alpha"] / ranks[0] if ranks else 1) * torch.kron(w1, w2).norm()


def test_norms_of_more_rows_than_are_formed_at_once():
    g = torch.Generator().manual_seed(5)
    parts = {
        "hada_w1_a": (2500, 3),
        "hada_w1_b": (3, 7),
        "hada_w2_a": (2500, 3),
        "hada_w2_b": (3, 7),
    }
    tensors = {name: torch.randn(*shape, generator=g) for name, shape in parts.items()}
    tensors["alpha"] = torch.tensor(2.0)
    assert change_norm("loha", tensors) == pytest.approx(expected_norm(tensors).item(), rel=1e-6)


def test_the_picture(tmp_path, capsys):
    source = lora_file(tmp_path / "a.safetensors", blocks=19)
    assert main(["inspect", str(source), "--plot", str(tmp_path / "new.png")]) == 0
    assert "new.png: the norms of 20 modules" in capsys.readouterr().out
    with Image.open(tmp_path / "new.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
        # more than axes and text: 20 cells of a colour map
        assert picture.width > 800 and sum(count > 200 for count, _ in colours) > 20


def test_places():
    assert place_of("single_transformer_blocks.12.attn.to_q").kind == (
        "single_transformer_blocks.*.attn.to_q"
    )
    assert place_of("proj_out").kind == "proj_out"


def test_the_preset_of_the_targets_is_named(tmp_path, capsys):
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    names = [f"transformer_blocks.0.{target}" for target in targets]
    names += [f"single_transformer_blocks.0.{target}" for target in targets[:3]]
    state = {f"transformer.{name}.lora_A.weight": torch.ones(2, 32) for name in names}
    state |= {f"transformer.{name}.lora_B.weight": torch.ones(32, 2) for name in names}
    save_file(state, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert "targets: those of flux_lora_target mmdit\n" in capsys.readouterr().out
    assert main(["inspect", str(lora_file(tmp_path / "b.safetensors"))]) == 0
    assert "targets:" not in capsys.readouterr().out
