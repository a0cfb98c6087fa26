"""Trainers' own quantised linears are read as what they are, and blocks run fused over them."""

import copy
import functools

import pytest
import torch
from dropin_hosts import add_lora, assert_equal, diffusers_host, lora_parameters, randomise_trained
from host_adapters import KohyaLora, OneTrainerDora, OneTrainerLoha, OneTrainerLora, ToolkitLora
from host_bases import (
    W8A8,
    Fp8,
    Fp8Native,
    Nf4,
    Ostris,
    Quantizer,
    scaled_fp8,
    scaled_weight,
    with_svd,
)
from host_of_sd_scripts import Flux
from torch import nn

import fluxfast
from fluxfast.foreign.weights import Decoded, Unpacked
from fluxfast.memory import gpus
from fluxfast.model.linear import obstacle, project, read_base, read_linear
from fluxfast.model.stored_codes import keep_transposed, transposed_copies
from fluxfast.ops.linear.transposed_codes import copy_of
from fluxfast.quant import QuantWeight
from support import make_inputs, randomise, relative_error

pytestmark = pytest.mark.usefixtures("eager_peers")

# fp32, the same decoded weights: sums of up to 320 products in another order
SAME = 1e-5


def gguf(kind, cls=None):
    names = pytest.importorskip("gguf")
    library = pytest.importorskip("diffusers.quantizers.gguf.utils")

    def make(linear):
        made = (cls or library.GGUFLinear)(
            *(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        )
        quant_type = names.GGMLQuantizationType[kind]
        codes = names.quants.quantize(linear.weight.data.numpy(), quant_type)
        made.weight = library.GGUFParameter(torch.from_numpy(codes), quant_type=quant_type)
        made.bias = linear.bias
        return made.requires_grad_(False)

    return make, lambda module: library.dequantize_gguf_tensor(module.weight).float()


def gguf_a8(kind):
    """OneTrainer's `LinearGGUFA8`, whose own product rounds x to 8 bits."""
    library = pytest.importorskip("diffusers.quantizers.gguf.utils")
    dequantize_gguf_tensor = library.dequantize_gguf_tensor

    class LinearGGUFA8(library.GGUFLinear):
        _dtype = torch.int8

        def forward(self, x_orig):
            x = x_orig.reshape(-1, x_orig.shape[-1])
            w = dequantize_gguf_tensor(self.weight.detach()).to(x.dtype)
            y = nn.functional.linear(x, w, self.bias)
            return y.reshape((*x_orig.shape[:-1], y.shape[-1]))

    return gguf(kind, LinearGGUFA8)


def sdnq(weights_dtype, **options):
    library = pytest.importorskip("sdnq.training")

    def make(linear):
        holder = nn.Sequential(linear)
        linear.requires_grad_(False)
        library.sdnq_training_post_load_quant(
            holder,
            weights_dtype=weights_dtype,
            add_skip_keys=False,
            minimum_allowed_numel=0,
            use_stochastic_rounding=False,
            **{"use_quantized_matmul": False, "group_size": -1} | options,
        )
        assert type(holder[0]).__name__ == "SDNQLinear"
        return holder[0]

    return make, lambda module: module.weight.dequantize()


def of(cls, **options):
    if cls is Nf4:
        pytest.importorskip("bitsandbytes")
    return lambda linear: cls(linear, **options), lambda module: module.unquantized_weight()


def patched(mode, dtype=torch.float8_e4m3fn):
    return lambda linear: scaled_fp8(linear, mode, dtype), scaled_weight


FP8 = {"dtype": torch.float8_e4m3fn}
# what makes the linear and its weight in full; what a report calls it; how it is read: in place,
# unpacked by the host to one of our formats, or decoded by it
BASES = {
    "OneTrainer int8 W8A8": (lambda: of(W8A8), "int8", QuantWeight),
    "OneTrainer fp8 W8A8": (lambda: of(W8A8, **FP8), "fp8", QuantWeight),
    "OneTrainer compressed": (lambda: of(W8A8, compressed=True), "int8, compressed", Unpacked),
    "OneTrainer fp8": (lambda: of(Fp8), "fp8", QuantWeight),
    "OneTrainer nf4": (lambda: of(Nf4), "nf4", QuantWeight),
    "OneTrainer SVD of W8A8": (
        lambda: of(with_svd(W8A8)),
        "int8 and a part of low rank",
        QuantWeight,
    ),
    "OneTrainer SVD of fp8": (lambda: of(with_svd(Fp8)), "fp8 and a part of low rank", QuantWeight),
    "scaled fp8": (lambda: patched("tensor"), "fp8", QuantWeight),
    "scaled fp8 by rows": (lambda: patched("channel"), "fp8", QuantWeight),
    "scaled fp8 by blocks": (
        lambda: patched("block"),
        "fp8 in blocks of 64",
        Decoded,
    ),
    "scaled fp8 e5m2": (
        lambda: patched("channel", torch.float8_e5m2),
        "float8_e5m2",
        Decoded,
    ),
    "GGUF Q8_0": (lambda: gguf("Q8_0"), "GGUF Q8_0", Decoded),
    "GGUF Q4_0": (lambda: gguf("Q4_0"), "GGUF Q4_0", Decoded),
    "OneTrainer GGUF": (lambda: gguf_a8("Q5_1"), "GGUF Q5_1", Decoded),
    "SDNQ int8": (lambda: sdnq("int8"), "int8", QuantWeight),
    "SDNQ fp8": (lambda: sdnq("float8_e4m3fn"), "fp8", QuantWeight),
    "SDNQ int8 in groups": (lambda: sdnq("int8", group_size=32), "SDNQ int8", Decoded),
    "SDNQ uint4": (lambda: sdnq("uint4", group_size=32), "SDNQ uint4", Decoded),
    "SDNQ rotated": (lambda: sdnq("int8", use_hadamard=True), "SDNQ int8", Decoded),
    "SDNQ SVD": (lambda: sdnq("uint4", group_size=32, use_svd=True), "SDNQ uint4", Decoded),
    "SimpleTuner fp8": (lambda: of(Fp8Native), "fp8", QuantWeight),
    "ai-toolkit's own": (lambda: of(Ostris), "uint4", Decoded),
}
every_base = pytest.mark.parametrize("base", BASES)


def make_linear(make, features=(192, 96)):
    torch.manual_seed(1)
    return make(nn.Linear(*features).requires_grad_(False))


def whole_of(params):
    """The weight that a read linear multiplies by, with its part of low rank."""
    return params.weight.to(torch.float32) + sum(a.b @ a.a for a in params.adapters)


@every_base
def test_the_weight_is_the_hosts(base):
    make, dense = BASES[base][0]()
    module = make_linear(make)
    params = read_linear(module)
    assert params is not None, obstacle(module)
    assert type(params.weight) is BASES[base][2] and params.weight.shape == (96, 192)
    # the host's own may add up its part of low rank in another order
    assert relative_error(whole_of(params), dense(module)) < 1e-6
    assert params.bias is module.bias
    codes, scale = params.weight.codes("int8")
    values = params.weight.to(torch.float32)
    assert relative_error(codes.float() * scale[:, None], values) < 0.02
    if type(params.weight) is QuantWeight:
        # SDNQ's tensor class has the codes in an attribute
        holder = module.weight if hasattr(module, "forward_func") else module
        assert params.weight.parts["packed"].data_ptr() == holder.weight.data_ptr()


def plain_of(module, dense):
    """A linear whose weight is the host's in full."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    linear.weight = nn.Parameter(dense(module).detach().clone())
    linear.bias = module.bias
    return linear.requires_grad_(False)


def model_of(make, layout):
    """A small model whose blocks' linears are a host's, and the same with their weights in full."""
    model = Flux() if layout == "bfl" else diffusers_host()
    randomise(model)
    whole = model.requires_grad_(False)
    quantised = copy.deepcopy(whole)
    convert, dense = make
    for name, module in list(whole.named_modules()):
        if type(module) is nn.Linear and "blocks." in name:
            parent, _, child = name.rpartition(".")
            made = convert(copy.deepcopy(module))
            quantised.get_submodule(parent)._modules[child] = made
            whole.get_submodule(parent)._modules[child] = plain_of(made, dense)
    return whole, quantised


# PEFT itself puts nothing on a class that is no linear; SimpleTuner teaches it to
@pytest.mark.parametrize("base", [base for base in BASES if base != "SimpleTuner fp8"])
def test_blocks_run_fused_with_pefts_lora(base):
    make, stored, _ = BASES[base]
    whole, quantised = model_of(make(), "diffusers")
    for model in (whole, quantised):
        add_lora(model, targets=["to_q", "to_out.0", "proj_mlp", "ff.net.2"])
    # PEFT gives its factors the type of the base's weight, which may have 8 bits
    trained = lora_parameters(whole)
    for name, p in lora_parameters(quantised).items():
        p.data = trained[name].data.clone()
    report = fluxfast.accelerate(quantised, strict=True)
    assert all(block.fused for block in report.blocks), str(report)
    assert {linear.base for linear in report.linears} == {stored}
    assert {linear.adapters for linear in report.linears} == {0, 1}
    assert report.compute == "same"
    assert_equal(whole, quantised, make_inputs(2, 6, 4, guidance=False), tolerance=SAME)
    assert report.calls("fused") == report.calls() == len(report.blocks)


TRAINERS = [
    ("OneTrainer int8 W8A8", OneTrainerLora),
    ("OneTrainer compressed", OneTrainerLora),
    ("OneTrainer nf4", OneTrainerLora),
    ("OneTrainer fp8", OneTrainerLoha),
    ("OneTrainer SVD of W8A8", OneTrainerLora),
    ("OneTrainer SVD of fp8", OneTrainerLoha),
    ("OneTrainer GGUF", OneTrainerLora),
    ("scaled fp8", KohyaLora),
    ("scaled fp8 by blocks", KohyaLora),
    ("ai-toolkit's own", ToolkitLora),
    ("SDNQ int8 in groups", ToolkitLora),
    ("SimpleTuner fp8", KohyaLora),
]


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize(("base", "adapter"), TRAINERS)
def test_blocks_run_fused_with_a_trainers_adapters(base, adapter, layout):
    make, stored, _ = BASES[base]
    whole, quantised = model_of(make(), layout)
    for model in (whole, quantised):
        linears = [
            m for n, m in model.named_modules() if "blocks." in n and hasattr(m, "in_features")
        ]
        model.network = nn.ModuleList(adapter(linear) for linear in linears)
        randomise_trained(model)
    report = fluxfast.accelerate(quantised, strict=True)
    assert all(block.fused for block in report.blocks), str(report)
    assert {linear.base for linear in report.linears} == {stored}
    assert {linear.adapters for linear in report.linears} == {1}
    assert_equal(whole, quantised, make_inputs(2, 6, 4, guidance=False), tolerance=SAME)
    assert report.calls("fused") == report.calls() == len(report.blocks)


def test_a_dora_rescales_the_part_of_low_rank_too():
    """OneTrainer's DoRA over its SVD; the same over the weight in full is the truth."""
    make, dense = of(with_svd(W8A8))
    module = make_linear(make)
    plain = plain_of(module, dense)
    adapters = []
    for linear in (plain, module):
        adapters.append(OneTrainerDora(linear))
        torch.manual_seed(3)
        for p in adapters[-1].parameters():
            p.data = torch.rand(p.shape)
    x = torch.randn(5, 192)
    assert obstacle(module) is None and isinstance(read_linear(module).weight, Decoded)
    assert relative_error(project(x, module), plain(x)) < SAME


@pytest.mark.parametrize("base", ["OneTrainer int8 W8A8", "OneTrainer compressed", "scaled fp8"])
def test_what_a_host_rewrites_is_read_anew(base):
    """Hosts put other data in place of a tensor's, which leaves its version as it is."""
    make, dense = BASES[base][0]()
    module = make_linear(make)
    before = read_linear(module).weight.to(torch.float32)
    scale = module.scale if hasattr(module, "scale") else module.scale_weight
    scale.data = scale.data * 2
    assert relative_error(read_linear(module).weight.to(torch.float32), 2 * before) < 1e-6
    scale.mul_(2)
    assert relative_error(read_linear(module).weight.to(torch.float32), 4 * before) < 1e-6
    module.weight.data = module.weight.data.flip(0)
    assert relative_error(read_linear(module).weight.to(torch.float32), dense(module)) < 1e-6


def test_a_transposed_copy_belongs_to_the_codes_that_lie_there():
    model = model_of(of(W8A8), "diffusers")[1]
    fluxfast.accelerate(model)
    block = model.transformer_blocks[0]
    groups = block.linear_groups()
    keep_transposed(groups, "int8")
    assert transposed_copies(groups, "int8")
    codes = groups[0][0].weight
    assert torch.equal(copy_of(codes), codes.T)
    codes.data = codes.data.flip(0)
    assert copy_of(codes) is None


INT8 = ["OneTrainer int8 W8A8", "OneTrainer compressed", "OneTrainer SVD of W8A8", "SDNQ int8"]


@pytest.mark.parametrize("base", INT8)
def test_an_int8_base_runs_in_int8_on_a_gpu_that_gains_from_it(base, monkeypatch):
    """The GPU is an entry of the table, and the tensors stay on the CPU."""
    model = model_of(BASES[base][0](), "diffusers")[1]
    monkeypatch.setattr(gpus, "this_gpu", lambda device: gpus.find_gpu("H100"))
    report = fluxfast.accelerate(model)
    assert report.compute == "int8"
    # codes that are unpacked anew each time can keep no copy
    assert report.transposed_codes == (base != "OneTrainer compressed")


def test_compressed_codes_are_multiplied_as_they_are():
    plain, packed = (make_linear(of(W8A8, compressed=each)[0]) for each in (False, True))
    x = torch.randn(20, 192)
    expected, actual = (project(x, module, compute="int8") for module in (plain, packed))
    assert torch.equal(actual, expected)
    # the host's own product rounds x alike
    assert relative_error(actual, plain(x)) < 1e-5


def test_a_call_does_not_ask_for_a_weight_that_is_decoded_to_be_seen():
    model = model_of(of(Ostris), "diffusers")[1]
    fluxfast.accelerate(model, strict=True)
    linears = [module for module in model.modules() if isinstance(module, Ostris)]
    before = [linear.asked for linear in linears]
    with torch.no_grad():
        model(**make_inputs(2, 6, 4, guidance=False))
    assert [linear.asked for linear in linears] == before


class NewForward(W8A8):
    """A later version, which does more."""

    def forward(self, x_orig):
        return super().forward(x_orig) + self.new_part(x_orig)


def twice(forward):
    @functools.wraps(forward)
    def wrapped(self, x):
        return forward(self, x).mul(2)

    return wrapped


class Decorated(W8A8):
    """Its forward is another function's."""

    forward = twice(W8A8.forward)


class FourBits(Quantizer):
    """ai-toolkit's quantisers whose product rounds x as well."""

    act_qmax = 7


def unquantised():
    module = make_linear(lambda linear: W8A8(linear))
    module.weight.data = module.weight.data.float()
    return module


def with_other_patch():
    linear = make_linear(lambda linear: scaled_fp8(linear))
    linear.forward = (lambda self, x: self.new_part(x)).__get__(linear)
    return linear


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (
            lambda: make_linear(lambda linear: NewForward(linear)),
            "doesn't know: forward, new_part, super",
        ),
        (lambda: make_linear(lambda linear: Decorated(linear)), "doesn't know"),
        (unquantised, "not quantised yet"),
        (
            lambda: make_linear(lambda linear: Ostris(linear, quantizer=FourBits())),
            "fewer than 8 bits",
        ),
        (with_other_patch, "its forward was replaced"),
    ],
)
def test_what_can_not_be_read_says_why(make, because):
    assert because in obstacle(make())


def test_a_scale_that_its_forward_does_not_use_is_not_used():
    linear = make_linear(lambda linear: scaled_fp8(linear))
    scaled = read_linear(linear).weight
    assert isinstance(scaled, QuantWeight) and not read_base(linear).adapters
    del linear.__dict__["forward"]
    bare = read_linear(linear).weight
    assert torch.equal(bare.to(torch.float32), linear.weight.float())


def test_a_trainers_patch_over_scaled_fp8_in_another_dtype_keeps_the_scale():
    linear = make_linear(lambda linear: scaled_fp8(linear))
    linear.weight.data = linear.weight.data.float()
    x = torch.randn(3, 192)
    assert relative_error(project(x, linear), linear(x)) < 1e-6


@pytest.mark.parametrize("base", ["OneTrainer SVD of fp8", "scaled fp8", "scaled fp8 by blocks"])
def test_torch_compile_traces_the_hosts_own_product(base):
    make, _ = BASES[base][0]()
    module = make_linear(make)
    x = torch.randn(3, 192)
    # the classes and forwards that were seen before are known already
    assert obstacle(module) is None
    compiled = torch.compile(lambda x: project(x, module), backend="eager", fullgraph=True)
    with torch.compiler.set_stance("default"):
        assert relative_error(compiled(x), module(x)) < 1e-6
