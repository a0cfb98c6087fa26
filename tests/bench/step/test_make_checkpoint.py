"""The checkpoints of `fluxfast-bench make-checkpoint`: FLUX.1's in every way but their values."""

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast_bench.main import main
from fluxfast_bench.step.make_checkpoint import SIZES, make_checkpoint
from support import SMALL, make_inputs

CONFIG = SMALL | {"guidance_embeds": True}


@pytest.mark.parametrize(
    ("layout", "shards"), [("diffusers", 1), ("diffusers", 3), ("bfl", 1), ("comfy", 1)]
)
@torch.no_grad()
def test_it_loads(tmp_path, layout, shards):
    path = tmp_path / ("flux" if layout == "diffusers" else "flux.safetensors")
    size = make_checkpoint(path, CONFIG, layout=layout, shards=shards)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == shards and size == sum(file.stat().st_size for file in files)
    assert max(file.stat().st_size for file in files) < 1.4 * size / shards
    model = (
        FluxTransformer.from_pretrained if path.is_dir() else FluxTransformer.from_single_file
    )(path)
    assert (
        model.config.guidance_embeds
        and model.config.num_single_layers == CONFIG["num_single_layers"]
    )
    weights = torch.cat([p.flatten() for name, p in model.named_parameters() if p.ndim == 2])
    assert 0.018 < weights.std() < 0.022 and weights.abs().max() < 0.2
    q, k = (
        model.transformer_blocks[0].attn.to_q.weight,
        model.transformer_blocks[0].attn.to_k.weight,
    )
    assert not torch.equal(q, k) and len(q.unique(dim=0)) == len(q)
    assert 0.9 < model.transformer_blocks[0].attn.norm_q.weight.mean() < 1.1
    assert model(**make_inputs(1, 2, 3)).sample.isfinite().all()


def test_the_same_every_time(tmp_path):
    one, two = (tmp_path / f"{i}.safetensors" for i in range(2))
    make_checkpoint(one, CONFIG, layout="bfl")
    make_checkpoint(two, CONFIG, layout="bfl")
    assert one.read_bytes() == two.read_bytes()


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "small", CONFIG)
    assert (
        main(["make-checkpoint", str(tmp_path / "flux"), "--size", "small", "--shards", "2"]) == 0
    )
    assert "GB/s" in capsys.readouterr().out and (tmp_path / "flux" / "config.json").is_file()
    for words in (["x", "--layout", "bfl"], ["x.safetensors"], ["x", "--shards", "0"]):
        with pytest.raises(SystemExit):
            main(["make-checkpoint", *words])
    monkeypatch.setattr("fluxfast.checkpoint.writer.free_bytes", lambda path: 1000)
    with pytest.raises(SystemExit) as ended:
        main(["make-checkpoint", str(tmp_path / "again"), "--size", "small"])
    assert ended.value.code == 1 and "GB left" in capsys.readouterr().err
