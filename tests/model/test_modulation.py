"""Modulation ahead: what the blocks would have computed, from weights that stay on the host, in
time or on the spot.
"""

import copy
import threading

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint.opening import open_folder, open_single_file
from fluxfast.model import modulation
from fluxfast.model.linear import project
from fluxfast.model.modulation import Conditions, embed, linear_names
from fluxfast.quant import FORMATS
from fluxfast.quant.linear import QuantLinear
from small_flux import small_flux
from support import SMALL, make_inputs, relative_error

TARGETS = ["to_q", "to_v", "proj_mlp", "proj_out", "ff.net.2"]
CPU = torch.device("cpu")
# fp32, sums in another order; blocks multiply the difference
TOLERANCE, TOLERANCE_GRADS = 1e-6, 1e-5


def vectors_of(model, conditions, device, dtype):
    flat = model.modulation.flat_vectors(conditions, device, dtype)
    return model.modulation.views(flat, conditions.timestep.shape[0])


def make_model(format=None, targets=TARGETS, **options):
    return small_flux(format, targets, **options)


def ahead(*args, **kwargs):
    model = make_model(*args, **kwargs)
    model.set_modulation_ahead(True)
    return model


def run(model, inputs):
    model.zero_grad()
    out = model(**inputs).sample
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def conditions_of(inputs):
    return Conditions.of(
        inputs["timestep"],
        inputs.get("guidance"),
        inputs["pooled_projections"],
        inputs["hidden_states"].dtype,
    )


def in_place(model, conditions, dtype):
    """The vectors as the blocks compute them."""
    vec = torch.nn.functional.silu(embed(model.time_text_embed, conditions, dtype))
    blocks = [block.modulation_linears() for block in model.blocks]
    return [
        tuple(project(vec, linear) for linear in linears)
        for linears in [*blocks, (model.norm_out.linear,)]
    ]


def flatten(vectors):
    return torch.cat([tensor.flatten() for block in vectors for tensor in block])


def test_names_are_those_of_the_linears():
    for guidance in (True, False):
        with torch.device("meta"):
            model = FluxTransformer(**SMALL | {"guidance_embeds": guidance})
        linears = {
            n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "." in n
        }
        found = [
            n
            for n in linears
            if n.startswith("time_text_embed.") or n.split(".")[-2].startswith("norm")
        ]
        assert sorted(linear_names(model.config)) == sorted(found)
    assert len(linear_names({"guidance_embeds": True})) == 6 + 2 * 19 + 38 + 1


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("batch", [1, 3])
def test_vectors_are_those_of_the_blocks(format, batch):
    conditions = conditions_of(make_inputs(batch, 2, 3))
    expected = in_place(make_model(format), conditions, torch.float32)
    model = ahead(format)
    vectors = vectors_of(model, conditions, CPU, torch.float32)
    assert [[v.shape for v in block] for block in vectors] == [
        [v.shape for v in block] for block in expected
    ]
    assert all(v.is_contiguous() for block in vectors for v in block)
    assert len({v.untyped_storage().data_ptr() for block in vectors for v in block}) == 1
    assert relative_error(flatten(vectors), flatten(expected)) < TOLERANCE


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_forward_and_gradients(format):
    inputs = make_inputs(2, 3, 4)
    expected_out, expected = run(make_model(format), inputs)
    model = ahead(format)
    model.enable_gradient_checkpointing()
    out, grads = run(model, inputs)
    assert relative_error(out, expected_out) < TOLERANCE
    assert grads.keys() == expected.keys() and len(grads) > 20
    assert max(relative_error(grads[n], g) for n, g in expected.items()) < TOLERANCE_GRADS


@pytest.mark.parametrize("checkpointing", ["none", "own", "theirs"])
def test_equal_vectors_give_equal_gradients(monkeypatch, checkpointing):
    """With the blocks' own numbers everything else is the same in every bit."""
    inputs = make_inputs(2, 3, 4)

    def make(is_ahead):
        model = ahead() if is_ahead else make_model()
        if checkpointing == "own":
            model.enable_gradient_checkpointing()
        elif checkpointing == "theirs":
            theirs = torch.utils.checkpoint.checkpoint
            model.enable_gradient_checkpointing(
                lambda block, *args: theirs(block, *args, use_reentrant=False)
            )
        return model

    expected_out, expected = run(make(False), inputs)
    model = make(True)
    monkeypatch.setattr(modulation, "apply_on_host", lambda x, module, **_: project(x, module))

    def apply_each(x, modules, outs, **_):
        for module, y in zip(modules, outs, strict=True):
            y.copy_(project(x, module))

    monkeypatch.setattr(modulation, "apply_each_on_host", apply_each)
    out, grads = run(model, inputs)
    assert torch.equal(out, expected_out)
    assert all(torch.equal(grads[n], g) for n, g in expected.items())


def test_in_bf16_the_vectors_are_the_nearest():
    """Rounded once, where the blocks round after each product."""
    inputs = make_inputs(2, 2, 3)
    conditions = conditions_of(inputs | {"hidden_states": inputs["hidden_states"].bfloat16()})
    assert conditions.timestep.dtype == torch.bfloat16
    exact = in_place(
        make_model(dtype=torch.bfloat16).double(),
        Conditions(*(x.double() for x in conditions)),
        torch.float64,
    )
    model = ahead(dtype=torch.bfloat16)
    vectors = flatten(vectors_of(model, conditions, CPU, torch.bfloat16))
    assert vectors.dtype == torch.bfloat16
    # half a unit in the last of 8 bits, and what the sinusoids of fp32 arguments up to 4000 are off
    # by
    assert ((vectors.double() - flatten(exact)).abs() <= flatten(exact).abs() * 2**-8 + 1e-3).all()
    theirs = flatten(in_place(make_model(dtype=torch.bfloat16), conditions, torch.bfloat16))
    assert relative_error(vectors, flatten(exact)) < relative_error(theirs, flatten(exact)) < 0.05


def test_without_guidance():
    inputs = make_inputs(2, 3, 4, guidance=False)
    expected, _ = run(make_model(guidance_embeds=False), inputs)
    out, _ = run(ahead(guidance_embeds=False), inputs)
    assert relative_error(out, expected) < TOLERANCE
    # a guidance that the model has no place for is left out, as ever
    again, _ = run(ahead(guidance_embeds=False), inputs | {"guidance": torch.ones(2)})
    assert torch.equal(again, out)


def test_with_routes():
    routes = [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]
    results = []
    for model in (make_model(), ahead()):
        model.set_routes(routes, seed=5)
        results.append(run(model, make_inputs(2, 3, 4)))
    (expected_out, expected), (out, grads) = results
    assert relative_error(out, expected_out) < TOLERANCE
    assert max(relative_error(grads[n], g) for n, g in expected.items()) < TOLERANCE_GRADS


# a step ahead


@pytest.fixture
def counted(monkeypatch):
    """Where each computation of vectors took place."""
    threads = []
    original = modulation.ModulationAhead._compute

    def compute(self, *args):
        threads.append(threading.current_thread() is threading.main_thread())
        return original(self, *args)

    monkeypatch.setattr(modulation.ModulationAhead, "_compute", compute)
    return threads


def test_prepared_vectors_are_found(counted):
    model = ahead()
    steps = [make_inputs(2, 2, 3, seed=seed) for seed in range(4)]
    expected = [ahead()(**inputs).sample for inputs in steps]
    counted.clear()
    model.prepare_modulation(lambda: conditions_of(steps[0]))
    for inputs, coming, out in zip(steps, [*steps[1:], None], expected, strict=True):
        if coming is not None:
            model.prepare_modulation(lambda coming=coming: conditions_of(coming))
        assert torch.equal(model(**inputs).sample, out)
        # the same once more, as for a teacher
        assert torch.equal(model(**inputs).sample, out)
    assert counted == [False] * 4


def test_other_inputs_are_computed_on_the_spot(counted):
    model = ahead()
    inputs, other = make_inputs(2, 2, 3), make_inputs(2, 2, 3, seed=1)
    expected = ahead()(**other).sample
    counted.clear()
    model.prepare_modulation(lambda: conditions_of(inputs))
    with torch.no_grad():
        assert torch.equal(model(**other).sample, expected)
    assert counted == [False, True]
    # what was prepared is still there
    model(**inputs)
    assert counted == [False, True]
    # one value of one sample is enough
    model(**inputs | {"guidance": inputs["guidance"] * torch.tensor([1.0, 1.0001])})
    assert counted == [False, True, True]


def test_forwards_that_never_come_are_dropped(counted):
    model = ahead()
    many = [make_inputs(1, 2, 3, seed=seed) for seed in range(5)]
    for inputs in many:
        model.prepare_modulation(lambda inputs=inputs: conditions_of(inputs))
    model(**many[4])
    assert sum(counted) == 0
    model.modulation.forget()
    model(**many[4])
    assert sum(counted) == 1


def test_an_exception_of_the_thread_surfaces():
    model = ahead()
    inputs = make_inputs(1, 2, 3)

    def fail():
        raise OSError("cache/text/3f.safetensors: damaged")

    model.prepare_modulation(fail)
    with pytest.raises(OSError, match="damaged"):
        model(**inputs)
    # once
    assert torch.equal(model(**inputs).sample, ahead()(**inputs).sample)


# the model around it


@pytest.mark.parametrize("target", ["norm1.linear", "norm_out.linear", "text_embedder.linear_1"])
def test_adapters_on_modulation(target):
    model = make_model(targets=[*TARGETS, target])
    with pytest.raises(ValueError, match=r"\.linear\w*: an adapter is on it"):
        model.set_modulation_ahead(True)
    assert model.modulation is None
    late = ahead(targets=())
    late.add_adapter(LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(ValueError, match="an adapter is on it"):
        late(**make_inputs(1, 2, 3))
    late.set_modulation_ahead(False)
    late(**make_inputs(1, 2, 3))


def test_a_base_that_trains_is_refused():
    model = make_model()
    model.time_text_embed.text_embedder.linear_2.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"time_text_embed.text_embedder.linear_2: its base is trained"
    ):
        model.set_modulation_ahead(True)


def test_hooks_on_a_norm_are_refused():
    model = ahead()
    model.transformer_blocks[0].norm1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"set_modulation_ahead\(False\)"):
        model(**make_inputs(1, 2, 3))


@pytest.mark.parametrize("format", [None, "int8", "nf4"])
def test_moves_and_casts(format):
    """To the meta device, which stands for a GPU: all but modulation moves."""
    model = ahead(format)
    names = linear_names(model.config)
    model.to("meta")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.is_meta != any(name.startswith(f"{host}.") for host in names), name
    assert model.device.type == "meta"
    model.to(torch.bfloat16)
    model.to(device="meta", dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    linear = model.norm_out.linear
    assert isinstance(linear, QuantLinear) == (format is not None)
    assert linear.bias.device == CPU
    if format is not None:
        assert linear.compute_dtype == torch.float16
        assert {name: part.dtype for name, part in linear.packed().parts.items()} == {
            name: dtype for name, (_, dtype) in FORMATS[format].layout((128, 64)).items()
        }
    # where there is a device, vectors go there; on this one there are but shapes
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs(2, 2, 3).items()}
    vectors = vectors_of(model, conditions_of(inputs), torch.device("meta"), torch.float16)
    assert all(v.is_meta and len(v) == 2 for block in vectors for v in block)


def test_state_dict_copies_and_files(tmp_path):
    plain, model = make_model("int4", targets=()), ahead("int4", targets=())
    expected, state = plain.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(
        torch.equal(state[n].view(-1), t.view(-1)) for n, t in expected.items()
    )
    inputs = make_inputs(2, 2, 3)
    out = model(**inputs).sample
    model.prepare_modulation(lambda: conditions_of(inputs))
    twin = copy.deepcopy(model)
    assert twin.modulation is not model.modulation
    assert torch.equal(twin(**inputs).sample, out)
    with torch.no_grad():
        twin.norm_out.linear.bias += 1
    assert not torch.equal(twin(**inputs).sample, out) and torch.equal(model(**inputs).sample, out)

    floats = ahead(targets=())
    floats.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == floats.state_dict().keys()
    assert torch.equal(saved["norm_out.linear.weight"], floats.norm_out.linear.weight)
    model.load_state_dict(expected)
    assert torch.equal(model(**inputs).sample, out)


def test_off_again():
    model, inputs = ahead(), make_inputs(2, 2, 3)
    model.set_modulation_ahead(False)
    model.set_modulation_ahead(False)
    assert model.modulation is None
    assert torch.equal(model(**inputs).sample, make_model()(**inputs).sample)
    assert model.device == CPU
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("quantised_before", [False, True])
def test_loading_leaves_modulation_on_the_host(tmp_path, format, quantised_before):
    """The meta device stands for a GPU: nothing of modulation ever goes there."""
    plain = make_model(targets=())
    plain.save_pretrained(tmp_path / "folder")
    checkpoint = open_folder(tmp_path / "folder")
    if quantised_before:
        checkpoint.quantize(
            FluxTransformer, tmp_path / "base.safetensors", FORMATS[format or "int8"]
        )
        checkpoint = open_single_file(tmp_path / "base.safetensors")
    names = linear_names(checkpoint.config)
    load = {"format": None if quantised_before or format is None else FORMATS[format]}
    model = checkpoint.load(FluxTransformer, torch.float32, device="meta", on_host=names, **load)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.is_meta != any(name.startswith(f"{host}.") for host in names), name
    model.requires_grad_(False).set_modulation_ahead(True)
    reference = checkpoint.load(FluxTransformer, torch.float32, **load).requires_grad_(False)
    conditions = conditions_of(make_inputs(2, 2, 3))
    vectors = vectors_of(model, conditions, CPU, torch.float32)
    assert (
        relative_error(flatten(vectors), flatten(in_place(reference, conditions, torch.float32)))
        < TOLERANCE
    )
