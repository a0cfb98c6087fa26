"""`cuda_graphs` in a run: the same LoRA as without, emulated on the CPU, and a clear word where there can be none."""

import pytest

from fluxfast.data.settings import ConfigError
from fluxfast.model.graphs import StepGraphs
from fluxfast.model.transformer import FluxTransformer
from graph_emulator import capture, see_every_op

SETTINGS = {"optimizer": "torch-adamw", "mixed_precision": "no", "lora_dropout": 0.0, "max_train_steps": 3}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_same_lora(run, monkeypatch, accumulation):
    see_every_op(monkeypatch)
    settings = SETTINGS | {"gradient_accumulation_steps": accumulation}
    expected, _ = run(name="run", **settings)
    captured = []

    def set_graphs(transformer, on):
        captured.append(StepGraphs(transformer, capture))
        transformer.graphs = captured[0]

    monkeypatch.setattr(FluxTransformer, "set_cuda_graphs", set_graphs)
    replayed, _ = run(name="replayed", cuda_graphs=True, **settings)
    assert len(captured) == 1 and captured[0]._graphs
    assert expected.read_bytes() == replayed.read_bytes()


def test_without_a_gpu_it_is_refused(run):
    with pytest.raises(ConfigError, match=r'"cuda_graphs" is true, but they are not possible here .*only a GPU has them'):
        run(cuda_graphs=True, **SETTINGS)
