"""`choose` by itself: what the wishes and the facts come to, each with its reason, and what is set.

That trainer, plan and `accelerate` come to the same is in tests/train/test_same_choices.py.
"""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from fluxfast.memory import gpus
from fluxfast.memory.budget import unsupported
from fluxfast.memory.choices import Facts, OverBudget, Refused, choose, lacking, refusals
from fluxfast.memory.gpus import find_gpu, this_gpu
from fluxfast.memory.plan import GIB, account
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.memory.wishes import Wishes
from fluxfast.model.apply import Choices, apply, make_ready
from fluxfast.model.compiled import Compile
from fluxfast.ops import verdicts
from fluxfast.quant import FORMATS
from small_flux import small_flux

H100, AMPERE = find_gpu("H100"), find_gpu("RTX 3090")
CUDA = torch.device("cuda")
# what the reason for streaming tells of
STREAMING = {"slots", "blocks_per_group", "use_stream", "host_inputs"}


@pytest.fixture(autouse=True)
def no_verdicts():
    yield
    verdicts.set_failed({})


def facts(format=None, gpu=H100, **known):
    return Facts(blocks=3, format=format, gpu=gpu, **known)


def test_every_choice_has_its_reason():
    choices = choose(Wishes(checkpoint_every=1), facts())
    told = {
        *("compute", "recompute", "streaming", "transposed_codes"),
        *("modulation_ahead", "graphs", "attention", "compile"),
    }
    assert choices.reasons.keys() == told and all(choices.reasons.values())
    # outliers are the user's alone, and `attention` tells what is deterministic
    covered = told | STREAMING | {"outliers", "deterministic", "reasons"}
    assert {field.name for field in fields(Choices)} <= covered


@pytest.mark.parametrize("format", FORMATS)
def test_bases_whose_products_auto_runs_in_8_bits(format):
    everything, accelerates = Wishes(), Wishes(eight_bit_bases=("int8",))
    compute = "e4m3" if format == "fp8_e4m3" else "int8"
    assert choose(everything, facts(format)).compute == compute
    careful = choose(accelerates, facts(format))
    assert careful.compute == ("int8" if format == "int8" else "same")
    if format != "int8":
        assert careful.reasons["compute"] == "the base is not stored in int8"
    for wishes in (everything, accelerates):
        assert choose(wishes, facts(format, gpu=None)).compute == "same"
    for impl in ("native", "ref"):
        choices = choose(Wishes(impl=impl), facts(format))
        assert choices.compute == "same" and impl in choices.reasons["compute"]


def test_recomputation():
    assert choose(Wishes(), facts()).recompute == ()
    assert choose(Wishes(checkpoint_every=0), facts()).recompute == ("none",) * 3
    assert choose(Wishes(checkpoint_every=2), facts()).recompute == ("full", "none", "full")
    own = ("none", "selective", "full")
    assert choose(Wishes(recompute=own, checkpoint_every=1), facts()).recompute == own
    assert choose(Wishes(recompute="full"), facts()).recompute == ("full",) * 3


def test_orders_that_the_machine_can_not_follow():
    wishes = Wishes(compute="e4m3", cuda_graphs=True, streams=True)
    assert not refusals(wishes, H100)
    assert len(refusals(wishes, AMPERE)) == 1 and len(refusals(wishes, None)) == 1
    verdicts.set_failed({(verdicts.STREAMING, verdicts.ONLY_WAY): "wrong"})
    with pytest.raises(Refused) as refused:
        choose(wishes, facts(gpu=AMPERE))
    compute, streaming = refused.value.problems
    assert compute.startswith('"compute_precision" is fp8, but RTX 3090 has no tensor cores')
    assert streaming.startswith('"enable_group_offload" is true, but it failed its check')


def test_a_budget_says_what_would_help():
    work = Workload(
        sizes=FluxSizes(),
        tokens=(4608,) * 57,
        text_tokens=512,
        batch=2,
        storage=Storage(None),
        targets=("to_q",),
        rank=16,
    )
    known = facts(workload=work)
    with pytest.raises(OverBudget) as over:
        choose(Wishes(vram_budget=2), known)
    for part in ("at the least", "train_batch_size", "int8-quanto", "half the tokens"):
        assert any(part in line for line in over.value.lines)
    # without a GPU there is nothing to keep to
    assert not choose(Wishes(vram_budget=2), facts(gpu=None, workload=work)).streams


@pytest.fixture
def int8_at_1024px():
    return Workload(
        sizes=FluxSizes(),
        tokens=(4608,) * 57,
        text_tokens=512,
        batch=1,
        storage=Storage("int8"),
        targets=("to_q",),
        rank=16,
        compute="int8",
    )


def test_transposed_codes_where_dgrad_reads_them_and_there_is_room(int8_at_1024px):
    known = facts("int8", workload=int8_at_1024px)
    choices = choose(Wishes(recompute="full"), replace(known, blocks=57))
    assert choices.transposed_codes and "dgrad reads it" in choices.reasons["transposed_codes"]
    with_copy = account(int8_at_1024px, choices).needed
    without = account(int8_at_1024px, replace(choices, transposed_codes=False)).needed
    # FLUX.1's blocks without modulation, a byte a weight; dgrad makes itself no copies then
    assert 8 * GIB < int8_at_1024px.product_codes < 8.1 * GIB
    assert with_copy - without < 1.03 * int8_at_1024px.product_codes + 512
    # without a budget some room is left for what graphs keep
    for free, taken in ((1.26 * with_copy, True), (1.24 * with_copy, False)):
        choices = choose(
            Wishes(recompute="full", vram_reserve=0), replace(known, blocks=57, free=round(free))
        )
        assert choices.transposed_codes == taken
    assert "more than 80%" in choices.reasons["transposed_codes"]


@pytest.mark.parametrize(("budget", "taken"), [(60, True), (30, False), (7, False)])
def test_transposed_codes_by_a_budget(int8_at_1024px, budget, taken):
    """Recomputation costs more than transposing, so that a copy is what goes first."""
    known = facts("int8", workload=int8_at_1024px)
    choices = choose(Wishes(vram_budget=budget), known)
    assert choices.transposed_codes == taken
    assert choices.streams == (budget == 7)
    assert choices.streams or set(choices.recompute) == {"none"}
    assert account(int8_at_1024px, choices).needed <= budget * GIB


@pytest.mark.parametrize(
    ("format", "gpu", "wishes", "because"),
    [
        ("int8", H100, Wishes(compute="same"), "products run on values"),
        ("int8", H100, Wishes(compute="e4m3"), "made in each step"),
        ("nf4", H100, Wishes(), "made in each step"),
        (None, H100, Wishes(compute="int8"), "made in each step"),
        ("int8", AMPERE, Wishes(), "in the order that they are stored in"),
        ("int8", None, Wishes(compute="int8"), "in the order that they are stored in"),
        ("int8", H100, Wishes(streams=True), "blocks are streamed"),
    ],
)
def test_no_transposed_codes(format, gpu, wishes, because, int8_at_1024px):
    work = replace(int8_at_1024px, storage=Storage(format))
    known = replace(facts(format, gpu, workload=work), blocks=57)
    choices = choose(replace(wishes, recompute="full"), known)
    assert not choices.transposed_codes
    assert because in choices.reasons["transposed_codes"]


def test_transposed_codes_where_nobody_knows_what_a_step_takes():
    for free, taken in ((41, True), (39, False)):
        known = facts("int8", free=free * GIB, codes=10 * GIB)
        choices = choose(Wishes(vram_reserve=0), known)
        assert choices.transposed_codes == taken
        assert choices.reasons["transposed_codes"].endswith(f"25% of {free}.00 GiB")


def test_what_is_set_on_blocks():
    model = small_flux("int8", ["to_q"]).eval()
    policies = ("none", "selective", "full", "full", "none")
    choices = Choices(policies, compute="int8", outliers=2, attention="ref", modulation_ahead=True)
    make_ready(model, choices)
    for block, policy in zip(model.blocks, policies, strict=True):
        assert (block.compute, block.outliers, block.attention) == ("int8", 2, "ref")
        assert block.policy == policy and block.fixed_policy
    assert model.training and model.modulation is not None and model.recompute == [*policies]
    make_ready(model, Choices(policies))
    assert model.modulation is None and model.blocks[0].compute == "same"
    blocks = [SimpleNamespace(), SimpleNamespace()]
    apply(blocks, Choices(()))
    assert not any(block.fixed_policy or block.policy != "none" for block in blocks)
    with pytest.raises(ValueError, match="shorter"):
        apply(blocks, Choices(("full",)))


@pytest.mark.parametrize(
    ("name", "capability", "products"),
    [
        ("NVIDIA GeForce RTX 3090", (8, 6), {"same", "int8"}),
        ("NVIDIA H100 80GB HBM3", (9, 0), {"same", "int8", "e4m3"}),
        ("Tesla T4", (7, 5), set()),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), {"same", "int8", "e4m3"}),
        # not in the table
        ("Tesla V100-SXM2-16GB", (7, 0), set()),
        ("NVIDIA RTX 4000 Ada Generation", (8, 9), {"same", "int8", "e4m3"}),
    ],
)
def test_this_machines_gpu(monkeypatch, name, capability, products):
    properties = SimpleNamespace(name=name, total_memory=15 << 30, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = this_gpu(CUDA)
    assert gpu.memory == 15 and gpu.multiprocessors == 40
    assert {compute for compute in ("same", "int8", "e4m3") if gpu.rate(compute)} == products
    assert gpu.bandwidth and gpu.pcie
    assert (unsupported(gpu) is None) == ("same" in products)
    assert gpu.name == name or find_gpu(gpu.name) == find_gpu(name)
    assert gpu.screen == ("RTX" in name or "V100" in name)
    assert gpus.this_gpu(torch.device("cpu")) is None


def test_torch_compile(int8_at_1024px):
    assert choose(Wishes(), facts()).compile is None
    around, blocks = Compile(), Compile(blocks=True)
    for how in (around, blocks):
        choices = choose(Wishes(compile=how, checkpoint_every=1), facts())
        assert choices.compile == how and choices.graphs
    for order in ({"streams": True}, {"vram_budget": 80}, {"recompute": "selective"}):
        known = {"workload": int8_at_1024px} if "vram_budget" in order else {}
        assert choose(Wishes(compile=around, **order), facts(**known)).compile == around
        with pytest.raises(Refused, match="dynamo_use_regional_compilation"):
            choose(Wishes(compile=blocks, **order), facts(**known))


def test_modes_that_record_graphs_of_their_own():
    for mode in ("reduce-overhead", "max-autotune"):
        for wishes in (
            Wishes(compile=Compile(mode=mode)),
            Wishes(draws_compiled=Compile(mode=mode)),
        ):
            (line,) = refusals(wishes, H100)
            assert f'"dynamo_mode" is {mode}' in line and "cuda_graphs" in line
            assert not refusals(wishes, None)
    assert choose(Wishes(compile=Compile(mode="max-autotune-no-cudagraphs")), facts()).graphs


def test_a_compiler_that_is_missing_is_told_before(monkeypatch):
    wishes = Wishes(compile=Compile())
    assert not lacking(wishes, "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = lacking(wishes, "cpu")
    assert "no-such-compiler" in line and '"no"' in line and "dynamo_backend" in line
    assert not lacking(Wishes(compile=Compile("aot_eager")), "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton" in lacking(wishes, "cuda")[0]
    (line,) = lacking(Wishes(mechanism="sageattention"), "cuda")
    assert "pip install sageattention" in line
