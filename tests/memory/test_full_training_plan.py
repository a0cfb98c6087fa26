"""What full training takes, and that it is refused where it can't fit."""

from types import SimpleNamespace

import pytest
import torch

from fluxfast.cli.plan_report import plan_report
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.memory import gpus
from fluxfast.memory.full_training import why_not
from fluxfast.memory.plan import account
from fluxfast.memory.sizes import FluxSizes
from fluxfast.memory.wishes import wishes_of
from fluxfast.model.apply import Choices
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.choose import BatchShape, choose, facts_of, too_large, workload_of

DEV = {
    "model_type": "full",
    "model_family": "flux",
    "model_flavour": "dev",
    "data_backend_config": "unset",
    "max_train_steps": 10,
    "num_train_epochs": 0,
}
SIZES = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
}


def base(sizes):
    return SimpleNamespace(config=sizes, quantized=None)


@pytest.mark.parametrize(("optimizer", "itemsize"), [("adamw_bf16", 2), ("torch-adamw", 4)])
def test_a_plan_counts_every_parameter_of_the_model(optimizer, itemsize):
    config = TrainConfig.model_validate(DEV | {"optimizer": optimizer})
    workload = workload_of(config, BatchShape((64, 64), 2, "x"), base(SIZES))
    with torch.device("meta"):
        model = FluxTransformer(**SIZES, axes_dims_rope=(4, 14, 14))
    count = sum(p.numel() for p in model.parameters())
    assert workload.adapters == count
    plan = account(workload, Choices(("none",) * 5)).vram
    assert plan["weights"] + plan["modulation"] == itemsize * count
    # the buffer, and autograd's own
    assert plan["gradients"] == 2 * itemsize * count
    assert plan["optimiser"] == 2 * itemsize * count
    assert plan["adapters"] == 0
    recomputed = account(workload, Choices(("full",) * 5)).vram
    assert 0 < recomputed["saved activations"] < plan["saved activations"]


def test_flux_dev_is_refused_by_a_card_of_24_gib():
    config = TrainConfig.model_validate(DEV)
    workload = workload_of(config, BatchShape((512, 512), 1, "x"))
    assert workload.adapters == 11_901_408_320
    facts = facts_of(config, workload, gpus.find_gpu("RTX 4090"))
    with pytest.raises(ConfigError, match=r"11\.90 billion parameters take 110\.8 GiB before"):
        choose(wishes_of(config), facts)


def test_a_small_model_fits_and_a_large_one_not_in_the_memory_of_the_machine(monkeypatch):
    config = TrainConfig.model_validate(DEV)
    assert too_large(config, base(SIZES), torch.device("cpu")) is None
    monkeypatch.setattr(
        "fluxfast.train.choose.psutil.virtual_memory", lambda: SimpleNamespace(total=64 << 30)
    )
    problem = too_large(config, base(vars(FluxSizes())), torch.device("cpu"))
    assert problem is not None and "this machine has 64.0" in problem
    workload = workload_of(config, BatchShape((64, 64), 1, ""), base(vars(FluxSizes())))
    assert why_not(workload, Choices(("full",) * 57), 200 << 30, "it") is None


def test_choices_of_full_training_leave_out_what_takes_the_base_for_frozen():
    config = TrainConfig.model_validate(DEV)
    workload = workload_of(config, BatchShape((64, 64), 2, "x"), base(SIZES))
    chosen = choose(wishes_of(config), facts_of(config, workload, gpus.find_gpu("H100")))
    assert not chosen.modulation_ahead and not chosen.graphs and not chosen.streams
    assert "the run trains it" in chosen.reasons["modulation_ahead"]


def test_the_plans_report_says_that_it_does_not_fit():
    report = plan_report(TrainConfig.model_validate(DEV), "RTX 4090")
    assert report["fits"] is False and report["trained"]["rank"] is None
    assert "step" not in report and not report["changes"]["possible"]
    assert "train a smaller transformer" in report["changes"]["why"][0]
