"""modulation_ahead in a run: the run's result is what it is in place, however it is stopped; and
when it is on.
"""

import io
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_trainer import BF16, FP32, TREAD, Killed, kill_at, same_files

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.memory.choices import choose
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.rates import Rate, modulation_on_host
from fluxfast.memory.wishes import wishes_of
from fluxfast.model import modulation
from fluxfast.model.modulation import ModulationAhead
from fluxfast.train.choose import BatchShape, facts_of, tell, workload_of
from fluxfast.train.objective import Objective
from fluxfast.train.trainer import Trainer
from support import relative_error

LINE = "modulation a step ahead"
IN_PLACE = "modulation is computed on the device"
# one sample, and no dropout, so that graphs are possible
BF16_GRAPHED = {"lora_dropout": 0.0, "train_batch_size": 1}
INT8 = {"base_model_precision": "int8-quanto", **BF16_GRAPHED}
# of a LoRA after six steps: fp32 sums in another order, which AdamW's first steps, all of one size,
# enlarge
TOLERANCE = 1e-4


# the run's threads and the look-ahead's would wait for each other on a small machine
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def computed(monkeypatch):
    """In which thread each batch's vectors were computed."""
    threads = []
    original = ModulationAhead._compute

    def compute(self, *args):
        threads.append("main" if threading.current_thread() is threading.main_thread() else "ahead")
        return original(self, *args)

    monkeypatch.setattr(ModulationAhead, "_compute", compute)
    return threads


def assert_same_lora(a, b):
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    flat = [
        torch.cat([tensor.flatten().double() for tensor in lora.values()]) for lora in (left, right)
    ]
    assert relative_error(*flat) < TOLERANCE


@pytest.mark.parametrize(
    "mode",
    [
        FP32
        | {
            "gradient_accumulation_steps": 2,
            "flux_guidance_mode": "random-range",
            "gradient_checkpointing": False,
        },
        FP32
        | TREAD
        | {"lora_dropout": 0.2, "flow_schedule_auto_shift": True, "train_batch_size": 3},
        FP32
        | {
            "flow_custom_timesteps": "100,400,900",
            "flow_timesteps_mode": "round-robin",
            "train_batch_size": 1,
        },
    ],
    ids=["accumulation-guidance", "tread-dropout-batch", "round-robin"],
)
def test_a_run_ends_where_it_would_in_place(run, computed, mode):
    in_place, out = run(name="in_place", **mode)
    assert LINE not in out.getvalue() and not computed
    ahead, out = run(name="ahead", modulation_ahead=True, **mode)
    assert LINE in out.getvalue()
    # every batch once, and none where the device would have waited
    assert computed == ["ahead"] * 6 * mode.get("gradient_accumulation_steps", 1)
    assert_same_lora(in_place, ahead)


@pytest.mark.parametrize(
    "precision",
    ["no_change", "int8-quanto", "int4-quanto", "nf4-bnb", "int2-quanto", "fp8-torchao"],
)
def test_killed_and_resumed(run, monkeypatch, computed, precision):
    mode = BF16 | {
        "base_model_precision": precision,
        "modulation_ahead": True,
        "max_train_steps": 4,
    }
    whole, _ = run(name="whole", **mode)
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        run(name="killed", **mode)
    killed, out = run(name="killed", **mode)
    assert "step 2 of 4" in out.getvalue()
    assert same_files(whole, killed)
    assert set(computed) == {"ahead"}


def test_with_streamed_blocks(run):
    """Modulation is no part of what is streamed, and nothing changes."""
    mode = BF16 | {
        "base_model_precision": "int8-quanto",
        "modulation_ahead": True,
        "max_train_steps": 3,
    }
    resident, _ = run(name="resident", **mode)
    streamed, out = run(name="streamed", enable_group_offload=True, **mode)
    assert LINE in out.getvalue() and "blocks are streamed" in out.getvalue()
    assert same_files(resident, streamed)


def test_validation_and_a_teacher(run, computed):
    images = {
        "validation_disable": False,
        "validation_step_interval": 2,
        "validation_prompt": "a red cup",
        "validation_resolution": "64",
        "validation_num_inference_steps": 2,
    }
    mode = FP32 | images | {"max_train_steps": 4, "dataset": {"is_regularisation_data": True}}
    in_place, _ = run(name="in_place", **mode)
    ahead, _ = run(name="ahead", modulation_ahead="true", **mode)
    # a teacher's forward finds what its pupil's does; images ask for others, twice each of three
    # times
    assert sorted(computed) == ["ahead"] * 4 + ["main"] * 6
    assert_same_lora(in_place, ahead)


@pytest.mark.parametrize(
    "key",
    [{"flux_lora_target": "ai-toolkit"}, {"peft_lora_target_modules": ["to_q", "norm_out.linear"]}],
)
def test_adapters_on_modulation(run, monkeypatch, pretend_gpu, key):
    with pytest.raises(ConfigError, match=r"\"modulation_ahead\" is true.*norm\w*\.linear"):
        run(name="asked", modulation_ahead=True, **FP32, **key)
    # a CPU that chooses as a GPU does, and takes no time for it
    pretend_gpu("H100")
    no_graphs = FP32 | {"cuda_graphs": False, "max_train_steps": 2}
    monkeypatch.setattr(ModulationAhead, "seconds", lambda self, *args: 0.0)
    lora, out = run(name="auto", **no_graphs, **key)
    assert out.getvalue().count(IN_PLACE) == 1 and LINE not in out.getvalue()
    _, out = run(name="resumed_from_file", init_lora=str(lora), **no_graphs)
    assert out.getvalue().count(IN_PLACE) == 1 and LINE not in out.getvalue()
    with pytest.raises(ConfigError, match=r"not constant: the LoRA trains it .*norm\w*\.linear"):
        run(name="asked_with_file", init_lora=str(lora), modulation_ahead=True, **no_graphs)
    _, out = run(name="plain", **no_graphs)
    assert LINE in out.getvalue() and IN_PLACE not in out.getvalue()
    _, out = run(name="off", modulation_ahead=False, **no_graphs)
    assert LINE not in out.getvalue() and IN_PLACE not in out.getvalue()


def test_an_exception_of_the_thread_ends_the_step(run, monkeypatch):
    original = Objective.modulation_conditions

    def fail(self, example):
        if example.step == 3:
            raise OSError("cache/text/3f.safetensors: damaged")
        return original(self, example)

    monkeypatch.setattr(Objective, "modulation_conditions", fail)
    steps = []
    train_step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, step: steps.append(step) or train_step(self, step)
    )
    with pytest.raises(OSError, match="damaged"):
        run(**FP32, modulation_ahead=True)
    assert steps == [1, 2, 3]


def facts(config, gpu, **known):
    """What is known of a run on images of 512 and 1024 px."""
    small, large = (
        workload_of(config, BatchShape((pixels, pixels), config.train_batch_size, "photos"))
        for pixels in (512, 1024)
    )
    return replace(facts_of(config, large, gpu), smallest=small, **known)


def test_auto_is_off_on_a_cpu(write_config):
    config = load_config(write_config(**FP32))
    assert config.modulation_ahead == "auto"
    assert not choose(wishes_of(config), facts(config, None)).modulation_ahead
    assert choose(wishes_of(config), facts(config, find_gpu("H100"))).modulation_ahead
    values = {"true": True, "false": False, "auto": "auto"}
    assert {
        text: load_config(write_config(modulation_ahead=text)).modulation_ahead for text in values
    } == values
    with pytest.raises(ConfigError, match="modulation_ahead"):
        load_config(write_config(modulation_ahead="sometimes"))
    with pytest.raises(ConfigError, match="train_batch_size"):
        load_config(write_config(train_batch_size=True))


@pytest.mark.parametrize(
    ("gpu", "milliseconds", "settings", "late"),
    [
        # a step of 512 px in bf16 takes an H200 some 140 ms
        ("H200", 20, {}, False),
        ("H200", 130, BF16_GRAPHED, True),
        ("H200", 900, {}, True),
        # and some 100 in int8, with a graph; 150, without one
        ("H200", 60, INT8, False),
        ("H200", 100, INT8, True),
        ("H200", 60, {**INT8, "cuda_graphs": False}, False),
        # no room for the weights
        ("RTX 4090", 9000, {}, False),
        # the host is asked for, or needed
        ("H200", 900, {"modulation_ahead": True}, False),
        ("H200", 900, {"vram_budget": 40.0}, False),
        ("H200", 900, {"enable_group_offload": True}, False),
    ],
)
def test_a_cpu_that_takes_longer_than_the_step(write_config, gpu, milliseconds, settings, late):
    config = load_config(write_config(**settings))
    known = facts(config, find_gpu(gpu), host_seconds=Rate(milliseconds / 1000, True, "a test"))
    choices = choose(wishes_of(config), known)
    assert choices.modulation_ahead is not late
    out = io.StringIO()
    transformer = SimpleNamespace(modulation=None if late else SimpleNamespace(nbytes=6 << 30))
    tell(choices, wishes_of(config), known, transformer, Console(file=out, width=200))
    expected = f"{IN_PLACE}, step by step: the CPU takes {milliseconds} ms for it"
    assert (expected in out.getvalue()) == late


def test_a_cpu_that_nobody_has_measured(write_config):
    """Half of the bytes in int8 and a rate that is assumed: both are told."""
    for settings, late in (
        (INT8, True),
        (BF16_GRAPHED, True),
        # its weights are read once, however many samples there are
        ({**INT8, "train_batch_size": 4}, False),
    ):
        config = load_config(write_config(**settings))
        known = facts(config, find_gpu("H200"))
        nbytes = sum(known.workload.modulation_weights)
        known = replace(known, host_seconds=modulation_on_host(nbytes))
        choices = choose(wishes_of(config), known)
        assert choices.modulation_ahead is not late
        if late:
            assert re.match(
                r"the CPU should take \d+ ms for it \(assumed at 40 GB/s: .*\), a step's computing",
                choices.reasons["modulation_ahead"],
            )


@pytest.mark.parametrize(("cores", "late"), [(1, True), (2, False), (16, False), (None, False)])
def test_one_core_for_launching_and_for_modulation(write_config, cores, late):
    config = load_config(write_config(**INT8, cuda_graphs=False))
    known = facts(config, find_gpu("H200"), host_seconds=Rate(0.05, True, "a test"), cores=cores)
    choices = choose(wishes_of(config), known)
    assert choices.modulation_ahead is not late
    if late:
        assert "to launch a step on the same core" in choices.reasons["modulation_ahead"]
    # a graph is launched in no time
    graphed = replace(wishes_of(config), cuda_graphs="auto")
    assert choose(graphed, known).modulation_ahead


@pytest.mark.parametrize(
    ("cores", "threads", "used"),
    [(16, 16, 14), (16, 4, 4), (3, 3, 1), (2, 2, 1), (1, 1, 1), (8, 1, 1)],
)
def test_cores_that_modulation_leaves(monkeypatch, cores, threads, used):
    """Beside a GPU, one for the thread that launches and one for reading data, if there are."""
    monkeypatch.setattr(modulation, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert modulation._threads_beside(torch.device("cuda")) == used
    assert modulation._threads_beside(torch.device("cpu")) == threads


def test_a_slow_cpu_gives_the_weights_back(run, pretend_gpu, monkeypatch):
    """It is measured on the model that a run has loaded, whose weights then go to the device."""
    pretend_gpu("H200")
    monkeypatch.setattr(ModulationAhead, "seconds", lambda self, *args: 9.0)
    _, out = run(**FP32, cuda_graphs=False, max_train_steps=1)
    assert f"{IN_PLACE}, step by step: the CPU takes 9000 ms for it" in out.getvalue()
    assert LINE not in out.getvalue()


def test_the_host_is_timed():
    from small_flux import small_flux

    model = small_flux()
    model.set_modulation_ahead(True)
    assert 0 < model.modulation.seconds(2, torch.device("cpu"), torch.bfloat16) < 60
