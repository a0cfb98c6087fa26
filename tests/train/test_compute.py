"""compute_precision and recompute in a run: what is chosen, and that gradients stay what they should be."""

import pytest
import torch

from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from fluxfast.train.compute import choose_compute
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
