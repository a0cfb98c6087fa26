"""Every LyCORIS algorithm on our transformer, beside lycoris-lora's own network on diffusers'."""

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast.adapters.kind import AdapterSettings, trainable_parameters
from fluxfast.adapters.kinds import KINDS, without_adapters
from fluxfast.adapters.lycoris import strength
from fluxfast.model import tape
from small_flux import small_flux
from support import SMALL, make_inputs, randomise, relative_error

CONFIG = SMALL | {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 1}
KIND = KINDS["lycoris"]
TARGETS = {
    "target_module": ["Attention", "FeedForward"],
    "target_name": [r".*\.proj_out", "x_embedder"],
}
# the config's keys; whether blocks run fused
ALGORITHMS = {
    "LoKr": ({"factor": 4, "linear_dim": 2}, True),
    "LoKr of whole factors": ({"factor": 8, "full_matrix": True, "linear_dim": None}, True),
    "LoKr of four factors": ({"decompose_both": True, "linear_dim": 1, "use_scalar": True}, True),
    "LoKr with a multiplier": ({"multiplier": 0.5, "unbalanced_factorization": True}, True),
    "LoKr with trained lengths": ({"dora_wd": True, "linear_dim": 2}, True),
    "LoKr with lengths of columns": ({"dora_wd": True, "wd_on_output": False}, False),
    "LoRA": ({"algo": "lora"}, False),
    "LoRA beside the base": ({"algo": "locon", "bypass_mode": True, "use_scalar": True}, False),
    "LoRA with trained lengths": ({"algo": "lora", "dora_wd": True}, False),
    "LoHa": ({"algo": "loha"}, False),
    "LoHa with trained lengths": ({"algo": "loha", "dora_wd": True, "wd_on_output": False}, False),
    "GLoRA": ({"algo": "glora"}, False),
    "full weights": ({"algo": "full"}, False),
    "OFT": ({"algo": "diag-oft", "constraint": 0.01, "rescaled": True}, False),
    "BOFT": ({"algo": "boft"}, False),
    "IA3": ({"algo": "ia3"}, False),
}
# the library inverts OFT's matrices in fp32, and multiplies them by others of its tensors
OFT = ("OFT", "BOFT")
WITH_DYLORA = {**ALGORITHMS, "DyLoRA": ({"algo": "dylora", "block_size": 2}, False)}


class Log(list):
    """How each call of a block ran."""

    def record(self, how, because=None, value=""):
        self.append(how)


def settings_of(config, dtype=torch.float64):
    return AdapterSettings("all", 0, 0.0, dtype=dtype, lycoris=config)


def adapted(config, format=None, dtype=torch.float64):
    """Our transformer with a config's adapters, at values that show errors."""
    model = small_flux(format, num_layers=1, num_single_layers=1).to(dtype)
    KIND.add(model, settings_of(config, dtype))
    g = torch.Generator().manual_seed(4)
    for tensor in trainable_parameters(model).values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=g, dtype=torch.float64).to(dtype)
    return model


def gradients(model, trained, dtype=torch.float64):
    inputs = {name: t.to(dtype) for name, t in make_inputs(2, 3, 4).items()}
    x = inputs["hidden_states"].requires_grad_()
    torch.manual_seed(7)
    out = model(**inputs).sample
    # a module that was dropped as a whole, or a block of ranks that was, has no gradient
    return out, torch.autograd.grad(
        out.square().mean(), [x, *trained], allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_outputs_and_gradients_are_the_librarys(name, lycoris_config, library_network):
    keys, is_fused = ALGORITHMS[name]
    config = lycoris_config(apply_preset=TARGETS, **keys)
    # diffusers has RoPE's tables in fp32
    dtype, tolerance = (torch.float32, 1e-5) if name in OFT else (torch.float64, 1e-7)
    ours = adapted(config, dtype=dtype)
    theirs = FluxTransformer.__base__(**CONFIG)
    randomise(theirs)
    theirs.to(dtype).requires_grad_(False)
    network = library_network(theirs, config)
    linears = {id(module): name for name, module in theirs.named_modules()}
    pairs = []
    for lora in network.loras:
        module = ours.get_submodule(linears[id(lora.org_module[0])])
        own = dict(lora.to(dtype).named_parameters())
        if config.options.algo == "full":
            own = {"diff": lora.weight, "diff_b": lora.bias}
        for key, tensor in module.trained().items():
            own[key].data.copy_(tensor)
            pairs.append((tensor, own[key]))
    network.apply_to()
    log = Log()
    for block in ours.blocks:
        block.log = log
    out, grads = gradients(ours, [own for own, _ in pairs], dtype)
    assert log.count("fused" if is_fused else "composed") == 2
    expected_out, expected = gradients(theirs, [tensor for _, tensor in pairs], dtype)
    assert relative_error(out, expected_out) < tolerance
    for grad, theirs_grad in zip(grads, expected, strict=True):
        assert theirs_grad.norm() > 0
        assert relative_error(grad, theirs_grad) < 100 * tolerance


@pytest.mark.parametrize("name", WITH_DYLORA)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_over_a_quantised_base(name, format, lycoris_config):
    """As over the linears that hold the same numbers as they are."""
    config = lycoris_config(apply_preset=TARGETS, **WITH_DYLORA[name][0])
    if config.options.algo == "full":
        with pytest.raises(ValueError, match=r"algo full .* quantised base would only"):
            adapted(config, format)
        return
    dtype, tolerance = (torch.float32, 1e-5) if name in OFT else (torch.float64, 1e-10)
    stored = adapted(config, format, dtype)
    plain = small_flux(num_layers=1, num_single_layers=1).to(dtype)
    for module, linear in plain.named_modules():
        if isinstance(linear, torch.nn.Linear):
            found = stored.get_submodule(module)
            linear.weight.data = getattr(found, "base_layer", found).weight.to(dtype)
    KIND.add(plain, settings_of(config, dtype))
    KIND.load_state(plain, KIND.state(stored))
    found, expected = (
        gradients(model, trainable_parameters(model).values(), dtype) for model in (stored, plain)
    )
    assert relative_error(found[0], expected[0]) < tolerance
    for own, other in zip(found[1], expected[1], strict=True):
        assert relative_error(own, other) < 100 * tolerance


DROPPED = {
    "LoKr beside the base": {"dropout": 0.4, "module_dropout": 0.3, "bypass_mode": True},
    "LoKr": {"rank_dropout": 0.4, "module_dropout": 0.3},
    "LoKr with lengths": {"rank_dropout": 0.4, "dora_wd": True},
    "LoRA": {"algo": "lora", "dropout": 0.4, "rank_dropout": 0.3, "bypass_mode": True},
    "LoHa": {"algo": "loha", "rank_dropout": 0.4, "module_dropout": 0.3},
    "DyLoRA": {"algo": "dylora", "block_size": 1},
    "full weights": {"algo": "full", "rank_dropout": 0.4, "module_dropout": 0.3},
    "IA3": {"algo": "ia3", "module_dropout": 0.4},
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_is_dropped_again_when_a_block_is_recomputed(name, lycoris_config):
    model = adapted(lycoris_config(apply_preset=TARGETS, **DROPPED[name]))
    results = []
    for policy in (*tape.POLICIES, "none"):
        for block in model.blocks:
            block.policy = policy
        results.append(gradients(model, trainable_parameters(model).values()))
    for out, grads in results[1:]:
        assert relative_error(out, results[0][0]) < 1e-11
        for grad, expected in zip(grads, results[0][1], strict=True):
            assert relative_error(grad, expected) < 1e-9
    # another draw is another output, and none is drawn outside training
    torch.manual_seed(8)
    inputs = {key: t.double() for key, t in make_inputs(2, 3, 4).items()}
    assert relative_error(model(**inputs).sample, results[0][0]) > 1e-4
    if name != "DyLoRA":
        model.eval()
        assert torch.equal(model(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in OFT])
def test_strength_and_turning_off(name, lycoris_config):
    keys, _ = ALGORITHMS[name]
    config = lycoris_config(apply_preset=TARGETS, **keys)
    model = adapted(config)
    inputs = {key: t.double() for key, t in make_inputs(2, 3, 4).items()}
    base = small_flux(num_layers=1, num_single_layers=1).double()(**inputs).sample
    own = model(**inputs).sample
    with without_adapters(model):
        assert relative_error(model(**inputs).sample, base) < 1e-12
    with strength(model, 1.0):
        assert torch.equal(model(**inputs).sample, own)
    # the library scales what weight decomposition adds to W + ΔW alone
    if not config.options.weight_decompose:
        with strength(model, 0.0):
            assert relative_error(model(**inputs).sample, base) < 1e-12
    with strength(model, 2.0):
        assert relative_error(model(**inputs).sample, own) > 1e-4
    assert torch.equal(model(**inputs).sample, own)


@pytest.mark.parametrize("name", WITH_DYLORA)
def test_a_file_and_a_checkpoint_bring_it_back(name, lycoris_config, tmp_path):
    config = lycoris_config(apply_preset=TARGETS, **WITH_DYLORA[name][0])
    settings = settings_of(config, torch.float32)
    model = adapted(config, dtype=torch.float32)
    path = KIND.save(model, tmp_path, metadata={"lycoris_config": '{"algo": "x"}'})
    assert (tmp_path / "lycoris_config.json").read_text() == '{\n  "algo": "x"\n}\n'
    file, saved = KIND.read_file(path), KIND.from_state(path, KIND.state(model))
    assert sorted(file.targets) == sorted(saved.targets) == sorted(KIND.modules(model))
    expected, _ = gradients(model, trainable_parameters(model).values(), torch.float32)
    # a run from the start, one that goes on from a file, and a resumed one of these
    made = [small_flux(num_layers=1, num_single_layers=1) for _ in range(3)]
    KIND.add(made[0], settings)
    others = made[:1]
    if name != "LoKr with lengths of columns":
        others = made[::2]
        for source, other in zip((file, saved), made[1:], strict=True):
            KIND.add_from(other, source, settings)
        out, _ = gradients(made[1], trainable_parameters(made[1]).values(), torch.float32)
        # a scalar and a multiplier are rounded into the factors
        assert relative_error(out, expected) < 1e-5
    for other in others:
        KIND.load_state(other, KIND.state(model))
        for key, tensor in trainable_parameters(model).items():
            assert torch.equal(tensor, other.get_parameter(key)), key


@pytest.mark.parametrize("style", ["comfyui", "lycoris"])
@pytest.mark.parametrize("name", WITH_DYLORA)
def test_every_style_of_a_file_is_the_same_adapter(name, style, lycoris_config, tmp_path):
    config = lycoris_config(apply_preset=TARGETS, **WITH_DYLORA[name][0])
    model = adapted(config, dtype=torch.float32)
    own = KIND.read_file(KIND.save(model, tmp_path / "own.safetensors"))
    other = KIND.read_file(KIND.save(model, tmp_path / "other.safetensors", style=style))
    assert own.algos == other.algos
    if name == "LoKr with lengths of columns":
        return
    outs = []
    for file in (own, other):
        made = small_flux(num_layers=1, num_single_layers=1)
        KIND.add_from(made, file, settings_of(config, torch.float32))
        outs.append(gradients(made, [], torch.float32)[0])
    # a scale may be in the factors or beside them
    assert relative_error(outs[1], outs[0]) < 1e-5


def test_a_style_that_has_no_names_for_it(lycoris_config, tmp_path):
    model = adapted(lycoris_config(apply_preset=TARGETS))
    with pytest.raises(ValueError, match="kohya's files hold LoRA alone"):
        KIND.save(model, tmp_path, style="kohya")
