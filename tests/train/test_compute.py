"""compute_precision and recompute in a run: what is chosen, and that gradients stay what they
should be.
"""

import pytest
import torch

from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from fluxfast.train.compute import choose_compute, make_deterministic
from support import SMALL


def transformer(format=None):
    model = FluxTransformer(**SMALL)
    if format is not None:
        quantize_model(model, FORMATS[format])
    return model


def on_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "format", "capability", "expected"),
    [
        ("auto", None, (9, 0), "same"),
        ("auto", "int8", (9, 0), "int8"),
        ("auto", "int4", (8, 0), "int8"),
        ("auto", "fp8_e4m3", (8, 9), "e4m3"),
        ("auto", "fp8_e4m3", (8, 6), "same"),
        ("auto", "nf4", (7, 0), "same"),
        ("same", "int8", (9, 0), "same"),
        ("int8", None, (8, 6), "int8"),
        ("fp8", "int8", (8, 9), "e4m3"),
    ],
)
def test_choice_on_a_gpu(monkeypatch, asked, format, capability, expected):
    chosen, why = choose_compute(asked, transformer(format), on_gpu(monkeypatch, capability))
    assert chosen == expected and why


def test_choice_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_compute("auto", transformer("int8"), cpu)[0] == "same"
    assert choose_compute("int8", transformer(), cpu)[0] == "int8"
    assert choose_compute("fp8", transformer(), cpu)[0] == "e4m3"


@pytest.mark.parametrize(("asked", "capability"), [("fp8", (8, 6)), ("int8", (7, 0))])
def test_what_the_device_lacks_is_refused(monkeypatch, asked, capability):
    with pytest.raises(ValueError, match=f"is {asked}, which a GPU has no tensor cores for"):
        choose_compute(asked, transformer(), on_gpu(monkeypatch, capability))


def test_deterministic(monkeypatch):
    on_cpu = transformer()
    make_deterministic(on_cpu)
    assert {block.attention for block in on_cpu.blocks} == {
        "auto"
    } and not torch.are_deterministic_algorithms_enabled()
    on_gpu = transformer()
    monkeypatch.setattr(FluxTransformer, "device", torch.device("cuda"))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic(on_gpu)
        assert (
            torch.are_deterministic_algorithms_enabled()
            and not torch.utils.deterministic.fill_uninitialized_memory
        )
        # the one back end of PyTorch's whose backward has an order of its own
        assert {block.attention for block in on_gpu.blocks} == {"flash"}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU every step is the same anyway")
def test_the_same_bits_on_a_gpu():
    from small_flux import small_flux
    from support import make_inputs

    def gradients():
        model = small_flux(targets=["to_q", "proj_mlp", "ff.net.2"], dtype=torch.bfloat16).cuda()
        make_deterministic(model)
        model(
            **{name: x.cuda() for name, x in make_inputs(2, 20, 30).items()}
        ).sample.float().square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    try:
        first = gradients()
        assert all(
            torch.equal(a, b) for _ in range(3) for a, b in zip(gradients(), first, strict=True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
