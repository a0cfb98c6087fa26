"""The plan's parts: sizes against real modules, GPUs by name, step times against known ones, and
what a budget chooses.
"""

from dataclasses import replace

import pytest
import torch

from fluxfast.adapters.presets import PRESETS, is_target, preset_targets
from fluxfast.memory.gpus import GPUS, find_gpu
from fluxfast.memory.plan import GIB, Choices, account, fit, policies, predict
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model

SMALL = FluxSizes(1, 2, 2, 32, 16, 24, 20, True)
FULL = ("full",) * 57


def workload(tokens=4608, **changes):
    given = {
        "sizes": FluxSizes(),
        "tokens": (tokens,) * 57,
        "text_tokens": 512,
        "batch": 1,
        "storage": Storage(None),
        "targets": preset_targets("all+ffs"),
        "rank": 16,
    }
    return Workload(**(given | changes))


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("guidance", [True, False])
def test_sizes_are_those_of_a_model(format, guidance):
    sizes = replace(SMALL, guidance_embeds=guidance)
    model = FluxTransformer(**vars(sizes), axes_dims_rope=(4, 14, 14)).to(torch.bfloat16)
    linears = {
        n: (m.out_features, m.in_features)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert {
        linear.name: (linear.out_features, linear.in_features) for linear in sizes.linears()
    } == linears
    if format is not None:
        quantize_model(model, FORMATS[format])
    tensors = [*model.parameters(), *model.buffers()]
    w = workload(sizes=sizes, storage=Storage(format), tokens=(20,) * 3)
    assert w.frozen_bytes == sum(t.nbytes for t in tensors)
    assert FluxSizes.from_config(dict(model.config)) == sizes


@pytest.mark.parametrize("name", PRESETS)
def test_targets_match_as_pefts_do(name):
    preset = PRESETS[name]
    assert (
        sum(is_target(linear.name, preset.targets) for linear in FluxSizes().linears())
        == preset.modules
    )


def test_flux_is_as_large_as_it_is():
    w = workload()
    weights = sum(linear.out_features * (linear.in_features + 1) for linear in w.sizes.linears())
    assert weights + sum(map(w.sizes.norms, range(57))) == 11_901_408_320
    # rank 16 on every linear of the blocks, and on the last one
    assert w.adapters == 65_372_160 + 16 * (3072 + 64)
    assert sum(w.modulation_weights) == 3_228_567_552 * 2
    assert w.modulation_vectors == 2 * (19 * 12 + 38 * 3 + 2) * 3072


def test_gradients_of_several_micro_batches_lie_beside_their_sum():
    choices = Choices(("full",) * 57)
    one, several = (account(workload(micro_batches=n), choices).vram for n in (1, 4))
    assert one["gradients"] == 2 * workload().adapters
    assert several == one | {"gradients": 2 * one["gradients"]}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 3080", "RTX 3080"),
        ("rtx3080", "RTX 3080"),
        ("3080 12 GB", "RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("RTX 4060 Ti", "RTX 4060 Ti 8GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("nvidia geforce rtx 2080 super", "RTX 2080 SUPER"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("rtx 3080 mobile 16gb", "RTX 3080 Laptop 16GB"),
        ("5060ti 16 gb", "RTX 5060 Ti 16GB"),
        ("Tesla T4", "T4"),
    ],
)
def test_gpus_by_any_name(name, found):
    assert find_gpu(name).name == found


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RTX 4900", "RTX 4090"),
        ("nvidia geforce rtx4900", "RTX 4090"),
        ("RTX 3085", "RTX 3080"),
        ("4090 Ti", "RTX 4090"),
        ("5070 laptp", "RTX 5070 Laptop"),
        ("H1000", "H100"),
        ("4080 32GB", "RTX 4080"),
    ],
)
def test_a_gpu_that_is_not_in_the_table(name, near):
    with pytest.raises(ValueError, match=rf"'{name}'.*did you mean.*{near}"):
        find_gpu(name)


def test_a_name_that_is_like_no_other():
    with pytest.raises(ValueError, match="no name in it is like that one"):
        find_gpu("Voodoo")


def test_the_table_is_consistent():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert find_gpu(gpu.name) == gpu
        assert gpu.source
        # GeForce and Radeon cards and the workstations' are for screens
        assert gpu.screen == (gpu.name.startswith(("RTX", "RX")))
        # 8-bit products are never slower, and at most four times as fast
        assert gpu.bf16 <= gpu.int8 <= 4.1 * gpu.bf16
        assert (gpu.bf16 == 0) == (gpu.arch == "sm_75")
        assert gpu.fp8 <= gpu.int8


def test_parts_add_up_and_move():
    w = workload(storage=Storage("int8"), compute="int8")
    resident, ahead, streamed, put_aside = (
        account(w, Choices(FULL, **given))
        for given in (
            {},
            {"modulation_ahead": True},
            {"slots": 3},
            {"slots": 3, "host_inputs": True},
        )
    )
    assert resident.peak == sum(resident.vram.values()) - resident.vram["CUDA context"]
    assert ahead.host["modulation"] == sum(w.modulation_weights) + w.outer_modulation_weights
    assert resident.peak - ahead.peak == ahead.host["modulation"] - w.modulation_vectors
    largest = w.block_weights[0] + w.modulation_weights[0]
    assert streamed.vram["ring"] == 3 * largest
    assert streamed.host["streamed blocks"] == sum(w.block_weights) + sum(w.modulation_weights)
    assert put_aside.host["blocks' inputs"] == 57 * 4608 * 3072 * 2
    assert put_aside.peak < streamed.peak - GIB
    assert streamed.needed > streamed.peak + streamed.vram["CUDA context"]


def test_more_recomputation_takes_less_memory_and_more_time():
    w, gpu = workload(), find_gpu("H200")
    needed = [
        account(w, Choices((policy,) * 57)).needed for policy in ("none", "selective", "full")
    ]
    seconds = [
        predict(w, Choices((policy,) * 57), gpu).total for policy in ("none", "selective", "full")
    ]
    assert needed == sorted(needed, reverse=True)
    assert seconds == sorted(seconds)
    made = list(policies(3))
    assert made[0] == ("none",) * 3 and made[-1] == ("full",) * 3 and len(made) == 7
    kept = [account(w, Choices(p)).vram["saved activations"] for p in policies(57)]
    assert kept == sorted(kept, reverse=True)


def test_tread_takes_less():
    tokens = tuple(4608 if i in (0, 1, 55, 56) else 2560 for i in range(57))
    plain = workload()
    routed = replace(plain, tokens=tokens)
    assert account(routed, Choices(FULL)).peak < account(plain, Choices(FULL)).peak
    gpu = find_gpu("H200")
    assert (
        predict(plain, Choices(FULL), gpu).total > 1.6 * predict(routed, Choices(FULL), gpu).total
    )


@pytest.mark.parametrize("budget", [6, 9, 12, 16, 24, 40, 80])
def test_a_budget_is_kept_and_used(budget):
    w, gpu = workload(storage=Storage("int8"), compute="int8"), find_gpu("RTX 4090")
    choices = fit(w, gpu, budget * GIB)
    assert account(w, choices).needed <= budget * GIB
    time = predict(w, choices, gpu).total
    larger = fit(w, gpu, (budget + 4) * GIB)
    assert predict(w, larger, gpu).total <= time


def test_what_a_budget_chooses():
    w, gpu = workload(storage=Storage("int8"), compute="int8"), find_gpu("RTX 4090")
    roomy = fit(w, gpu, 80 * GIB)
    assert set(roomy.recompute) == {"none"} and not roomy.streams
    tight = fit(w, gpu, 6 * GIB)
    assert tight.streams
    assert fit(w, gpu, 2 * GIB) is None
