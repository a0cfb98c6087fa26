"""What trainers put around a model: compilers, autocast, scalers, accelerate and DDP."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from dropin_cases import counts, every_kind, hosts, hosts_with_peft, single_blocks
from dropin_hosts import (
    FP32,
    assert_equal,
    lora_parameters,
)
from host_adapters import KohyaLora, OneTrainerDora, ToolkitLora, adapted, trained_by
from torch.nn.parallel import DistributedDataParallel

import fluxfast
from support import make_inputs, relative_error

# 2^-8 a rounding, over every op of five blocks
BF16 = 2e-2
# AdamW divides by a gradient's own size: where that is rounding alone, a step goes either way
STEPPED = 1e-4


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


@pytest.fixture
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def first_sample(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize(
    ("kind", "make"),
    [("diffusers", OneTrainerDora), ("concatenated", ToolkitLora), ("bfl", KohyaLora)],
)
def test_a_compiled_model_with_a_trainers_adapters(inputs, kind, make, no_graphs):
    host, ours = hosts(kind)
    for model in (host, ours):
        adapted(model, make)
    report = fluxfast.accelerate(ours)
    compiled = torch.compile(ours, backend="eager")
    trained = trained_by(ours)
    assert_equal(
        host, compiled, inputs, trained=lambda m: trained if m is compiled else trained_by(m)
    )
    assert counts(report) == (0, 0, 0)
    # the same model as it is, afterwards
    assert_equal(host, ours, inputs, trained=trained_by)
    assert counts(report) == (5, 0, 0)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("diffusers", "peft"), ("diffusers", KohyaLora), ("concatenated", KohyaLora), ("bfl", "peft")],
)
def test_compiled_blocks(inputs, kind, adapter, no_graphs):
    """A block that is compiled alone is traced op by op; the others run fused."""
    host, ours = hosts_with_peft(kind) if adapter == "peft" else hosts(kind)
    if adapter != "peft":
        for model in (host, ours):
            adapted(model, adapter)
    trained = lora_parameters if adapter == "peft" else trained_by
    report = fluxfast.accelerate(ours)
    single_blocks(ours)[1].compile(backend="eager")
    assert_equal(host, ours, inputs, trained=trained)
    assert counts(report) == (4, 0, 0)


def test_repeated_blocks_with_a_trainers_adapters(inputs, no_graphs):
    """They are compiled before; that it may come after is tested with PEFT's."""
    host, ours = hosts("diffusers")
    for model in (host, ours):
        adapted(model, KohyaLora)
    ours.compile_repeated_blocks(backend="eager")
    report = fluxfast.accelerate(ours)
    assert_equal(host, ours, inputs, trained=trained_by)
    assert counts(report) == (0, 0, 0)
    assert "5 blocks compiled, whose calls are not counted" in str(report)


@pytest.fixture(params=[True, False], ids=["bf16 is the host's", "bf16 in fp32"])
def matrix_unit(request, monkeypatch):
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: request.param)


@every_kind
@pytest.mark.parametrize("adapter", ["peft", KohyaLora])
def test_a_step_under_autocast_with_a_scaler(inputs, kind, adapter, matrix_unit):
    """Scaled losses, clipped gradients, and a step that is left out after an infinite one."""
    pair = hosts_with_peft(kind) if adapter == "peft" else hosts(kind)
    results = []
    for model in pair:
        if adapter != "peft":
            adapted(model, adapter)
        if model is pair[1]:
            fluxfast.accelerate(model)
        trained = (lora_parameters if adapter == "peft" else trained_by)(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(trained.values(), lr=1e-4)
        grads, scales = [], []
        for factor in (1.0, float("inf"), 1.0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = first_sample(model, inputs).float().square().mean()
            scaler.scale(loss * factor).backward()
            scaler.unscale_(optimizer)
            flat = torch.cat([p.grad.flatten() for p in trained.values()])
            grads.append(flat)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            optimizer.zero_grad()
        results.append((grads, scales, torch.cat([p.detach().flatten() for p in trained.values()])))
    (theirs, their_scales, after), (grads, scales, mine) = results
    assert scales == their_scales == [1024.0, 512.0, 512.0]
    assert not theirs[1].isfinite().all() and not grads[1].isfinite().all()
    for i in (0, 2):
        # gradients have twice as many roundings behind them as the output
        assert relative_error(grads[i], theirs[i]) < 2 * BF16
    assert relative_error(mine, after) < STEPPED


@pytest.fixture
def accelerator():
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    yield lambda **options: Accelerator(cpu=True, **options)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@every_kind
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerates_prepare(inputs, kind, before, precision, accelerator, monkeypatch):
    """Two micro-batches a step: its forward is replaced, its loss scaled, its gradients clipped."""
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: False)
    pair = hosts_with_peft(kind)
    results = []
    for model in pair:
        with_ours = model is pair[1]
        if with_ours and before:
            report = fluxfast.accelerate(model)
        mine = accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
        trained = lora_parameters(model)
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
        prepared, optimizer = mine.prepare(model, optimizer)
        if with_ours and not before:
            report = fluxfast.accelerate(prepared)
        for _ in range(4):
            with mine.accumulate(prepared):
                mine.backward(first_sample(prepared, inputs).float().square().mean())
                if mine.sync_gradients:
                    mine.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        assert mine.unwrap_model(prepared) is model
        results.append({name: p.detach().clone() for name, p in trained.items()})
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
    theirs, ours = (torch.cat([p.flatten() for p in each.values()]) for each in results)
    # in bf16 the sign of a small gradient is rounding, and a step is as long as any
    assert relative_error(ours, theirs) < (STEPPED if precision == "no" else 1e-2)
    assert counts(report) == (20, 0, 0)


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_kind
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("adapter", ["peft", KohyaLora])
def test_distributed_data_parallel(inputs, kind, before, adapter, process_group):
    """Its reducer waits for each parameter's gradient, in buckets that gradients are views of."""
    host, ours = hosts_with_peft(kind) if adapter == "peft" else hosts(kind)
    if adapter != "peft":
        for model in (host, ours):
            model.network = adapted(model, adapter)
    if before:
        report = fluxfast.accelerate(ours)
    wrapped = [DistributedDataParallel(m, gradient_as_bucket_view=True) for m in (host, ours)]
    if not before:
        report = fluxfast.accelerate(wrapped[1])
    for _ in range(2):
        assert_equal(*wrapped, inputs, tolerance=FP32)
    assert counts(report) == (10, 0, 0)
