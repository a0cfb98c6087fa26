"""What a config becomes under a vram_budget, and what of it the plan sees."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from config_helpers import load
from fluxfast.config.settings import ConfigError
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.plan import GIB, account
from fluxfast.train.budget import (
    Batch,
    budget_bytes,
    compute_of,
    settle,
    stated_choices,
    usable_bytes,
    within_budget,
    workload_of,
)

BATCH = Batch((1024, 1024), 1, "images")
FLUX = {
    "model_flavour": "dev",
    "flux_lora_target": "all+ffs",
    "lora_rank": 16,
    "train_batch_size": 1,
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_workload_is_the_configs():
    route = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}
    w = workload_of(load(**FLUX, tread_config=route, optimizer="torch-adamw"), BATCH, "same")
    assert w.tokens == (4608, 4608, *[2560] * 54, 4608)
    assert w.adapter_itemsize == 4
    assert w.adapters == 65_372_160 + 16 * (3072 + 64)
    quantised = workload_of(load(**FLUX, base_model_precision="nf4-bnb"), BATCH, "int8")
    assert (quantised.storage.format, quantised.compute, quantised.adapter_itemsize) == (
        "nf4",
        "int8",
        2,
    )
    schnell = workload_of(load(model_flavour="schnell", flux_fast_schedule=True), BATCH, "same")
    assert schnell.text_tokens == 256 and not schnell.sizes.guidance_embeds


@pytest.mark.parametrize(
    ("keys", "recompute"),
    [
        ({}, {"full": 57}),
        ({"gradient_checkpointing": False}, {"none": 57}),
        ({"gradient_checkpointing_interval": 2}, {"full": 29, "none": 28}),
        ({"recompute": "selective"}, {"selective": 57}),
    ],
)
def test_stated_choices(keys, recompute):
    config = load(**FLUX, **keys)
    choices = stated_choices(config, workload_of(config, BATCH, "same"))
    assert {
        policy: choices.recompute.count(policy) for policy in set(choices.recompute)
    } == recompute
    assert choices.modulation_ahead and not choices.streams


def test_a_lora_on_modulation_keeps_it_on_the_device():
    config = load(**{**FLUX, "flux_lora_target": "ai-toolkit"})
    workload = workload_of(config, BATCH, "same")
    assert workload.trains_modulation
    assert not stated_choices(config, workload).modulation_ahead


def test_streaming_is_seen():
    config = load(**FLUX, enable_group_offload=True, group_offload_blocks_per_group=2)
    choices = stated_choices(config, workload_of(config, BATCH, "same"))
    assert (choices.slots, choices.blocks_per_group, choices.host_inputs) == (2, 2, False)
    config = load(**FLUX, enable_group_offload=True, group_offload_use_stream=True)
    assert stated_choices(config, workload_of(config, BATCH, "same")).host_inputs


@pytest.mark.parametrize(
    ("keys", "gpu", "compute"),
    [
        ({}, "RTX 4090", "same"),
        ({"base_model_precision": "int4-quanto"}, "RTX 4090", "int8"),
        ({"base_model_precision": "fp8-quanto"}, "RTX 4090", "e4m3"),
        ({"base_model_precision": "fp8-quanto"}, "RTX 3090", "same"),
        ({"base_model_precision": "int8-quanto", "compute_precision": "same"}, "RTX 4090", "same"),
        ({"compute_precision": "fp8"}, "RTX 4090", "e4m3"),
    ],
)
def test_what_products_run_in(keys, gpu, compute):
    assert compute_of(load(**FLUX, **keys), find_gpu(gpu)) == compute


def test_a_budget_settles_the_config():
    config = load(**FLUX, base_model_precision="int8-quanto", vram_budget=7)
    gpu = find_gpu("RTX 4090")
    workload = workload_of(config, BATCH, "int8")
    assert budget_bytes(config, gpu.memory) == 7 * GIB
    settled, ring, told = settle(config, workload, gpu, 7 * GIB)
    assert settled.enable_group_offload and settled.group_offload_use_stream and ring.slots >= 2
    assert len(settled.recompute) == 57 and set(settled.recompute) <= {"none", "selective", "full"}
    # the plan of the settled config is the one that was chosen, and fits
    chosen = replace(
        stated_choices(settled, workload), slots=ring.slots, host_inputs=ring.inputs_on_host
    )
    assert account(workload, chosen).needed <= 7 * GIB
    assert "streamed through a ring of" in told
    # all else stays as it was
    changed = {"recompute", "enable_group_offload", "group_offload_use_stream"}
    assert settled.model_dump(exclude=changed) == config.model_dump(exclude=changed)

    roomy, _, told = settle(config, workload, gpu, 80 * GIB)
    assert not roomy.enable_group_offload and set(roomy.recompute) == {"none"}
    assert "resident" in told


def test_a_budget_that_nothing_keeps():
    config = load(**FLUX, vram_budget=2)
    with pytest.raises(ConfigError, match=r"(?s)at the least.*int4-quanto"):
        settle(config, workload_of(config, BATCH, "same"), find_gpu("RTX 4090"), 2 * GIB)


def test_on_a_cpu_a_budget_says_that_it_does_nothing(capsys):
    config = load(**FLUX, vram_budget="auto")
    settled, _ = within_budget(config, [(512, 512)], torch.device("cpu"), Console())
    assert settled is config
    assert "no effect" in capsys.readouterr().out
    assert budget_bytes(config, 24) == usable_bytes(24) < 24 * GIB


@pytest.mark.parametrize("value", ["some", 0, -3, [8]])
def test_a_budget_is_a_size(value):
    with pytest.raises(ConfigError, match=r"vram_budget.*GiB"):
        load(vram_budget=value)
