"""`cuda_graphs` in a run: the same LoRA as without, emulated on the CPU; what forbids them, and
what turns them off.
"""

import pytest
from test_trainer import BF16, FP32, TREAD, Killed, kill_at

from fluxfast.config.settings import ConfigError
from fluxfast.model import graphs
from fluxfast.model.graphs import StepGraphs
from fluxfast.model.transformer import FluxTransformer
from graph_emulator import Pool, capture, see_every_op

NO_DROPOUT = {"lora_dropout": 0.0, "train_batch_size": 1}
INT8 = {"base_model_precision": "int8-quanto", "compute_precision": "int8"}
OFF = "CUDA graphs: off"


@pytest.fixture(autouse=True)
def emulated(monkeypatch, tmp_path):
    """Graphs without a GPU, for runs that may have them; the graphs of each, in order."""
    made = []
    see_every_op(monkeypatch)
    monkeypatch.chdir(tmp_path)
    # a step is run, the next one captured, and the third compared
    monkeypatch.setattr(graphs, "STEPS_RUN_FIRST", 1)

    def on_gpu(cls, transformer, **options):
        pool = Pool()
        made.append(cls(transformer, lambda *args: capture(*args, pool=pool), **options))
        return made[-1]

    monkeypatch.setattr(StepGraphs, "on_gpu", classmethod(on_gpu))
    monkeypatch.setattr("fluxfast.train.compute.why_not", graphs.obstacle)
    return made


@pytest.mark.parametrize(
    "mode",
    [
        FP32 | NO_DROPOUT | {"gradient_accumulation_steps": 3},
        BF16 | NO_DROPOUT | TREAD,
        BF16 | NO_DROPOUT | INT8,
    ],
    ids=["accumulation", "bf16-tread", "int8"],
)
def test_the_same_lora(run, emulated, mode):
    expected, _ = run(name="run", cuda_graphs=False, **mode)
    assert not emulated
    # auto is the default
    replayed, out = run(name="replayed", **mode)
    assert len(emulated) == 1 and emulated[0].replays == 1
    assert expected.read_bytes() == replayed.read_bytes()
    assert out.getvalue().count("CUDA graphs: steps are replayed") == 1


def test_two_sizes_and_a_resumed_run(run, emulated, monkeypatch, workspace):
    """Images of two numbers of tokens, and a run that is killed when both are replayed."""
    mode = FP32 | NO_DROPOUT | {"max_train_steps": 20, "checkpoint_step_interval": 15}
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
    mode = FP32 | NO_DROPOUT
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
    _, out = run(**FP32 | {"lora_dropout": 0.1, "max_train_steps": 1})
    assert not emulated and "CUDA graphs" not in out.getvalue()
    with pytest.raises(
        ConfigError,
        match=r'"cuda_graphs" is true, but they are not possible here \(an adapter has a dropout',
    ):
        run(
            name="asked_for", cuda_graphs=True, **FP32 | {"lora_dropout": 0.1, "max_train_steps": 1}
        )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"cuda_graphs": "auto", "vram_budget": 12.0},
            '"vram_budget" does not count what they keep',
        ),
        ({}, "an adapter has a dropout"),
    ],
)
def test_auto_gives_its_reason(settings, reason, write_config, monkeypatch):
    import io
    from types import SimpleNamespace

    import torch
    from rich.console import Console

    from fluxfast.config.run import load_config
    from fluxfast.train.compute import set_cuda_graphs

    out = io.StringIO()
    found = None if "vram_budget" in settings else reason
    monkeypatch.setattr("fluxfast.train.compute.why_not", lambda transformer: found)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert not set_cuda_graphs(
        load_config(write_config(**settings)), on_gpu, Console(file=out, width=200)
    )
    assert out.getvalue().startswith(f"· {OFF}: {reason}")


def test_without_a_gpu_they_are_refused_where_asked_for(run, monkeypatch):
    monkeypatch.setattr("fluxfast.train.compute.why_not", graphs.why_not)
    with pytest.raises(
        ConfigError,
        match=r'"cuda_graphs" is true, but they are not possible here .*only a GPU has them',
    ):
        run(cuda_graphs=True, **FP32 | NO_DROPOUT)


def test_the_model_says_so_too(monkeypatch):
    monkeypatch.undo()
    from small_flux import small_flux

    with pytest.raises(
        ValueError, match="CUDA graphs: the model is on cpu, and only a GPU has them"
    ):
        small_flux(targets=["to_q"]).set_cuda_graphs(True)
    assert FluxTransformer.graphs is None
