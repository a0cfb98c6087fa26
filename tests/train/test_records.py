"""What a run and its plan read off the records of a flavour and of an optimiser."""

from dataclasses import replace

import pytest
import torch
from optim_cases import installed
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

from fluxfast.checkpoint.reader import CheckpointError
from fluxfast.cli.plan import plan_report
from fluxfast.config.flavours import FLAVOURS
from fluxfast.config.optimizers import OPTIMIZERS, OptimizerKind
from fluxfast.config.run import load_config
from fluxfast.config.run_fields import TrainFields
from fluxfast.config.settings import ConfigError
from fluxfast.train import state
from fluxfast.train.base_model import open_base
from fluxfast.train.choose import BatchShape, workload_of
from fluxfast.train.optim import build_optimizer

MOMENTUM = OptimizerKind(
    "torch.optim:SGD",
    weights="fp32",
    state_bytes=lambda itemsize: itemsize,
    defaults={"momentum": 0.9, "weight_decay": 0.125},
)


def test_a_new_flavour_is_planned_and_opened(monkeypatch, write_config):
    record = replace(FLAVOURS["dev"], takes_guidance=False, text_tokens=128, in_channels=128)
    monkeypatch.setitem(FLAVOURS, "klein", record)
    config = load_config(write_config(model_flavour="klein"))
    workload = workload_of(config, BatchShape((1024, 1024), 1, "images"))
    assert workload.text_tokens == 128 and not workload.sizes.guidance_embeds
    with pytest.raises(CheckpointError, match="128"):
        open_base(config)


def test_without_its_record_an_optimiser_is_refused(write_config):
    with pytest.raises(ConfigError, match=r"must be 'adamw_bf16', 'torch-adamw', .* or 'prodigy'"):
        load_config(write_config(optimizer="momentum"))
    # planned and benchmarked, but no choice of a config
    with pytest.raises(ConfigError, match=r"must be 'adamw_bf16', 'torch-adamw', .* or 'prodigy'"):
        load_config(write_config(optimizer="adamw8bit"))


def test_a_new_record_is_an_optimiser(monkeypatch, run, write_config, tmp_path):
    monkeypatch.setitem(OPTIMIZERS, "momentum", MOMENTUM)
    settings = {"optimizer": "momentum", "max_train_steps": 2, "learning_rate": 0.5}
    lora, _ = run(**settings)
    assert any(tensor.any() for key, tensor in load_file(lora).items() if "lora_B" in key)
    saved = state.load_checkpoint(tmp_path / "output" / "checkpoint-2")
    (group,) = saved.optimizer["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.9, 0.125, 0.5)
    values = [tensor for key, tensor in saved.adapter.items() if key.endswith(".weight")]
    assert {tensor.dtype for tensor in values} == {torch.float32}
    # one tensor of state for each parameter, as the record says
    held = [t for s in saved.optimizer["state"].values() for t in s.values() if t is not None]
    elements = sum(tensor.numel() for tensor in values)
    assert sum(tensor.nbytes for tensor in held) == MOMENTUM.state_bytes(4) * elements

    # it goes on from its checkpoint, and weight decay is the config's where that says so
    _, out = run(**settings | {"max_train_steps": 3, "adam_weight_decay": 0.5})
    assert "resumed from" in out.getvalue()
    assert '"adam_weight_decay" was 0.125 and is 0.5 from step 3 on' in out.getvalue()


def test_the_plan_counts_a_new_optimisers_bytes(monkeypatch, write_config):
    monkeypatch.setitem(OPTIMIZERS, "momentum", MOMENTUM)

    def report(name):
        return plan_report(load_config(write_config(optimizer=name)), None)

    momentum, adamw = report("momentum"), report("torch-adamw")
    assert momentum["vram"]["optimiser"] * 2 == adamw["vram"]["optimiser"] > 0
    assert momentum["vram"]["optimiser"] == momentum["vram"]["adapters"]
    # values twice and one tensor of state, beside values twice and two moments
    assert momentum["disk"]["checkpoints"] * 4 == adamw["disk"]["checkpoints"] * 3


def test_it_needs_no_more_than_it_takes():
    with pytest.raises(ValueError, match="'torch-adamw' takes no momentum"):
        build_optimizer("torch-adamw", [torch.nn.Parameter(torch.ones(1))], lr=1, momentum=0.5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_record_tells_the_truth(name):
    """Its class is there and takes its defaults, and a step makes so many bytes of state."""
    kind = installed(name)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind.weights]
    assert dtype.itemsize == kind.itemsize
    # a factor of a LoRA, as a matrix: some keep a row and a column of it
    parameter = torch.nn.Parameter(torch.ones(16, 3072, dtype=dtype))
    optimizer = build_optimizer(name, [parameter], lr=1e-3)
    (group,) = optimizer.param_groups
    # torch-optimi keeps the betas one by one
    known = {key: value for key, value in kind.defaults.items() if key in group}
    assert {key: group[key] for key in known} == known
    assert known.keys() >= kind.defaults.keys() - {"betas", "max_precondition_dim"}
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # beside counters, and tables of what 8 or 4 bits mean
    paths = pytree.tree_leaves_with_path(optimizer.state_dict()["state"])
    held = [
        t for path, t in paths if torch.is_tensor(t) and t.numel() > 1 and "qmap" not in str(path)
    ]
    counted = kind.state_bytes(kind.itemsize) * parameter.numel()
    # what belongs to a row or a column is left out: a sixteenth of this thin factor
    factored = parameter.nbytes / 15 if name in ("torch-adafactor", "prodigy", "soap") else 0
    assert 0 <= sum(tensor.nbytes for tensor in held) - counted <= factored


def test_what_the_options_say_of_their_defaults_is_what_optimisers_have():
    """A field's default is torch's AdamW's, and adamw_bf16 differs in epsilon alone."""
    fields = TrainFields.model_fields
    betas = fields["adam_beta1"].default, fields["adam_beta2"].default
    defaults = {"betas": betas, "weight_decay": fields["adam_weight_decay"].default}
    eps = fields["adam_epsilon"].default
    assert OPTIMIZERS["torch-adamw"].defaults == {**defaults, "eps": eps}
    assert OPTIMIZERS["adamw_bf16"].defaults == {**defaults, "eps": 1e-6}
