"""An adapter kind that fluxfast doesn't know, taken through everything that a run does with one.

`rank_one.py` is the whole kind, and the fixture `kind` stands for its line in `LORA_TYPES`.
"""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fluxfast.adapters.kind import AdapterSettings, trainable_parameters
from fluxfast.adapters.kinds import KINDS, without_adapters
from fluxfast.adapters.lora import DoraKind, LoraKind
from fluxfast.config.adapters import ADAPTER_KINDS, LORA_TYPES
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.memory.block_memory import block_memory
from fluxfast.memory.plan import account
from fluxfast.memory.wishes import wishes_of
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.choose import BatchShape, choose, facts_of, workload_of
from fluxfast.train.trainer import Trainer, train
from rank_one import RankOneKind
from small_flux import small_flux
from support import make_inputs, relative_error

FP32 = {"optimizer": "torch-adamw", "mixed_precision": "no", "lora_dropout": 0.0}


@pytest.fixture
def kind(monkeypatch):
    monkeypatch.setitem(LORA_TYPES, "rank-one", "rank_one:RankOneKind")
    # made of the table when fluxfast is imported, which has been done
    monkeypatch.setitem(KINDS, "rank-one", RankOneKind())
    return KINDS["rank-one"]


@pytest.fixture
def run(kind, write_config):
    """Runs a config with the kind; returns the file's path and what was printed."""

    def run_config(**changes):
        config = load_config(write_config(lora_type="rank-one", **FP32 | changes))
        out = io.StringIO()
        return train(config, Console(file=out, width=160)), out.getvalue()

    return run_config


def test_kinds_are_those_of_the_option():
    assert LORA_TYPES.keys() == {"standard", "lycoris"}
    # DoRA and full training are options of their own
    assert KINDS.keys() == ADAPTER_KINDS.keys() == {"standard", "lycoris", "dora", "full"}
    assert type(KINDS["standard"]) is LoraKind and type(KINDS["dora"]) is DoraKind


def test_without_its_line_a_kind_is_refused(write_config):
    with pytest.raises(
        ConfigError, match="\"lora_type\" is \"rank-one\": must be 'standard' or 'lycoris'"
    ):
        load_config(write_config(lora_type="rank-one"))


def adapted(kind, dtype=torch.float64, format=None):
    model = small_flux(format, num_layers=1, num_single_layers=1)
    kind.add(model, AdapterSettings(targets="all+ffs", rank=0, alpha=0))
    g = torch.Generator().manual_seed(4)
    for p in trainable_parameters(model).values():
        p.data = torch.randn(p.shape, generator=g).to(dtype) * 0.1
    return model.to(dtype)


class Log(list):
    """How each call of a block ran."""

    def record(self, how, because=None, value=""):
        self.append(how)


def gradients(model, ran):
    """Of the input and of every trained tensor, from blocks that ran in one way."""
    log = Log()
    for block in model.blocks:
        block.log = log
    dtype = next(iter(trainable_parameters(model).values())).dtype
    inputs = {name: t.to(dtype) for name, t in make_inputs(2, 3, 4).items()}
    x = inputs["hidden_states"].requires_grad_()
    out = model(**inputs).sample
    assert log == [ran] * 2
    trained = trainable_parameters(model)
    grads = torch.autograd.grad(out.square().mean(), [x, *trained.values()])
    return dict(zip(["output", "input", *trained], [out, *grads], strict=True))


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_fused_blocks_have_the_gradients_of_plain_torch(kind, monkeypatch, format):
    model = adapted(kind, format=format)
    assert len(kind.modules(model)) == 18
    fused = gradients(model, "fused")
    monkeypatch.delitem(KINDS, "rank-one")
    by_module = gradients(model, "composed")
    assert len(fused) == 2 + 2 * 18
    for name, expected in by_module.items():
        assert expected.abs().sum() > 0, name
        assert relative_error(fused[name], expected) < 1e-10, name


def test_it_can_be_turned_off(kind):
    model = adapted(kind)
    inputs = {name: t.double() for name, t in make_inputs(2, 3, 4).items()}
    base = small_flux(num_layers=1, num_single_layers=1, dtype=torch.float64)
    expected = base(**inputs).sample
    with without_adapters(model):
        assert relative_error(model(**inputs).sample, expected) < 1e-12
    assert relative_error(model(**inputs).sample, expected) > 1e-3


def test_a_run_trains_it_in_fused_blocks(run, kind, monkeypatch):
    log, seen = Log(), {}
    step = Trainer.train_step

    def train_step(self, number):
        for block in self.transformer.blocks:
            block.log = log
        result = step(self, number)
        seen["end"] = {name: t.clone() for name, t in kind.state(self.transformer).items()}
        return result

    monkeypatch.setattr(Trainer, "train_step", train_step)
    path, printed = run(max_train_steps=2)
    # three blocks, two steps
    assert log == ["fused"] * 6
    trained = load_file(path)
    assert trained.keys() == {f"transformer.{name}" for name in seen["end"]}
    for name, tensor in seen["end"].items():
        assert torch.equal(trained[f"transformer.{name}"], tensor)
    moved = [name for name in seen["end"] if name.endswith(".v") and seen["end"][name].any()]
    assert len(moved) == len(seen["end"]) // 2
    count = sum(t.numel() for t in seen["end"].values())
    assert f"layers: {count:,} parameters" in printed


def test_a_run_is_resumed_to_the_same_bits(run, monkeypatch):
    whole, _ = run(name="whole", max_train_steps=4)
    step = Trainer.train_step

    def train_step(self, number):
        if number == 4:
            monkeypatch.setattr(Trainer, "train_step", step)
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        run(name="stopped", max_train_steps=4)
    stopped, printed = run(name="stopped", max_train_steps=4)
    assert "step 2 of 4" in printed
    assert whole.read_bytes() == stopped.read_bytes()


def test_another_kind_does_not_go_on_from_it(run, write_config):
    run(max_train_steps=2)
    with pytest.raises(ValueError, match="a rank-one adapter, this run has LoRA") as caught:
        train(load_config(write_config(**FP32, max_train_steps=4)), Console(file=io.StringIO()))
    assert "problems" not in str(caught.value)


def test_a_saved_file_is_read_back(kind, tmp_path):
    model = adapted(kind, torch.float32)
    path = kind.save(model, tmp_path, metadata={"modelspec.title": "me"})
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    file = kind.read_file(tmp_path)
    state = kind.state(model)
    assert sorted(file.targets) == sorted(kind.modules(model))
    assert file.state.keys() == state.keys()
    assert all(torch.equal(file.state[name], tensor) for name, tensor in state.items())
    assert file.metadata["modelspec.title"] == "me"

    other = small_flux(num_layers=1, num_single_layers=1)
    kind.add_from(other, file, AdapterSettings(targets="all", rank=0, alpha=0))
    assert kind.state(other).keys() == state.keys()
    assert all(torch.equal(kind.state(other)[name], tensor) for name, tensor in state.items())
    # a file's targets are whole names: the blocks' own proj_out are other modules
    last = {"proj_out.u": torch.ones(64), "proj_out.v": torch.ones(16)}
    other = small_flux(num_layers=1, num_single_layers=1)
    kind.add_from(other, kind.from_state(path, last), AdapterSettings("all", rank=0, alpha=0))
    assert list(kind.modules(other)) == ["proj_out"]
    with pytest.raises(ValueError, match="proj_out has no v in it"):
        kind.check_fits(other, kind.from_state(path, {"proj_out.u": last["proj_out.u"]}))
    with torch.device("meta"):
        wider = FluxTransformer(num_layers=1, num_single_layers=1)
    with pytest.raises(ValueError, match=r"\.u: expected \[3072\] for this .* found \[64"):
        kind.check_fits(wider, file)
    with pytest.raises(ValueError, match="rank-one has no lora_format 'comfyui'"):
        kind.save(model, tmp_path, style="comfyui")


def test_init_lora_goes_on_from_its_file(run, kind, monkeypatch):
    first, _ = run(name="first", max_train_steps=2)
    start = {}
    step = Trainer.train_step

    def train_step(self, number):
        start.update({n: t.clone() for n, t in kind.state(self.transformer).items()})
        monkeypatch.setattr(Trainer, "train_step", step)
        return step(self, number)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    _, printed = run(name="second", init_lora=str(first), flux_lora_target="all", max_train_steps=1)
    saved = load_file(first)
    assert {f"transformer.{name}" for name in start} == saved.keys()
    assert all(torch.equal(tensor, saved[f"transformer.{n}"]) for n, tensor in start.items())
    modules = len(saved) // 2
    assert f"rank-one: {first}, {modules} modules" in printed
    assert '"flux_lora_target" is all' in printed and "the rank-one that the run began" in printed


def test_a_plan_counts_it(kind, write_config):
    batch = BatchShape((512, 512), 1, "photos")
    lora = workload_of(load_config(write_config(**FP32)), batch)
    config = load_config(write_config(**FP32, lora_type="rank-one"))
    workload = workload_of(config, batch)
    with torch.device("meta"):
        model = FluxTransformer()
        kind.add(model, AdapterSettings(targets=config.flux_lora_target, rank=0, alpha=0))
    trained = sum(p.numel() for p in trainable_parameters(model).values())
    assert workload.adapters == trained
    plan = account(workload, choose(wishes_of(config), facts_of(config, workload, None)))
    assert plan.vram["adapters"] == plan.vram["gradients"] == 4 * trained
    assert plan.vram["optimiser"] == 8 * trained
    # LoRA keeps a narrow product a token in fp32 for q, k, v, out and the MLP's two; this kind none
    kept = [block_memory(each, 0, "none").kept for each in (lora, workload)]
    assert kept[0] - kept[1] == 6 * workload.tokens[0] * config.lora_rank * 4
