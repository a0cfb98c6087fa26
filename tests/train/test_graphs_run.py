"""`cuda_graphs` in a run: the same LoRA as without, emulated on the CPU; what forbids them, and
what turns them off.
"""

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import BF16, FP32, TREAD, Killed, kill_at

from fluxfast.config.settings import ConfigError
from fluxfast.memory import gpus
from fluxfast.memory.choices import Facts, choose
from fluxfast.memory.wishes import Wishes
from fluxfast.model import graphs
from fluxfast.model.graphs import StepGraphs
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import overview
from graph_emulator import Pool, capture, see_every_op

# how long the CPU takes for modulation would choose where it is computed
PLAIN = {"lora_dropout": 0.0, "train_batch_size": 1, "modulation_ahead": False}
INT8 = {"base_model_precision": "int8-quanto", "compute_precision": "int8"}
OFF = "CUDA graphs: off"


@pytest.fixture(autouse=True)
def emulated(monkeypatch, tmp_path, pretend_gpu):
    """Graphs without a GPU, for runs that may have them; the graphs of each, in order."""
    made = []
    see_every_op(monkeypatch)
    # what a prediction counts is no part of a step
    monkeypatch.setattr(overview, "predicted", lambda *args: 1.0)
    monkeypatch.chdir(tmp_path)
    # a step is run, the next one captured, and the third compared
    monkeypatch.setattr(graphs, "STEPS_RUN_FIRST", 1)

    def on_gpu(cls, transformer, **options):
        pool = Pool()
        made.append(cls(transformer, lambda *args: capture(*args, pool=pool), **options))
        return made[-1]

    monkeypatch.setattr(StepGraphs, "on_gpu", classmethod(on_gpu))
    pretend_gpu("H100")
    return made


@pytest.mark.parametrize(
    "mode",
    [
        FP32 | PLAIN | {"gradient_accumulation_steps": 3},
        BF16 | PLAIN | TREAD,
        BF16 | PLAIN | INT8,
        FP32 | PLAIN | {"lora_dropout": 0.3},
        FP32 | PLAIN | {"dynamo_backend": "aot_eager"},
    ],
    ids=["accumulation", "bf16-tread", "int8", "dropout", "compiled"],
)
def test_the_same_lora(run, emulated, mode):
    expected, _ = run(name="run", cuda_graphs=False, **mode)
    assert not emulated
    # auto is the default
    replayed, out = run(name="replayed", **mode)
    assert len(emulated) == 1 and emulated[0].replays == 1
    assert expected.read_bytes() == replayed.read_bytes()
    assert out.getvalue().count("CUDA graphs: steps are replayed") == 1


def test_the_same_lora_with_references(run, emulated, references):
    """A run of Kontext, whose last layer computes the scene's tokens alone."""
    mode = FP32 | PLAIN | TREAD | {"model_flavour": "kontext", "others": [references()]}
    expected, _ = run(name="run", cuda_graphs=False, **mode)
    replayed, _ = run(name="replayed", **mode)
    assert [made.replays for made in emulated] == [1]
    assert expected.read_bytes() == replayed.read_bytes()


def test_text_without_its_padding_is_replayed_in_few_lengths(run, emulated):
    """Captions are rounded up there, and what is left of the padding is masked."""
    mode = FP32 | PLAIN | {"flux_attention_masked_training": True}
    expected, _ = run(name="run", cuda_graphs=False, **mode)
    replayed, _ = run(name="replayed", **mode)
    assert [made.replays for made in emulated] == [1]
    one, other = load_file(expected), load_file(replayed)
    for key in one:
        # sums over other numbers of zeros in fp32, through six steps of AdamW
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-5)


def test_two_sizes_and_a_resumed_run(run, emulated, monkeypatch, workspace):
    """Images of two numbers of tokens, and a run that is killed when both are replayed."""
    mode = FP32 | PLAIN | {"max_train_steps": 20, "checkpoint_step_interval": 15}
    folder, cache = two_sizes(workspace), workspace / "cache" / "two_sizes"
    data = {
        "crop": False,
        "resolution": 128,
        "instance_data_dir": str(folder),
        "cache_dir_vae": str(cache),
    }
    expected, _ = run(name="run", cuda_graphs=False, dataset=data, **mode)
    kill_at(monkeypatch, 16)
    with pytest.raises(Killed):
        run(name="killed", dataset=data, **mode)
    resumed, out = run(name="killed", dataset=data, **mode)
    assert "step 15 of 20" in out.getvalue()
    assert [made.replays for made in emulated] == [2, 1]
    assert expected.read_bytes() == resumed.read_bytes()


def two_sizes(workspace):
    from PIL import Image

    folder = workspace / "two_sizes"
    if not folder.exists():
        folder.mkdir()
        for i, path in enumerate(sorted((workspace / "images").glob("*.png"))):
            with Image.open(path) as image:
                image.resize((192, 96) if i % 2 else (96, 96)).save(folder / path.name)
            (folder / path.name).with_suffix(".txt").write_text(
                path.with_suffix(".txt").read_text()
            )
    return folder


def test_a_graph_that_differs_turns_them_off(run, monkeypatch):
    mode = FP32 | PLAIN
    expected, _ = run(name="run", cuda_graphs=False, **mode)
    wrong = lambda *args: lambda *inputs: capture(*args)(*inputs) * 1.01  # noqa: E731
    monkeypatch.setattr(
        StepGraphs,
        "on_gpu",
        lambda transformer, **options: StepGraphs(transformer, wrong, **options),
    )
    turned_off, out = run(name="off", **mode)
    assert out.getvalue().count(f"{OFF}, and steps are run: a replayed step's output is 0.01") == 1
    assert expected.read_bytes() == turned_off.read_bytes()
    with pytest.raises(RuntimeError, match="a replayed step's output is"):
        run(name="asked_for", cuda_graphs=True, **mode)


def test_what_forbids_them_is_said_where_there_is_a_gpu(run, emulated, monkeypatch):
    streamed = FP32 | {"enable_group_offload": True, "max_train_steps": 1}
    _, out = run(**streamed)
    assert not emulated and f"· {OFF}: its blocks are streamed" in out.getvalue()
    with pytest.raises(ConfigError, match=r'"cuda_graphs" is true, but its blocks are streamed'):
        run(name="asked_for", cuda_graphs=True, **streamed)
    monkeypatch.setattr(gpus, "this_gpu", lambda device: None)
    _, out = run(name="on_a_cpu", **streamed)
    assert not emulated and "CUDA graphs" not in out.getvalue()


def test_a_linear_that_has_to_be_called_forbids_them(run, emulated, monkeypatch):
    """Only the model that is loaded shows it."""
    monkeypatch.setattr(graphs, "read_linear", lambda module: None)
    reason = "a linear of its blocks has to be called as it is"
    _, out = run(max_train_steps=1, **FP32 | PLAIN)
    assert not emulated and f"· {OFF}: {reason}" in out.getvalue()
    with pytest.raises(ConfigError, match=f'"cuda_graphs" is true, but {reason}'):
        run(name="asked_for", cuda_graphs=True, **FP32 | PLAIN)


@pytest.mark.parametrize(
    ("wishes", "facts", "reason"),
    [
        ({"vram_budget": 12.0}, {}, '"vram_budget" does not count what they keep'),
        ({"streams": True}, {}, "its blocks are streamed"),
        ({}, {"gpu": None}, "only a GPU has them"),
        ({}, {"obstacles": {"graphs": "a linear"}}, "a linear"),
    ],
)
def test_auto_gives_its_reason(wishes, facts, reason):
    known = Facts(**{"blocks": 3, "format": None, "gpu": gpus.find_gpu("H100")} | facts)
    choices = choose(Wishes(checkpoint_every=1, **wishes), known)
    assert not choices.graphs and choices.reasons["graphs"].startswith(reason)
    asked = Wishes(checkpoint_every=1, cuda_graphs=True, **wishes)
    if "vram_budget" in wishes:
        assert choose(asked, known).graphs
    else:
        with pytest.raises(ValueError, match=f'"cuda_graphs" is true, but {reason}'):
            choose(asked, known)


def test_without_a_gpu_they_are_refused_where_asked_for(run, monkeypatch):
    monkeypatch.setattr(gpus, "this_gpu", lambda device: None)
    with pytest.raises(
        ConfigError, match=r'"cuda_graphs" is true, but only a GPU has them: set it to "auto"'
    ):
        run(cuda_graphs=True, **FP32 | PLAIN)


def test_the_model_says_so_too(monkeypatch):
    monkeypatch.undo()
    from small_flux import small_flux

    with pytest.raises(
        ValueError, match="CUDA graphs: the model is on cpu, and only a GPU has them"
    ):
        small_flux(targets=["to_q"]).set_cuda_graphs(True)
    assert FluxTransformer.graphs is None
