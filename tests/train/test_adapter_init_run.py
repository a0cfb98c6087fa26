"""Runs whose adapter begins with the base's weights, or is DoRA: made, killed, resumed, refused."""

import json

import pytest
import torch
from safetensors import safe_open

from config_helpers import load, only
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.memory.plan import account
from fluxfast.memory.wishes import wishes_of
from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast.train import preflight
from fluxfast.train.choose import BatchShape, choose, facts_of, workload_of
from fluxfast.train.trainer import Trainer

CPU = torch.device("cpu")
SETTINGS = {
    "optimizer": "torch-adamw",
    "mixed_precision": "no",
    "lora_dropout": 0.0,
    "max_train_steps": 3,
    "checkpoint_step_interval": 2,
}
LOFTQ = {"lora_init_type": "loftq", "base_model_precision": "int4-quanto"}


class KilledError(BaseException):
    pass


@pytest.fixture
def killed(run, monkeypatch):
    """Runs a config, which is killed in its third step."""

    def run_killed(**settings):
        with monkeypatch.context() as patch:
            original = Trainer.train_step

            def train_step(self, number):
                if number == 3:
                    raise KilledError
                return original(self, number)

            patch.setattr(Trainer, "train_step", train_step)
            with pytest.raises(KilledError):
                run(**settings)

    return run_killed


@pytest.mark.parametrize(
    "settings",
    [
        LOFTQ,
        LOFTQ | {"loftq_iterations": 3, "base_model_precision": "nf4-bnb"},
        LOFTQ | {"loftq_iterations": 2, "enable_group_offload": True},
        {"lora_init_type": "pissa", "base_model_precision": "int8-quanto"},
        {"lora_init_type": "pissa", "enable_group_offload": True},
        {"use_dora": True},
        {"use_dora": True, "base_model_precision": "int8-quanto", "lora_init_type": "olora"},
    ],
)
def test_a_killed_run_ends_with_the_same_file(run, killed, settings):
    settings = SETTINGS | settings
    whole, _ = run(name="whole", **settings)
    killed(name="killed", **settings)
    resumed, out = run(name="killed", **settings)
    assert "resumed from" in out.getvalue()
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_run_says_what_its_start_has_corrected(run):
    path, out = run(**SETTINGS | LOFTQ)
    printed = " ".join(out.getvalue().split())
    assert "lora_init_type loftq: the quantised base is" in printed
    # a rank of 3 was trained
    assert "as a LoRA of twice the rank (6)" in printed
    with safe_open(path, framework="pt") as reader:
        config = json.loads(reader.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == 6


def test_original_weights_come_from_a_quantised_files_source(
    workspace, tmp_path, write_config, run
):
    """A file that `fluxfast-train quantize` wrote begins as the config's own quantising does."""
    source = open_checkpoint(str(workspace / "pipeline"))
    made = tmp_path / "made.safetensors"
    source.quantize(FluxTransformer, made, FORMATS["int4"])
    named = {
        "pretrained_transformer_model_name_or_path": str(made),
        "base_model_precision": "no_change",
    }
    said = [
        next(
            line for line in run(name=name, **settings)[1].getvalue().split("\n") if "away" in line
        )
        for name, settings in (("one", SETTINGS | LOFTQ), ("two", SETTINGS | LOFTQ | named))
    ]
    assert said[0] == said[1]


def test_a_quantised_file_without_its_source_is_refused(workspace, tmp_path, write_config):
    source = tmp_path / "copy"
    source.mkdir()
    for file in (workspace / "pipeline" / "transformer").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    made = tmp_path / "made.safetensors"
    open_checkpoint(str(source)).quantize(FluxTransformer, made, FORMATS["int4"])
    for file in source.iterdir():
        file.unlink()
    source.rmdir()
    changes = {"lora_init_type": "loftq", "pretrained_transformer_model_name_or_path": str(made)}
    with pytest.raises(ConfigError) as error:
        preflight.check(load_config(write_config(**SETTINGS | changes)), CPU)
    only(error.value.problems, "needs the weights as they were before they were quantised")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_init_type": "loftq"}, ["none of the", "is quantised: set base_model_precision"]),
        (LOFTQ | {"lora_rank": 33}, ["'loftq' can't take rank 33"]),
        (
            {"lora_init_type": "pissa", "base_model_precision": "nf4-bnb", "lora_rank": 33},
            ["'pissa' can't take rank 33"],
        ),
    ],
)
def test_what_is_refused_before_anything_is_loaded(write_config, changes, words):
    with pytest.raises(ConfigError) as error:
        preflight.check(load_config(write_config(**SETTINGS | changes)), CPU)
    only(error.value.problems, *words)


def test_dora_may_not_come_or_go_within_a_run(run, write_config):
    run(name="dora", use_dora=True, **SETTINGS)
    with pytest.raises(ConfigError) as error:
        preflight.check(load_config(write_config(name="dora", **SETTINGS)), CPU)
    only(error.value.problems, "use_dora true, this run has false")
    run(name="plain", **SETTINGS)
    config = load_config(write_config(name="plain", use_dora=True, **SETTINGS))
    with pytest.raises(ConfigError) as error:
        preflight.check(config, CPU)
    only(error.value.problems, "use_dora false, this run has true")


@pytest.mark.parametrize("precision", ["no_change", "nf4-bnb"])
def test_a_plan_counts_dora(monkeypatch, tmp_path, precision):
    monkeypatch.chdir(tmp_path)
    counted = []
    for dora in (False, True):
        config = load(
            use_dora=dora, flux_lora_target="all+ffs", lora_dropout=0.0,
            base_model_precision=precision,
        )  # fmt: skip
        workload = workload_of(config, BatchShape((512, 512), 1, ""))
        counted.append(workload.adapters)
        facts = facts_of(config, workload, None)
        assert account(workload, choose(wishes_of(config), facts)).peak > 0
    # the MLPs' first linears are four times as wide as the others; the last one has 64 rows
    rows = 19 * (8 + 2 * 5) * 3072 + 38 * (3 + 5) * 3072 + 64
    assert counted[1] - counted[0] == rows


def test_options_that_have_no_effect(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    notes = load(loftq_iterations=3).notes
    only([n for n in notes if "loftq" in n], '"loftq_iterations" has no effect: only read with')
