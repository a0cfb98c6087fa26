"""Quantised text encoders: what they compute and keep, and their own cache entries."""

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from fluxfast.data import t5 as t5_module
from fluxfast.data.cache import TensorCache
from fluxfast.data.encode import EncoderSettings, encode_prompts
from fluxfast.data.encoders import TextEncoders
from fluxfast.data.t5 import load_t5
from fluxfast.quant import FORMATS, QuantWeight
from fluxfast.quant.linear import QuantLinear
from support import relative_error

IDS = torch.tensor([[5, 9, 3, 1, 0, 0], [7, 7, 7, 2, 8, 1]])


def save_t5(folder, **options):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=70,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config)
    model.save_pretrained(folder, **options)
    return model.eval()


def decoded(model, format):
    """The same encoder with every linear's weight as the format keeps it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            stored = QuantWeight.of(module.weight.detach(), FORMATS[format])
            module.weight.data = stored.to(torch.float32)
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["file", "shards"])
@torch.no_grad()
def test_as_over_the_decoded_weights(tmp_path, format, options):
    plain = save_t5(tmp_path, **options)
    model = load_t5(tmp_path, FORMATS[format], torch.float32)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 2 * 7 and all(isinstance(linear, QuantLinear) for linear in linears)
    assert model.shared.weight is model.encoder.embed_tokens.weight and not model.training
    expected = plain(IDS)[0]
    out = model(IDS)[0]
    assert relative_error(out, decoded(plain, format)(IDS)[0]) < 1e-5
    assert relative_error(out, expected) > 1e-4


@torch.no_grad()
def test_no_weight_is_decoded_for_its_dtype(tmp_path, monkeypatch):
    """T5 asks its last linear for `weight.dtype` in each forward."""
    save_t5(tmp_path)
    model, calls, decode = load_t5(tmp_path, FORMATS["int8"], torch.float32), [], QuantWeight.to
    monkeypatch.setattr(
        QuantWeight, "to", lambda self, *args: calls.append(1) or decode(self, *args)
    )
    model(IDS)
    assert len(calls) == 2 * 7


@torch.no_grad()
def test_dtype(tmp_path):
    save_t5(tmp_path)
    model = load_t5(tmp_path, FORMATS["int8"], torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {
        torch.bfloat16
    } and model.dtype == torch.bfloat16
    assert model(IDS)[0].dtype == torch.bfloat16


@torch.no_grad()
def test_a_whole_t5_and_the_other_name_of_its_table(tmp_path):
    plain = save_t5(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    assert "shared.weight" in state
    state |= {
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(3),
        "lm_head.weight": torch.ones(3),
    }
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, file)
    out = load_t5(tmp_path, FORMATS["int8"], torch.float32)(IDS)[0]
    # the error of int8 in two layers
    assert relative_error(out, plain(IDS)[0]) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("encoder.block.1.layer.0.SelfAttention.v.weight"),
            r"1 weights .*block\.1\.layer\.0\.SelfAttention\.v",
        ),
        (lambda s: s.pop("shared.weight"), r"2 weights .* shared\.weight"),
        (
            lambda s: s.update({"encoder.final_layer_norm.weight": torch.ones(31)}),
            r"final_layer_norm\.weight \[32\]",
        ),
        (
            lambda s: s["encoder.block.0.layer.1.DenseReluDense.wo.weight"].mul_(torch.inf),
            r"DenseReluDense\.wo\.weight: .*finite",
        ),
    ],
)
def test_wrong_weights_are_named(tmp_path, change, message):
    save_t5(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_t5(tmp_path, FORMATS["int8"], torch.float32)
    assert str(tmp_path) in str(error.value)


def test_a_truncated_file_is_named(tmp_path):
    save_t5(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_t5(tmp_path, FORMATS["int8"], torch.float32)


def test_text_encoders(pipeline_folder):
    source = (str(pipeline_folder), None, None)
    captions = ["a photo of a cat", ""]
    plain = TextEncoders.from_pretrained(source, max_length=24).encode(captions)
    int8 = {"clip_format": FORMATS["int8"], "t5_format": FORMATS["int8"]}
    kept = TextEncoders.from_pretrained(source, max_length=24, **int8).encode(captions)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert 1e-5 < relative_error(kept[name], plain[name]) < 0.05
    assert torch.equal(kept["attention_mask"], plain["attention_mask"])


def test_embeddings_of_another_precision_are_others(pipeline_folder, tmp_path, monkeypatch):
    cache, made = TensorCache(tmp_path), []
    load = t5_module.load_t5
    monkeypatch.setattr(
        "fluxfast.data.encoders.load_t5",
        lambda *args, **kw: made.append(args[1].name) or load(*args, **kw),
    )

    def encode(**precisions):
        settings = EncoderSettings(
            pipeline=(str(pipeline_folder), None, None), max_length=8, **precisions
        )
        with Progress(disable=True) as progress:
            return encode_prompts(["cat"], cache, settings, batch_size=1, progress=progress)[1]

    assert [encode() for _ in range(2)] == [1, 0]
    assert [encode(t5_precision="int8-quanto") for _ in range(2)] == [1, 0]
    # another name of the same format
    assert encode(t5_precision="int8-torchao") == 0
    assert encode(clip_precision="int8-quanto") == 1
    assert encode() == 0 and made == ["int8"]
