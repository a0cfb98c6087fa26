"""A LoRA of the difference of two checkpoints, beside the decomposition in fp64."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_flux import tiny_transformer

from bfl_reference import BflFlux
from fluxfast import FluxTransformer
from fluxfast.adapters.extract import extract
from fluxfast.adapters.presets import find_targets
from fluxfast.checkpoint.opening import open_folder, open_single_file
from fluxfast.quant import FORMATS
from support import relative_error

TO_Q = "transformer_blocks.0.attn.to_q"
FF = "transformer_blocks.0.ff.net.2"
NORM = "transformer_blocks.0.attn.norm_q.weight"


def weights(tmp_path, changes, name, dtype=torch.float32):
    """The weights of a tiny checkpoint that has `changes` added to its tensors, by name."""
    model = tiny_transformer()
    state = model.state_dict()
    for key, change in changes.items():
        state[key] += change
    model.to(dtype).save_pretrained(tmp_path / name)
    return open_folder(tmp_path / name).weights(FluxTransformer)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(found, module):
    a, b = (found.state[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
    return b @ a


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_the_best_of_its_rank(tmp_path, rank):
    changes = {f"{m}.weight": 0.1 * noise(32, n, seed=n) for m, n in ((TO_Q, 32), (FF, 128))}
    base, tuned = weights(tmp_path, {}, "base"), weights(tmp_path, changes, "tuned")
    found = extract(base, tuned, [TO_Q, FF], rank)
    total = left = 0.0
    for module in (TO_Q, FF):
        # what the two files hold, which adding has rounded
        name = f"{module}.weight"
        difference = tuned.read(name).double() - base.read(name).double()
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        whole, lost = s.square().sum().item(), s[rank:].square().sum().item()
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        # fp32 in vectors that are the less certain the nearer the singular values are
        assert relative_error(product(found, module), best) < 1e-4
        assert found.kept(module) == pytest.approx(1 - lost / whole, rel=1e-5)
        total, left = total + whole, left + lost
        assert found.state[f"{module}.alpha"] == rank
    assert found.kept() == pytest.approx(1 - left / total, rel=1e-5)
    assert found.outside == {}
    worst = min((TO_Q, FF), key=found.kept)
    assert f"energy kept, in 2 modules; least: {worst}, {found.kept(worst):.2%}" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_comes_back(tmp_path, dtype):
    """A difference of that rank is kept whole, but for the factors' rounding."""
    change = noise(32, 3) @ noise(3, 128, seed=1)
    base = weights(tmp_path, {}, "base")
    tuned = weights(tmp_path, {f"{FF}.weight": change}, "tuned")
    found = extract(base, tuned, [TO_Q, FF], 3, dtype=dtype)
    assert list(found.whole) == [FF], "a module without a difference gets no pair"
    assert found.state[f"{FF}.lora_A.weight"].dtype == dtype
    # fp32: the weights themselves were rounded; bf16: two factors of 8 bits
    assert relative_error(product(found, FF), change) < (1e-5 if dtype == torch.float32 else 2**-7)
    assert found.kept() > 1 - (1e-9 if dtype == torch.float32 else 2**-14)


def test_what_lies_outside(tmp_path):
    changes = {f"{TO_Q}.weight": noise(32, 32), f"{TO_Q}.bias": noise(32), NORM: noise(16)}
    base, tuned = weights(tmp_path, {}, "base"), weights(tmp_path, changes, "tuned")
    found = extract(base, tuned, [TO_Q], 2)
    assert found.outside.keys() == {f"{TO_Q}.bias", NORM}
    expected = relative_error(tuned.read(NORM), base.read(NORM))
    assert found.outside[NORM] == pytest.approx(expected, rel=1e-5)
    assert "warning: 2 tensors outside the targets differ too" in str(found)
    with pytest.raises(ValueError, match=r"no target differs .*; it differs in .*\.norm_q\.weight"):
        extract(base, tuned, [FF], 2)


def test_nothing_to_extract(tmp_path):
    base, tuned = weights(tmp_path, {}, "base"), weights(tmp_path, {}, "tuned")
    with pytest.raises(ValueError, match=r"nothing to extract: no target differs between the two$"):
        extract(base, tuned, [TO_Q], 2)


def test_the_same_weights_in_the_names_of_bfl(tmp_path):
    """Names, fused linears and swapped halves are no difference."""
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "dim": 64, "n_heads": 2, "depth": 1, "depth_single": 1}
    model = BflFlux(**sizes, context=24, pooled=20, axes=(4, 14, 14), guidance=True)
    save_file({k: t.contiguous() for k, t in model.state_dict().items()}, tmp_path / "bfl.sft")
    FluxTransformer.from_single_file(tmp_path / "bfl.sft").save_pretrained(tmp_path / "diffusers")
    bfl, diffusers = open_single_file(tmp_path / "bfl.sft"), open_folder(tmp_path / "diffusers")
    with pytest.raises(ValueError, match=r"nothing to extract: .* between the two$"):
        extract(bfl.weights(FluxTransformer), diffusers.weights(FluxTransformer), [TO_Q], 2)


@pytest.mark.parametrize("rank", [0, 33])
def test_ranks_that_cannot_be(tmp_path, rank):
    base = weights(tmp_path, {}, "base")
    with pytest.raises(ValueError, match=f"rank {rank}: {FF} is a 128 to 32 linear"):
        extract(base, base, [FF], rank)


def test_other_models(tmp_path):
    base = weights(tmp_path, {}, "base")
    other = FluxTransformer.from_pretrained(tmp_path / "base").config | {"num_single_layers": 1}
    FluxTransformer.from_config(other).save_pretrained(tmp_path / "shallow")
    shallow = open_folder(tmp_path / "shallow").weights(FluxTransformer)
    with pytest.raises(ValueError, match=r"different models: .* and .* more is in one of them"):
        extract(base, shallow, [TO_Q], 2)
    other |= {"num_single_layers": 2, "joint_attention_dim": 8}
    FluxTransformer.from_config(other).save_pretrained(tmp_path / "narrow")
    narrow = open_folder(tmp_path / "narrow").weights(FluxTransformer)
    with pytest.raises(ValueError, match=r"context_embedder.weight is \[32, 24\] in the first"):
        extract(base, narrow, [TO_Q], 2)


def test_a_value_that_is_not_finite(tmp_path):
    base = weights(tmp_path, {}, "base")
    tuned = weights(tmp_path, {f"{TO_Q}.weight": torch.full((32, 32), torch.nan)}, "tuned")
    with pytest.raises(ValueError, match=rf"{TO_Q}\.weight: the difference is not finite"):
        extract(base, tuned, [TO_Q], 2)


def test_quantised_checkpoints_are_decoded(tmp_path):
    """The difference of what they decode to: a checkpoint's own rounding, here."""
    base = weights(tmp_path, {}, "base")
    open_folder(tmp_path / "base").quantize(FluxTransformer, tmp_path / "q", FORMATS["int4"])
    quantised = FluxTransformer.from_single_file(tmp_path / "q")
    found = extract(base, open_single_file(tmp_path / "q").weights(FluxTransformer), [TO_Q], 32)
    rounding = quantised.get_submodule(TO_Q).weight - base.read(f"{TO_Q}.weight")
    assert relative_error(product(found, TO_Q), rounding) < 1e-5


def test_every_target_of_a_preset(tmp_path):
    base = weights(tmp_path, {}, "base")
    targets = find_targets(open_folder(tmp_path / "base").empty(FluxTransformer), "all+ffs")
    changes = {f"{t}.weight": noise(*base.shapes[f"{t}.weight"], seed=len(t)) for t in targets}
    tuned = weights(tmp_path, changes, "tuned")
    found = extract(base, tuned, targets, 8)
    assert set(found.whole) == set(targets) and found.outside == {}
