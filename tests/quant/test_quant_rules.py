"""`quantize_model` on diffusers' own FLUX.1: which linears, how many, one at a time; SimpleTuner's
names.
"""

import logging
import weakref

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import nn

from fluxfast import FluxTransformer
from fluxfast.config.precision_words import in_words
from fluxfast.quant import FORMATS
from fluxfast.quant.linear import QuantLinear
from fluxfast.quant.rules import PRECISIONS, format_of, quantize_model
from support import SMALL, make_inputs, randomise, relative_error


def small(cls=FluxTransformer2DModel, **config):
    model = cls(**SMALL, guidance_embeds=True, **config)
    randomise(model)
    return model.eval()


def test_which_linears():
    model = small()
    total = sum(isinstance(m, nn.Linear) for m in model.modules())
    report = quantize_model(model, FORMATS["int8"])
    assert sorted(report.kept) == ["context_embedder", "proj_out", "x_embedder"]
    assert len(report.quantized) == total - 3
    for name in (
        "single_transformer_blocks.0.proj_out",
        "single_transformer_blocks.2.norm.linear",
        "transformer_blocks.1.norm1.linear",
        "transformer_blocks.0.attn.to_out.0",
        "norm_out.linear",
        "time_text_embed.guidance_embedder.linear_1",
    ):
        assert name in report.quantized and type(model.get_submodule(name)) is QuantLinear
    assert {n for n, m in model.named_modules() if type(m) is nn.Linear} == set(report.kept)
    assert report.bytes_after == sum(
        m.packed().nbytes for m in model.modules() if isinstance(m, QuantLinear)
    )
    # fp32 in one byte, and four for a row's scale
    assert 3 < report.bytes_before / report.bytes_after < 4
    assert str(report).startswith(f"{total - 3} linears in int8: 0.00 GiB became 0.00; 3 kept: ")


def test_counts_of_flux():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    # 19 double blocks of 14, 38 single blocks of 6, six in the embedders, norm_out, and the three
    # that stay
    assert len(names) == 19 * 14 + 38 * 6 + 6 + 1 + 3


@pytest.mark.parametrize("cls", [FluxTransformer2DModel, FluxTransformer])
# the model is as wide as one group: what is left of int2's 0.26 a weight after five blocks is
# large, and must not be more
@pytest.mark.parametrize(
    ("name", "bound"),
    [("int8", 0.02), ("fp8_e4m3", 0.06), ("int4", 0.2), ("nf4", 0.2), ("int2", 0.6)],
)
def test_the_model_still_computes_the_same(cls, name, bound):
    model, inputs = small(cls), make_inputs(2, 3, 5)
    expected = model(**inputs).sample
    quantize_model(model, FORMATS[name])
    with torch.no_grad():
        error = relative_error(model(**inputs).sample, expected)
    assert 0 < error < bound


def test_originals_go_one_by_one(monkeypatch):
    model = small()
    originals = {n: weakref.ref(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    alive = []
    from_linear = QuantLinear.from_linear

    def counted(linear, format):
        alive.append(sum(ref() is not None for ref in originals.values()))
        return from_linear(linear, format)

    monkeypatch.setattr(QuantLinear, "from_linear", counted)
    quantize_model(model, FORMATS["int8"])
    assert alive == list(range(len(originals), 3, -1))


def test_state_dict_of_a_quantised_model():
    source, target = small(), small()
    quantize_model(source, FORMATS["nf4"])
    randomise(target, seed=2)
    quantize_model(target, FORMATS["nf4"])
    target.load_state_dict(source.state_dict())
    inputs = make_inputs(1, 2, 3)
    assert torch.equal(target(**inputs).sample, source(**inputs).sample)


def test_other_layers_to_keep():
    model = small()
    report = quantize_model(model, FORMATS["int4"], kept=("norm_out.linear",))
    assert report.kept == ["norm_out.linear"] and type(model.proj_out) is QuantLinear


def test_refusals():
    model = small()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(
        ValueError, match=r"transformer_blocks.0.attn.to_q has an adapter: quantise the model first"
    ):
        quantize_model(model, FORMATS["int8"])
    model = small()
    quantize_model(model, FORMATS["int8"])
    with pytest.raises(ValueError, match="is in int8 already"):
        quantize_model(model, FORMATS["int4"])


def test_precision_names(caplog):
    caplog.set_level(logging.INFO, logger="fluxfast")
    expected = {
        "int8-quanto": "int8",
        "int8-torchao": "int8",
        "int4-quanto": "int4",
        "int2-quanto": "int2",
        "nf4-bnb": "nf4",
        "fp8-quanto": "fp8_e4m3",
        "fp8-torchao": "fp8_e4m3",
    }
    assert {*expected, "no_change"} == set(PRECISIONS)
    for precision, name in expected.items():
        caplog.clear()
        assert format_of(precision) is FORMATS[name]
        bits = f"{FORMATS[name].bits_per_weight:g}"
        kept = f"kept in fluxfast's {in_words(name)}, {bits} bits a weight"
        assert caplog.messages == [f"base_model_precision {precision}: {kept}"]
    caplog.clear()
    assert format_of("no_change") is None and not caplog.messages
    with pytest.raises(
        ValueError, match=r"expected one of no_change, int8-quanto.* got 'int5-sdnq'"
    ):
        format_of("int5-sdnq")
