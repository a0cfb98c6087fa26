"""The trainer, `fluxfast-train plan` and `accelerate` choose the same on the same inputs.

The machine is data, an entry of the table of GPUs, and the tensors of the tiny run stay on the CPU.
A run is built up to its first step: what is compared is what it has applied to its model.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from trainer_cases import make_trainer

import fluxfast
from fluxfast.cli.plan import plan_report
from fluxfast.config.run import load_config
from fluxfast.doctor import startup
from fluxfast.doctor.checks import Outcome
from fluxfast.doctor.store import Store
from fluxfast.memory.choices import choose, choose_compute
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.plan import GIB, account, candidates
from fluxfast.memory.wishes import wishes_of
from fluxfast.model.apply import Choices
from fluxfast.model.compiled import Compile
from fluxfast.model.modulation import ModulationAhead
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops import verdicts
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import PRECISIONS, quantize_model
from fluxfast.train import health, preflight
from fluxfast.train.base_model import open_base
from fluxfast.train.choose import BatchShape, facts_before_loading, workload_of

CPU = torch.device("cpu")
RTX_3090 = find_gpu("RTX 3090")
PLAIN = {"lora_dropout": 0.0, "gradient_checkpointing_interval": 2}
STREAMED = {"enable_group_offload": True, "group_offload_blocks_per_group": 2}
# a budget with which blocks must be streamed, whatever the run
LEAST = "the least"
QUANTISED = {"int8": "int8-quanto", "nf4": "nf4-bnb", "fp8": "fp8-quanto", "bf16": "no_change"}


def base(name, **keys):
    return {"base_model_precision": QUANTISED[name], **keys}


CASES = [
    *((gpu, base(name)) for name in QUANTISED for gpu in ("H100", "RTX 3090", None)),
    ("H100", base("int8", compute_precision="same")),
    ("RTX 3090", base("bf16", compute_precision="int8", compute_outliers=3)),
    ("H100", base("int8", compute_precision="fp8")),
    (None, base("bf16", compute_precision="int8")),
    ("H100", {"gradient_checkpointing": False}),
    ("H100", {"recompute": "selective"}),
    ("H100", STREAMED),
    ("RTX 3090", base("int8", group_offload_use_stream=True, **STREAMED)),
    (None, STREAMED),
    ("H100", {"vram_budget": "auto"}),
    ("H100", base("int8", vram_budget=40.0)),
    ("RTX 3090", base("nf4", vram_budget=LEAST)),
    ("RTX 3090", base("nf4", vram_budget=LEAST, modulation_ahead=False)),
    ("H100", {"modulation_ahead": False}),
    (None, {"modulation_ahead": True}),
    ("H100", {"flux_lora_target": "ai-toolkit"}),
    ("H100", {"cuda_graphs": False}),
    ("H100", {"lora_dropout": 0.1}),
    ("H100", base("int8", deterministic=True)),
    (None, {"deterministic": True}),
    ("H100", {"attention_mechanism": "cudnn"}),
    (None, {"attention_mechanism": "native-flash"}),
    ("H100", {"dynamo_backend": "aot_eager", "dynamo_use_regional_compilation": True}),
    (None, {"dynamo_backend": "inductor", "dynamo_mode": "max-autotune"}),
]


@pytest.fixture(autouse=True)
def undone(monkeypatch, tmp_path):
    """A cache of its own for what is found on this machine; nothing is looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(startup.SWITCH, "off")
    # what `plan`, which has no model to measure it on, takes for granted
    monkeypatch.setattr(ModulationAhead, "seconds", lambda self, *args: 0.0)
    yield
    verdicts.set_failed({})
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def graphs(monkeypatch):
    """Whether graphs were turned on; there is no GPU that could have them."""
    made = []
    monkeypatch.setattr(FluxTransformer, "set_cuda_graphs", lambda self, on, **_: made.append(on))
    return made


@pytest.fixture
def config_of(write_config):
    """The config of a case, and the pretended machine's budget where the case wants the least."""

    def make(keys):
        config = load_config(write_config(**PLAIN | keys | {"vram_budget": None}))
        budget = keys.get("vram_budget")
        if budget == LEAST:
            small = BatchShape((64, 64), config.train_batch_size, "photos")
            work = workload_of(config, small, open_base(config))
            work = replace(work, compute="int8")
            ahead = config.modulation_ahead is not False
            needed = [
                account(work, c).needed for c in candidates(work, RTX_3090, modulation_ahead=ahead)
            ]
            budget = (min(needed) + 1) / GIB
        return config if budget is None else config.model_copy(update={"vram_budget": budget})

    return make


def trained(config, graphs):
    """What a run has chosen, after a look at whether its model is so."""
    trainer = make_trainer(config)
    try:
        choices, model = trainer.parts.choices, trainer.transformer
        for block, policy in zip(model.blocks, choices.recompute, strict=True):
            assert (block.compute, block.outliers) == (choices.compute, choices.outliers)
            assert (block.attention, block.policy) == (choices.attention, policy)
        assert model.recompute == list(choices.recompute)
        assert (model.modulation is not None) == choices.modulation_ahead
        assert graphs == [True] * choices.graphs
        compiled = model.compiled
        assert choices.compile == (None if compiled is None else compiled.how)
        assert torch.are_deterministic_algorithms_enabled() == choices.deterministic
        assert (trainer.stream is not None) == choices.streams
        if trainer.stream is not None:
            assert trainer.stream.schedule.slots == min(
                choices.slots, trainer.stream.schedule.groups
            )
        return choices
    finally:
        trainer.close()


def planned(config, gpu=None):
    chosen = plan_report(config, gpu)["chosen"]
    # as the command prints it
    chosen = json.loads(json.dumps(chosen))
    compiled = chosen["compile"] and Compile(*chosen["compile"])
    return Choices(**chosen | {"recompute": tuple(chosen["recompute"]), "compile": compiled})


def accelerated(folder, config):
    """The blocks of another program's model of the same base, accelerated as the config says."""
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False)
    format = PRECISIONS[config.base_model_precision]
    if format is not None:
        quantize_model(model, FORMATS[format])
    wishes = wishes_of(config)
    fluxfast.accelerate(model, compute=wishes.compute, recompute=wishes.recompute)
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def id_of(case):
    gpu, keys = case
    values = [f"{key}={value}" for key, value in keys.items()]
    return ",".join([gpu or "cpu", *values]).replace(" ", "")


@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_all_three_choose_the_same(case, config_of, workspace, pretend_gpu, graphs):
    gpu, keys = case
    if gpu is not None:
        pretend_gpu(gpu)
    config = config_of(keys)
    by_trainer = trained(config, graphs)
    assert by_trainer.streams or keys.get("vram_budget") != LEAST
    if gpu is not None:
        by_plan = planned(config)
        assert by_plan == by_trainer and by_plan.reasons == by_trainer.reasons

    blocks = accelerated(workspace / "pipeline", config)
    format = PRECISIONS[config.base_model_precision]
    expected = by_trainer.compute
    if format not in (None, "int8") and config.compute_precision == "auto":
        # a host's user has not asked for 8 bits: only a base that is in int8 itself brings them
        wishes = replace(wishes_of(config), eight_bit_bases=("int8",))
        expected = choose_compute(wishes, format, gpu and find_gpu(gpu))[0]
        assert expected == "same"
    for block, policy in zip(blocks, by_trainer.recompute, strict=True):
        assert block.compute == expected
        assert block.compute_because == by_trainer.reasons["compute"] or expected == "same"
        if config.recompute is not None:
            assert block.policy == policy and block.fixed_policy
        if not config.deterministic and config.attention_mechanism == "diffusers":
            assert block.attention == by_trainer.attention


def test_the_cases_reach_every_choice(config_of, pretend_gpu):
    """A table whose cases all came to the same would compare nothing."""
    found = {}
    for gpu, keys in CASES:
        if gpu is not None:
            pretend_gpu(gpu)
            choices = planned(config_of(keys))
            for name, value in vars(choices).items():
                found.setdefault(name, set()).add(str(value))
    several = {name for name, values in found.items() if len(values) > 1}
    assert several == {*vars(choices)}
    assert found["compute"] == {"same", "int8", "e4m3"}


def test_all_three_pass_over_what_failed_here(write_config, workspace, pretend_gpu, graphs):
    pretend_gpu("H100")
    config = load_config(write_config(**PLAIN | base("int8")))
    store = Store(CPU)
    outcome = Outcome("products", "fail", verdicts.COMPUTE, "int8", cause="dx is off by 0.4")
    store.add([outcome], health.scope_of(config, CPU))
    store.save()
    by_trainer = trained(config, graphs)
    assert by_trainer.compute == "same" and "dx is off by 0.4" in by_trainer.reasons["compute"]
    verdicts.set_failed({})
    assert planned(config) == by_trainer
    verdicts.set_failed({})
    for block in accelerated(workspace / "pipeline", config):
        assert block.compute == "same" and block.compute_because == by_trainer.reasons["compute"]


def test_all_three_refuse_what_the_gpu_lacks(write_config, workspace, pretend_gpu):
    pretend_gpu("RTX 3090")
    config = load_config(write_config(**PLAIN, compute_precision="fp8"))
    for way in (
        lambda: preflight.check(config, CPU),
        lambda: plan_report(config, None),
        lambda: accelerated(workspace / "pipeline", config),
    ):
        with pytest.raises(ValueError, match="RTX 3090 has no tensor cores for fp8"):
            way()


FULL_SIZE = SimpleNamespace(
    config={"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}, quantized=None
)


@pytest.mark.parametrize("budget", [None, 7.0, 12.0, 20.0, "auto"])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "nf4-bnb"])
def test_a_run_of_the_full_model_chooses_as_planned(write_config, pretend_gpu, precision, budget):
    pretend_gpu("RTX 4090")
    config = load_config(
        write_config(
            dataset={"resolution": 1024},
            base_model_precision=precision,
            vram_budget=budget,
            pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
        )
    )
    batches = [BatchShape((edge, edge), config.train_batch_size, "photos") for edge in (512, 1024)]
    facts = facts_before_loading(config, FULL_SIZE, batches, CPU)
    choices = choose(wishes_of(config), facts)
    assert planned(config, "RTX 4090") == choices
    assert len(choices.recompute) == 57


def test_without_a_gpu_the_plan_is_for_one_that_has_everything(write_config):
    config = load_config(write_config(**PLAIN | base("fp8", vram_budget=0.1)))
    without = load_config(write_config(**PLAIN | base("fp8")))
    assert planned(config) == planned(without, "RTX 4090")
