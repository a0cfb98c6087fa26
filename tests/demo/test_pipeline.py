"""The demo's small pipelines: random ones, and the toy base that is shipped."""

import pytest
import torch

from fluxfast.demo import BASE
from fluxfast.demo.pipeline import BASE_CONFIG, MODEL_INDEX, make_pipeline
from fluxfast.demo.toyworld import scenes, subject_scenes, vocabulary
from fluxfast.model.transformer import FluxTransformer

# a small one, whose parts are all there
CONFIG = BASE_CONFIG | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder, CONFIG, to_train_whole=True)
    return folder


def test_every_word_of_a_caption_is_one_token(pipeline):
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(pipeline / "tokenizer_2")
    for word in vocabulary():
        assert clip.tokenize(word) == [f"{word}</w>"] and t5.tokenize(word) == [f"▁{word}"]
    known = set(vocabulary())
    for scene in [*scenes(5, 50), *subject_scenes(5, 10)]:
        assert set(scene.caption.replace(",", "").split()) <= known
        assert clip.unk_token_id not in clip(scene.caption).input_ids[1:-1]


def test_a_transformer_to_be_trained_whole_begins_with_zero(pipeline):
    """And its first gradient reaches the output layer, through which the others' come later."""
    model = FluxTransformer.from_pretrained(pipeline, subfolder="transformer")
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 64, 64),
        "encoder_hidden_states": torch.randn(2, 9, 64),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([0.2, 0.9]),
        "guidance": torch.ones(2),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(9, 3),
    }
    output = model(**inputs).sample
    assert output.shape == (2, 64, 64) and not output.any()
    (output - torch.randn(output.shape)).square().mean().backward()
    assert model.proj_out.weight.grad.abs().max() > 0


def test_the_toy_base_has_every_part_and_is_small():
    for part in [name for name in MODEL_INDEX if name[0] != "_"]:
        assert any((BASE / part).iterdir()), part
    size = sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file())
    assert size <= 16e6
    config = FluxTransformer.load_config(BASE, subfolder="transformer")
    assert {name: config[name] for name in BASE_CONFIG} == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in BASE_CONFIG.items()
    }
