"""What a run's config makes of a step's work, and what the run then chooses and says."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from config_helpers import load
from fluxfast.config.settings import ConfigError
from fluxfast.memory.budget import budget_bytes, usable_bytes
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.plan import GIB, account
from fluxfast.memory.wishes import wishes_of
from fluxfast.train.build import use_deterministic_algorithms
from fluxfast.train.choose import BatchShape, choose, facts_of, tell_budget, workload_of

BATCH = BatchShape((1024, 1024), 1, "images")
FLUX = {
    "model_flavour": "dev",
    "flux_lora_target": "all+ffs",
    "lora_rank": 16,
    "train_batch_size": 1,
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def chosen(gpu="RTX 4090", free=None, **keys):
    """What a run with these keys chooses on that GPU (None: on a CPU)."""
    config = load(**FLUX | keys)
    facts = facts_of(config, workload_of(config, BATCH), find_gpu(gpu) if gpu else None)
    return choose(wishes_of(config), replace(facts, free=free))


def test_the_workload_is_the_configs():
    route = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}
    w = workload_of(load(**FLUX, tread_config=route, optimizer="torch-adamw"), BATCH)
    assert w.tokens == (4608, 4608, *[2560] * 54, 4608)
    assert w.adapter_itemsize == 4
    assert w.adapters == 65_372_160 + 16 * (3072 + 64)
    quantised = workload_of(load(**FLUX, base_model_precision="nf4-bnb"), BATCH)
    assert (quantised.storage.format, quantised.adapter_itemsize) == ("nf4", 2)
    schnell = workload_of(load(model_flavour="schnell", flux_fast_schedule=True), BATCH)
    assert schnell.text_tokens == 256 and not schnell.sizes.guidance_embeds


def test_a_base_that_is_there_says_what_it_is(tmp_path):
    """Its sizes, and the format of a file that fluxfast has quantised, whatever the config says."""
    from fluxfast import FluxTransformer
    from fluxfast.checkpoint.opening import open_checkpoint, open_single_file
    from fluxfast.quant import FORMATS
    from support import SMALL

    FluxTransformer(**SMALL).save_pretrained(tmp_path / "transformer")
    base = open_checkpoint(tmp_path / "transformer")
    config = load(**FLUX)
    blocks = SMALL["num_layers"] + SMALL["num_single_layers"]
    workload = workload_of(config, BATCH, base)
    assert (workload.sizes.blocks, workload.storage.format) == (blocks, None)
    base.quantize(FluxTransformer, tmp_path / "int4.safetensors", FORMATS["int4"])
    workload = workload_of(config, BATCH, open_single_file(tmp_path / "int4.safetensors"))
    assert (workload.sizes.blocks, workload.storage.format) == (blocks, "int4")
    assert choose(wishes_of(config), facts_of(config, workload, find_gpu("H100"))).compute == "int8"


@pytest.mark.parametrize(
    ("keys", "recompute"),
    [
        ({}, {"full": 57}),
        ({"gradient_checkpointing": False}, {"none": 57}),
        ({"gradient_checkpointing_interval": 2}, {"full": 29, "none": 28}),
        ({"recompute": "selective"}, {"selective": 57}),
    ],
)
def test_recomputation_is_the_configs(keys, recompute):
    choices = chosen(**keys)
    counts = {policy: choices.recompute.count(policy) for policy in set(choices.recompute)}
    assert counts == recompute
    assert choices.modulation_ahead and not choices.streams


def test_a_lora_on_modulation_keeps_it_on_the_device():
    choices = chosen(flux_lora_target="ai-toolkit")
    assert not choices.modulation_ahead
    assert "the LoRA trains it" in choices.reasons["modulation_ahead"]
    # under a budget, too, which then counts it
    assert not chosen(flux_lora_target="ai-toolkit", vram_budget=12).modulation_ahead
    assert not chosen(modulation_ahead=False, vram_budget=12).modulation_ahead


def test_streaming_is_the_configs():
    choices = chosen(enable_group_offload=True, group_offload_blocks_per_group=2)
    assert (choices.slots, choices.blocks_per_group, choices.host_inputs) == (2, 2, False)
    assert not choices.use_stream
    choices = chosen(enable_group_offload=True, group_offload_use_stream=True)
    assert choices.use_stream and choices.host_inputs


@pytest.mark.parametrize(
    ("keys", "gpu", "compute"),
    [
        ({}, "RTX 4090", "same"),
        ({"base_model_precision": "int8-quanto"}, "H100", "int8"),
        ({"base_model_precision": "int4-quanto"}, "RTX 4090", "int8"),
        ({"base_model_precision": "fp8-quanto"}, "RTX 4090", "e4m3"),
        ({"base_model_precision": "fp8-quanto"}, "RTX 3090", "same"),
        ({"base_model_precision": "int8-quanto", "compute_precision": "same"}, "RTX 4090", "same"),
        ({"compute_precision": "int8"}, "RTX 3090", "int8"),
        ({"compute_precision": "fp8", "base_model_precision": "int8-quanto"}, "RTX 4090", "e4m3"),
        ({"base_model_precision": "int8-quanto"}, None, "same"),
        # emulated, for who asks for it
        ({"compute_precision": "int8"}, None, "int8"),
        ({"compute_precision": "fp8"}, None, "e4m3"),
    ],
)
def test_what_products_run_in(keys, gpu, compute):
    choices = chosen(gpu, **keys)
    assert choices.compute == compute and choices.reasons["compute"]


def test_products_that_a_gpu_lacks_are_refused():
    with pytest.raises(ConfigError, match=r"is fp8, but RTX 3090 has no tensor cores for fp8"):
        chosen("RTX 3090", compute_precision="fp8")
    config = load(**FLUX, compute_precision="int8")
    # compute capability 7.0
    volta = find_gpu("RTX 3090")._replace(name="V100", int8=0)
    with pytest.raises(ConfigError, match=r"is int8, but V100 has no tensor cores for int8"):
        choose(wishes_of(config), facts_of(config, workload_of(config, BATCH), volta))


def test_a_budget_chooses():
    keys = {"base_model_precision": "int8-quanto", "vram_budget": 7}
    choices = chosen(**keys)
    assert choices.streams and choices.use_stream and choices.slots >= 2
    assert len(choices.recompute) == 57
    assert set(choices.recompute) <= {"none", "selective", "full"}
    workload = replace(workload_of(load(**FLUX, **keys), BATCH), compute="int8")
    assert account(workload, choices).needed <= 7 * GIB
    assert "streamed through a ring of" in choices.summary()
    assert "vram_budget 7.00 GiB: a step should take" in choices.reasons["recompute"]
    # a budget of all that is free has what is free
    roomy = chosen("H200", **keys | {"vram_budget": "auto"})
    assert not roomy.streams and set(roomy.recompute) == {"none"}
    assert "resident" in roomy.summary()
    assert chosen(free=8 * GIB, **keys | {"vram_budget": "auto", "vram_reserve": 1}) == choices


def test_a_budget_that_nothing_keeps():
    with pytest.raises(ConfigError, match=r"(?s)at the least.*int4-quanto"):
        chosen(vram_budget=2)


def test_what_is_said_of_a_budget():
    def told(gpu, **keys):
        config, out = load(**FLUX, **keys), io.StringIO()
        facts = facts_of(config, workload_of(config, BATCH), gpu)
        choices = choose(wishes_of(config), facts)
        tell_budget(choices, wishes_of(config), facts, Console(file=out, width=200))
        return choices, out.getvalue()

    without, said = told(None, vram_budget="auto")
    assert "no effect: there is no GPU" in said
    assert without == told(None)[0] and not told(None)[1]
    _, said = told(find_gpu("RTX 4090"), vram_budget=16.0)
    assert said.startswith("· vram_budget 16.00 GiB: a step should take ")
    assert "; blocks " in said
    wishes = wishes_of(load(**FLUX, vram_budget="auto"))
    rtx_4090 = find_gpu("RTX 4090")
    assert budget_bytes(wishes, rtx_4090) == usable_bytes(rtx_4090) == 22.75 * GIB


def test_what_is_left_to_the_screen():
    """A card for screens has more left free than one without, and the user's word goes first."""
    for name, asked, left in (
        ("RTX 4090", None, 1),
        ("RTX 5070 Laptop", None, 1),
        ("H100", None, 0.25),
        ("RTX 4090", 0, 0),
        ("H100", 2.5, 2.5),
    ):
        gpu, config = find_gpu(name), load(**FLUX, vram_budget="auto", vram_reserve=asked)
        wishes = wishes_of(config)
        # the driver keeps a quarter of a GiB for itself; what is free in a run is known
        assert budget_bytes(wishes, gpu) == (gpu.memory - 0.25 - left) * GIB
        assert budget_bytes(wishes, gpu, free=5 * GIB) == (5 - left) * GIB
        assert budget_bytes(wishes, gpu, free=0) == 0
        by_number = replace(wishes, vram_budget=7.5)
        assert budget_bytes(by_number, gpu, free=5 * GIB) == 7.5 * GIB


@pytest.mark.parametrize("value", ["some", 0, -3, [8]])
def test_a_budget_is_a_size(value):
    with pytest.raises(ConfigError, match=r"vram_budget.*GiB"):
        load(vram_budget=value)


def test_deterministic(monkeypatch):
    on_cpu, on_gpu = chosen(None, deterministic=True), chosen("H100", deterministic=True)
    assert not on_cpu.deterministic and on_cpu.attention == "auto"
    # the one back end of PyTorch's whose backward has an order of its own
    assert on_gpu.deterministic and on_gpu.attention == "flash"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        use_deterministic_algorithms()
        assert (
            torch.are_deterministic_algorithms_enabled()
            and not torch.utils.deterministic.fill_uninitialized_memory
        )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU every step is the same anyway")
def test_the_same_bits_on_a_gpu():
    from fluxfast.model.apply import Choices, make_ready
    from small_flux import small_flux
    from support import make_inputs

    def gradients():
        model = small_flux(targets=["to_q", "proj_mlp", "ff.net.2"], dtype=torch.bfloat16).cuda()
        make_ready(model, Choices(("none",) * len(model.blocks), attention="flash"))
        use_deterministic_algorithms()
        # flash attention takes 16 bits
        inputs = {
            name: x.cuda() if "ids" in name else x.cuda().bfloat16()
            for name, x in make_inputs(2, 20, 30).items()
        }
        model(**inputs).sample.float().square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    try:
        first = gradients()
        assert all(
            torch.equal(a, b) for _ in range(3) for a, b in zip(gradients(), first, strict=True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
