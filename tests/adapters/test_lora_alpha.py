"""The alpha of each module of a LoRA file: its tensors, metadata, PEFT's settings in the folder, in
any dtype.
"""

import json

import pytest
import torch
from diffusers import FluxPipeline
from lora_file_cases import TO_Q, pairs, products, write
from peft import LoraConfig, get_peft_model
from tiny_flux import tiny_transformer

from fluxfast.adapters.lora_read import read_lora
from fluxfast.adapters.lora_state import lora_layers


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (torch.tensor(-4.0), -4),
        (torch.tensor(0.0), 0),
        (torch.tensor(2), 2),
        (torch.tensor([3.0]), 3),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (torch.tensor(1.5, dtype=torch.float8_e4m3fn), 1.5),
    ],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_alpha_and_weights_of_any_dtype(tmp_path, dtype, alpha, expected):
    for prefix, module, a, b in [
        ("transformer.", TO_Q, "lora_A", "lora_B"),
        ("lora_unet_", "double_blocks_0_img_attn_proj", "lora_down", "lora_up"),
    ]:
        state = {key: tensor.to(dtype) for key, tensor in pairs(module, prefix, 4, a, b).items()}
        path = write(tmp_path / "x.safetensors", state | {f"{prefix}{module}.alpha": alpha})
        lora = read_lora(path)
        assert lora.alpha == expected
        # fp32 holds every one of these values exactly
        factors = zip(sorted(lora.state.items()), sorted(state.items()), strict=True)
        assert all(torch.equal(got, want.float()) for (_, got), (_, want) in factors)
        assert [("alpha is 0" in note, TO_Q.split(".")[0] in note) for note in lora.notes] == [
            (True, True)
        ] * (expected == 0)


def test_where_alpha_comes_from(tmp_path):
    """The tensor before the file's metadata before the folder's settings before the rank."""
    to_k = "transformer_blocks.0.attn.to_k"
    state = pairs() | pairs(to_k)
    path = tmp_path / "x.safetensors"

    def alphas(state, metadata=None):
        return read_lora(write(path, state, metadata)).alphas

    assert alphas(state) == {TO_Q: 4, to_k: 4}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    )
    assert alphas(state) == {TO_Q: 8, to_k: 8}
    metadata = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 4, "transformer.lora_alpha": 12, "text_encoder.r": 2}
        )
    }
    assert alphas(state, metadata) == {TO_Q: 12, to_k: 12}
    assert alphas(state | {f"transformer.{TO_Q}.alpha": torch.tensor(-1.0)}, metadata) == {
        TO_Q: -1,
        to_k: 12,
    }
    # settings that say nothing about alpha leave it to the next
    assert alphas(state, {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 2})}) == {
        TO_Q: 8,
        to_k: 8,
    }
    # another file's settings, by PEFT's name for it
    write(tmp_path / "adapter_model.safetensors", pairs())
    assert alphas(state) == {TO_Q: 4, to_k: 4}
    assert read_lora(tmp_path / "adapter_model.safetensors").alphas == {TO_Q: 8}


def test_alpha_from_diffusers_own_file(tmp_path):
    transformer = tiny_transformer()
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=["to_q"]))
    transformer.save_lora_adapter(tmp_path)
    assert read_lora(tmp_path).alphas == dict.fromkeys(lora_layers(transformer), 10.0)
    FluxPipeline.save_lora_weights(
        tmp_path / "pipeline",
        transformer_lora_layers=pairs(prefix=""),
        transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 7, "use_rslora": True},
    )
    assert read_lora(tmp_path / "pipeline").alphas == {TO_Q: 14.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"to_k": 4, r"^single.*\.1\.attn\.to_q": -2}},
        {"rank_pattern": {"single_transformer_blocks.0.attn.to_q": 2}, "use_rslora": True},
    ],
)
def test_a_folder_that_peft_wrote_has_pefts_scales(tmp_path, settings):
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules=["to_q", "to_k"], init_lora_weights=False, **settings
    )
    model = get_peft_model(tiny_transformer(), config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    layers = lora_layers(model)
    expected = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in layers.items()
    }
    got = products(read_lora(tmp_path))
    assert got.keys() == expected.keys()
    for name, product in expected.items():
        torch.testing.assert_close(got[name], product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "adapter of type LOHA"),
        ({"use_dora": True}, "use_dora on"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias on"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which moves a part of the base",
        ),
        (
            {"r": 8, "lora_alpha": 8},
            r"gives transformer_blocks\.0\.attn\.to_q rank 8, but its tensors have rank 4",
        ),
        ({"r": 4, "lora_alpha": "16"}, "expected a number for lora_alpha of .*to_q, found '16'"),
        ({"lora_alpha": 8, "alpha_pattern": ["to_q"]}, "alpha_pattern is no table"),
        ({"lora_alpha": 8, "alpha_pattern": {"(": 3}}, "alpha_pattern is no table"),
        (["LORA"], "expected a table of LoraConfig's fields, found list"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message, beside):
    if beside:
        path = write(tmp_path / "x.safetensors", pairs())
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        where = r"adapter_config\.json"
    else:
        path = write(
            tmp_path / "x.safetensors", pairs(), {"lora_adapter_metadata": json.dumps(settings)}
        )
        where = r"x\.safetensors: its metadata"
    with pytest.raises(ValueError, match=f"{where}.*{message}"):
        read_lora(path)


def test_settings_that_are_not_json_are_refused_by_name(tmp_path):
    path = write(tmp_path / "x.safetensors", pairs(), {"lora_adapter_metadata": "{"})
    with pytest.raises(
        ValueError, match=r"x\.safetensors: its metadata lora_adapter_metadata isn't JSON"
    ):
        read_lora(path)
    path = write(tmp_path / "y.safetensors", pairs())
    (tmp_path / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json isn't JSON"):
        read_lora(path)


def test_kohyas_alpha_in_metadata_alone_is_said_and_not_used(tmp_path):
    metadata = {"ss_network_alpha": "1.0", "ss_network_dim": "4"}
    lora = read_lora(write(tmp_path / "x.safetensors", pairs(), metadata))
    assert lora.alphas == {TO_Q: 4.0}
    assert len(lora.notes) == 1
    assert "network alpha 1.0 at rank 4" in lora.notes[0]
    with_alpha = pairs() | {f"transformer.{TO_Q}.alpha": torch.tensor(1.0)}
    assert read_lora(write(tmp_path / "y.safetensors", with_alpha, metadata)).notes == ()
    metadata |= {"lora_adapter_metadata": json.dumps({"lora_alpha": 8})}
    assert read_lora(write(tmp_path / "z.safetensors", pairs(), metadata)).notes == ()
