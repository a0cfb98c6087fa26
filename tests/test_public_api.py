"""What `import fluxfast` offers: its help, its example, and errors that name the choices."""

import io
import pydoc
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from typing import get_args

import pytest
from diffusers import FluxTransformer2DModel

import fluxfast
from fluxfast.adapters.lora_init import INIT_TYPES
from fluxfast.adapters.presets import PRESETS
from fluxfast.config.adapters import LORA_FORMATS
from fluxfast.config.precision_words import COMPUTE_WORDS, in_words
from fluxfast.demo.pipeline import make_pipeline
from fluxfast.model.tape import POLICIES
from fluxfast.ops.attention import BACKENDS
from fluxfast.ops.dispatch import Impl
from fluxfast.quant import FORMATS
from fluxfast_bench.shapes import CONFIGS
from small_flux import small_flux
from support import SMALL

FORMAT_WORDS = tuple(map(in_words, FORMATS))

PUBLIC = sorted({*fluxfast.__all__} - {"__version__"})


def line_of(text, beginning):
    """The line of a text that begins so, and what follows it until the next line."""
    (found,) = [line for line in text.splitlines() if line.strip().startswith(beginning)]
    return found.partition(beginning)[2]


def test_help_shows_every_name_with_its_own_documentation():
    shown = pydoc.render_doc(fluxfast, renderer=pydoc.plaintext)
    for name in PUBLIC:
        documented = getattr(fluxfast, name)
        assert f"    {name}(" in shown or f"class {name}(" in shown
        assert documented.__doc__.splitlines()[0] in shown
        assert name in fluxfast.__doc__


@pytest.mark.parametrize(
    ("beginning", "known"),
    [
        ("quantize(transformer, format)", FORMAT_WORDS),
        ("transformer.set_compute(compute)", COMPUTE_WORDS),
        ("transformer.set_recompute(policy)", POLICIES),
        ("transformer.set_attention(backend)", BACKENDS),
        ("save_lora(transformer, path, format=…)", LORA_FORMATS),
    ],
)
def test_the_overview_lists_what_may_be_chosen(beginning, known):
    words = line_of(fluxfast.__doc__, beginning).partition(":")[0].split(",")
    assert [word.strip() for word in words] == list(known)


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (fluxfast.accelerate, (*COMPUTE_WORDS, *POLICIES, *get_args(Impl))),
        (fluxfast.quantize, FORMAT_WORDS),
        (fluxfast.add_lora, (*INIT_TYPES, *PRESETS)),
        (fluxfast.save_lora, LORA_FORMATS),
        (fluxfast.FluxTransformer.set_compute, COMPUTE_WORDS),
        (fluxfast.FluxTransformer.set_recompute, POLICIES),
        (fluxfast.FluxTransformer.set_attention, BACKENDS),
    ],
)
def test_a_functions_help_names_what_it_takes(function, known):
    for word in known:
        assert f'"{word}"' in function.__doc__, word


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch):
    make_pipeline(tmp_path / "fluxfast-demo/pipeline", CONFIGS["small"])
    monkeypatch.chdir(tmp_path)
    _, _, rest = fluxfast.__doc__.partition("    import torch\n")
    example = textwrap.dedent("    import torch\n" + rest.partition("\n\nTraining itself")[0])
    said = io.StringIO()
    with redirect_stdout(said):
        exec(compile(example, "the example", "exec"), {})
    assert "linears in int8" in said.getvalue()
    assert said.getvalue().endswith("my-lora/pytorch_lora_weights.safetensors\n")
    # and its LoRA can be put on another model
    again = fluxfast.FluxTransformer.from_pretrained(
        "fluxfast-demo/pipeline", subfolder="transformer"
    )
    assert len(fluxfast.load_lora(again, "my-lora")) > 0


def test_importing_is_cheap_and_lists_everything():
    code = """
import sys
import fluxfast
assert not {"torch", "diffusers", "numpy", "peft"} & set(sys.modules)
print(*dir(fluxfast))
"""
    listed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert {*fluxfast.__all__} <= set(listed.stdout.split())
    with pytest.raises(AttributeError, match="'fluxfast' has no attribute 'acelerate'"):
        fluxfast.acelerate  # noqa: B018


def test_errors_name_the_choices_and_the_nearest():
    model, host = small_flux(), FluxTransformer2DModel(**SMALL)
    lora = {"targets": ["to_q"], "rank": 2}
    for call, message in (
        (lambda: model.set_compute("int9"), "compute: .* same, int8, fp8; got 'int9'; .* 'int8'"),
        (lambda: model.set_compute("int8", -1), "outliers: expected a number of channels"),
        (lambda: model.set_recompute("sel"), "none, selective, full; got 'sel'; .* 'selective'"),
        (lambda: model.set_recompute(["none"]), "a policy for each of 5 blocks, got 1"),
        (lambda: model.set_attention("Flash2"), "auto, cudnn, .*got 'Flash2'; .* 'flash'"),
        (lambda: fluxfast.quantize(model, "int8-quanto"), "int8, .*got 'int8-quanto'$"),
        (lambda: fluxfast.quantize(model, "NF4"), "; did you mean 'nf4'"),
        (
            lambda: fluxfast.accelerate(host, compute="int9"),
            "auto, same, int8.*did you mean 'int8'",
        ),
        (lambda: fluxfast.accelerate(host, recompute="x"), "none, selective, full; got 'x'$"),
        (lambda: fluxfast.accelerate(host, attention="cudn"), "got 'cudn'; did you mean 'cudnn'"),
        (lambda: fluxfast.accelerate(host, impl="tritton"), "did you mean 'triton'"),
        (lambda: fluxfast.add_lora(host, targets="ai-toolkt", rank=2), "mean 'ai-toolkit'"),
        (lambda: fluxfast.add_lora(host, **lora, init="gausian"), "did you mean 'gaussian'"),
        (lambda: fluxfast.add_lora(host, targets=["to_q"], rank=0), "at least 1, got 0"),
        (lambda: fluxfast.save_lora(host, "x"), "has no adapter; add_lora and load_lora"),
        (lambda: fluxfast.inspect(host), "accelerate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_set_attention_reaches_every_block():
    model = small_flux()
    model.set_attention("ref")
    assert {block.attention for block in model.blocks} == {"ref"}


def test_quantize_is_what_a_run_does():
    model = small_flux()
    report = fluxfast.quantize(model, "nf4")
    assert report.format == "nf4" and report.kept == ["context_embedder", "x_embedder", "proj_out"]
    assert report.bytes_after < report.bytes_before / 4
    with pytest.raises(ValueError, match="is in nf4 already"):
        fluxfast.quantize(model, "int8")
