"""One word for 8-bit floats: what is written by its other names is read, and only fp8 is said."""

import pytest

from config_helpers import load
from fluxfast.cli.main import main
from fluxfast.config.precision_words import (
    COMPUTE_WORDS,
    compute_named,
    format_named,
    in_words,
)
from fluxfast.memory.wishes import wishes_of
from fluxfast.ops.linear.group import COMPUTE
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import PRECISIONS
from small_flux import small_flux


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_words_and_names():
    assert tuple(map(in_words, COMPUTE)) == COMPUTE_WORDS
    assert tuple(map(compute_named, COMPUTE_WORDS)) == COMPUTE
    assert [format_named(in_words(name)) for name in FORMATS] == list(FORMATS)
    for word in ("fp8", "e4m3", "fp8_e4m3"):
        assert (compute_named(word), format_named(word)) == ("e4m3", "fp8_e4m3")
    assert in_words("e4m3: fp8_e4m3 weights") == "fp8: fp8 weights"
    # a dtype of torch has its own name
    assert in_words("float8_e4m3fn") == "float8_e4m3fn"


@pytest.mark.parametrize("word", ["fp8", "e4m3", "fp8_e4m3"])
def test_a_config_may_say_any_of_them(word):
    config = load(compute_precision=word, base_model_precision=word, text_encoder_2_precision=word)
    assert config.compute_precision == "fp8" and wishes_of(config).compute == "e4m3"
    assert config.base_model_precision == config.text_encoder_2_precision == "fp8-quanto"


@pytest.mark.parametrize("word", ["fp8", "e4m3"])
def test_the_models_take_either(word):
    model = small_flux()
    model.set_compute(word)
    assert {block.compute for block in model.blocks} == {"e4m3"}
    with pytest.raises(ValueError, match="same, int8, fp8"):
        model.set_compute("fp4")


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_goes_by_its_own_name_too(format):
    precision = load(base_model_precision=in_words(format)).base_model_precision
    assert PRECISIONS[precision] == format


def test_the_command_line_offers_fp8_alone(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    told = capsys.readouterr().out
    assert "fp8" in told and "e4m3" not in told
    with pytest.raises(SystemExit):
        main(["quantize", "a", "b", "--format", "fp16"])
    told = capsys.readouterr().err
    assert "fp8" in told and "e4m3" not in told
