"""Copies, files and averages of accelerated models: each computes with what is its own."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from diffusers.training_utils import EMAModel
from dropin_cases import HOSTS, counts, every_kind, hosts, hosts_with_peft, output, peft_on
from dropin_hosts import (
    FP32,
    assert_equal,
    lora_parameters,
    outputs_and_grads,
)
from host_adapters import (
    KohyaInference,
    KohyaLora,
    OneTrainerDora,
    ToolkitLokr,
    ToolkitLora,
    adapted,
    trained_by,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fluxfast
from support import make_inputs, relative_error

ADAPTERS = [KohyaLora, KohyaInference, ToolkitLora, ToolkitLokr, OneTrainerDora]
every_adapter = pytest.mark.parametrize("make", ADAPTERS)


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


def scale_trained(model, by):
    with torch.no_grad():
        for p in trained_by(model).values():
            p.mul_(by)


@every_kind
@every_adapter
def test_a_copy_has_adapters_of_its_own(inputs, kind, make):
    host, ours = hosts(kind)
    for model in (host, ours):
        adapted(model, make)
    report = fluxfast.accelerate(ours, strict=True)
    again, theirs = copy.deepcopy(ours), copy.deepcopy(host)
    own = {id(p) for p in trained_by(again).values()}
    assert own and not own & {id(p) for p in trained_by(ours).values()}
    for model in (again, theirs):
        scale_trained(model, 1.5)
    assert_equal(theirs, again, inputs, trained=trained_by)
    assert counts(fluxfast.dropin.inspect(again)) == (5, 0, 0)
    # the original is what it was, and is not called
    assert counts(report) == (0, 0, 0)
    assert_equal(host, ours, inputs, trained=trained_by)
    assert all(p.grad is not None for p in trained_by(again).values())


def run_threads(*runs):
    """Runs functions at the same time; an error of any is raised."""
    results, start = [None] * len(runs), threading.Barrier(len(runs))

    def call(i, run):
        start.wait()
        try:
            results[i] = run()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=each) for each in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def step(model, inputs, trained, times=3):
    """The same forward and backward several times: the last one's output and gradients."""
    for _ in range(times):
        out = model(**inputs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads = torch.autograd.grad((out * weights).sum(), list(trained.values()))
    return [out.detach(), *grads]


@every_kind
@pytest.mark.parametrize("adapter", ["peft", KohyaLora])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_threads_that_train_the_same_model_and_its_copies(kind, adapter, recompute):
    _, ours = hosts(kind)
    if adapter == "peft":
        peft_on(ours)
    else:
        adapted(ours, adapter)
    trained_of = lora_parameters if adapter == "peft" else trained_by
    report = fluxfast.accelerate(ours, recompute=recompute)
    models = [ours, ours, copy.deepcopy(ours), copy.deepcopy(ours)]
    runs = [
        (model, make_inputs(2, 3, 4 + i, guidance=False, seed=i), trained_of(model))
        for i, model in enumerate(models)
    ]
    expected = [step(*run, times=1) for run in runs]
    actual = run_threads(*(lambda run=run: step(*run) for run in runs))
    for mine, alone in zip(actual, expected, strict=True):
        # the same sums in the same order, by the same number of threads
        assert all(map(torch.equal, mine, alone))
    assert counts(report) == (5 * (2 + 2 * 3), 0, 0)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_a_thread_that_draws_beside_one_that_trains():
    """Whether gradients are wanted is each thread's own."""
    _, ours = hosts("diffusers")
    peft_on(ours)
    report = fluxfast.accelerate(ours)
    ours.transformer_blocks[0].ff.net[2].base_layer.requires_grad_(True)
    inputs, trained = make_inputs(2, 3, 4, guidance=False), lora_parameters(ours)
    alone = step(ours, inputs, trained, times=1)
    expected = output(ours, inputs)

    def draw():
        with torch.no_grad():
            return [ours(**inputs).sample for _ in range(6)][-1]

    drawn, trained_beside = run_threads(draw, lambda: step(ours, inputs, trained))
    assert counts(report) == (4 + 5 + 5 * 6 + 4 * 3, 1 + 3, 0)
    assert torch.equal(drawn, expected) and all(map(torch.equal, trained_beside, alone))


LOAD = """
import sys, torch
for kind in sys.argv[2:]:
    model = torch.load(f"{sys.argv[1]}/{kind}.pt", weights_only=False)
    out = model(**torch.load(f"{sys.argv[1]}/inputs.pt"))
    out = out if isinstance(out, torch.Tensor) else out[0]
    import fluxfast
    report = fluxfast.dropin.inspect(model)
    assert report.calls("fused") == report.calls() == 5, report
    torch.save(out.detach(), f"{sys.argv[1]}/{kind}-out.pt")
"""


def test_files_of_models_in_another_process(inputs, tmp_path):
    """It need not import fluxfast: the file names what it needs."""
    theirs = {}
    for kind in HOSTS:
        theirs[kind], ours = hosts_with_peft(kind)
        fluxfast.accelerate(ours)
        torch.save(ours, tmp_path / f"{kind}.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, tmp_path, *HOSTS]
    subprocess.run(command, check=True, env=environment)
    for kind, host in theirs.items():
        out = torch.load(tmp_path / f"{kind}-out.pt")
        assert relative_error(out, output(host, inputs)) < FP32


@pytest.mark.parametrize("make", [KohyaLora, KohyaInference, OneTrainerDora])
def test_a_file_of_a_model_with_a_trainers_adapters(inputs, tmp_path, make):
    """Its linears' forwards are methods of modules, which the file has as well."""
    host, ours = hosts("bfl")
    for model in (host, ours):
        adapted(model, make)
    fluxfast.accelerate(ours, strict=True)
    torch.save(ours, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_equal(host, again, inputs, trained=trained_by)
    assert counts(fluxfast.dropin.inspect(again)) == (5, 0, 0)


@every_kind
def test_an_averaged_model(inputs, kind):
    """PyTorch's average is a copy of the model, whose parameters are moved."""
    host, ours = hosts_with_peft(kind)
    report = fluxfast.accelerate(ours)
    averages = []
    for model in (host, ours):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        average.update_parameters(model)
        with torch.no_grad():
            for p in lora_parameters(model).values():
                p.mul_(3)
        average.update_parameters(model)
        averages.append(average)
    expected, actual = (output(average, inputs) for average in averages)
    assert relative_error(actual, expected) < FP32
    assert relative_error(actual, output(ours, inputs)) > 1e-3
    assert counts(fluxfast.dropin.inspect(averages[1])) == counts(report) == (5, 0, 0)


@every_kind
def test_an_average_that_is_copied_in_and_out(inputs, kind):
    """diffusers' average keeps tensors, and exchanges them for the parameters' data."""
    drawn = []
    for model, accelerates in zip(hosts_with_peft(kind), (False, True), strict=True):
        if accelerates:
            report = fluxfast.accelerate(model)
        parameters = list(lora_parameters(model).values())
        ema = EMAModel(parameters, decay=0.5, min_decay=0.5)
        # its first step takes the parameters as they are
        ema.step(parameters)
        with torch.no_grad():
            for p in parameters:
                p.mul_(3)
        ema.step(parameters)
        seen = [output(model, inputs)]
        ema.store(parameters)
        ema.copy_to(parameters)
        seen.append(output(model, inputs))
        ema.restore(parameters)
        seen.append(output(model, inputs))
        assert torch.equal(seen[0], seen[2]) and relative_error(seen[1], seen[0]) > 1e-3
        drawn.append(seen)
    assert all(relative_error(a, e) < FP32 for e, a in zip(*drawn, strict=True))
    assert counts(report) == (15, 0, 0)


@every_kind
def test_a_copy_that_is_restored_leaves_the_original_alone(inputs, kind):
    host, ours = hosts_with_peft(kind)
    report = fluxfast.accelerate(ours, recompute="full")
    again = copy.deepcopy(ours)
    outputs_and_grads(again, inputs, lora_parameters(again))
    fluxfast.restore(again)
    assert torch.equal(output(again, inputs), output(host, inputs))
    assert_equal(host, ours, inputs)
    assert counts(report) == (5, 0, 0) and report.recompute == "full"
