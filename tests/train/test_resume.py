"""What a checkpoint brings into a run whose config has changed since, and what it doesn't."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from config_helpers import load
from fluxfast.adapters.lora_read import read_lora
from fluxfast.config.datasets import ImageDataset
from fluxfast.config.run_fields import TrainFields
from fluxfast.train import reporting, resume, state
from fluxfast.train.adapter import ADAPTER_KEYS
from fluxfast.train.events import read_metrics
from fluxfast.train.lr_schedules import LR_SCHEDULERS, build_lr_scheduler
from fluxfast.train.optim import build_optimizer, load_moments
from fluxfast.train.state import SavedRun
from fluxfast.train.trackers import TensorBoard

FP32 = {"optimizer": "torch-adamw", "mixed_precision": "no", "lora_dropout": 0.0}


def photos(**changes):
    entry = {
        "id": "photos",
        "instance_data_dir": "i",
        "cache_dir_vae": "c",
        "resolution": 64,
        "resolution_type": "pixel_area",
    }
    return [ImageDataset(caption_strategy="filename", **entry | changes)]


@pytest.fixture
def in_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def saved_with(now, step=2, **more):
    """A checkpoint of a run with these settings, as it comes back from its file."""
    return SavedRun(
        "ckpt",
        json.loads(json.dumps({"global_step": step, "seed": 7, "settings": now, **more})),
        {},
        {},
    )


# every option that a step's result may depend on, away from its default
CHANGES = {
    "learning_rate": 1e-3, "adam_weight_decay": 0.5, "adam_epsilon": 1e-4, "lr_scheduler": "linear",
    "lr_warmup_steps": 3, "max_grad_norm": 1.0, "grad_clip_method": "value", "loss_type": "huber",
    "flow_schedule_shift": 2.0, "flux_guidance_value": 3.0, "caption_dropout_probability": 0.5,
    "lora_dropout": 0.3, "model_flavour": "dev",
    "pretrained_transformer_model_name_or_path": "elsewhere", "mixed_precision": "no",
    "compute_precision": "same",
    "tread_config": {
        "routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]
    },
    "vae_dtype": "fp32", "t5_padding": "zero", "data_backend_sampling": "uniform",
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_every_changed_setting_is_told_once(in_folder, key):
    common = {"optimizer": "torch-adamw"}
    before, after = load(**common), load(**common, **{key: CHANGES[key]})
    then, now = (resume.settings(config, photos(), seed=7, steps=9) for config in (before, after))
    assert resume.notes(saved_with(then), json.loads(json.dumps(then))) == []
    (line,) = resume.notes(saved_with(then), now)
    assert line.startswith(f'"{key}" was ') and line.endswith(" from step 3 on")


def test_settled_values_are_compared_and_not_their_spelling(in_folder):
    before = resume.settings(
        load(adam_beta1=0.5, adam_beta2=0.6, max_train_steps=9), photos(), seed=7, steps=9
    )
    after = resume.settings(
        load(optimizer_beta1=0.5, optimizer_beta2=0.6, num_train_epochs=3),
        photos(),
        seed=7,
        steps=9,
    )
    assert resume.notes(saved_with(before), after) == []
    after = resume.settings(
        load(optimizer_beta1=0.5, optimizer_beta2=0.7), photos(repeats=3), seed=8, steps=12
    )
    assert resume.notes(saved_with(before), after) == [
        '"adam_beta2" was 0.6 and is 0.7 from step 3 on',
        '"seed" was 7 and is 8 from step 3 on',
        "the run's length was 9 steps and is 12: the learning rate follows the new one",
        'dataset "photos": "repeats" was 0 and is 3 from step 3 on',
    ]
    (line,) = resume.notes(saved_with(before), before | {"lora_init_type": "gaussian"})
    assert "no effect, the adapter's values are the checkpoint's" in line


def test_every_option_is_told_or_left_out_on_purpose():
    fields = TrainFields.model_fields
    told = resume.options_that_are("told", fields=fields)
    assert not {"output_dir", "validation_seed", "resolution", "optimizer", "seed"} & set(told)
    assert set(CHANGES) <= set(told)
    # of a lycoris_config, what must not change is compared with the adapter, and the rest is told
    compared = {*resume.options_that_are("elsewhere", fields=fields), "lycoris_config"}
    assert set(ADAPTER_KEYS) <= compared
    assert resume.options_that_are("refused", fields=fields) == [
        *("base_model_precision", "train_batch_size", "gradient_accumulation_steps", "optimizer")
    ]
    assert set(resume.options_that_are("start_only", fields=fields)) == {
        *("init_lora", "lora_init_type", "loftq_iterations", "init_lora_ema", "init_lokr_norm")
    }


def test_what_makes_another_run_of_it_is_refused(in_folder):
    config = load(train_batch_size=2, gradient_accumulation_steps=3)
    then = {"fixed": resume.fixed(config), "sampler": {"datasets": {"photos": {"batch_size": 2}}}}
    assert resume.refused(config, saved_with({}, **then), photos()) == []
    (line,) = resume.refused(config, saved_with({}, **then), photos(train_batch_size=5))
    assert line == 'dataset "photos": train_batch_size 2, this run has 5'
    for key, value in {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "base_model_precision": "int8-quanto",
    }.items():
        other = load(**{"train_batch_size": 2, "gradient_accumulation_steps": 3, key: value})
        (line,) = resume.refused(other, saved_with({}, **then), photos())
        assert line == f"{key} {getattr(config, key)}, this run has {value}"


def test_the_seed(in_folder):
    then = saved_with({})
    assert resume.run_seed(load(seed=5), None) == resume.run_seed(load(seed=5), then) == 5
    for unset in (None, 0, -1):
        assert resume.run_seed(load(seed=unset), then) == 7
        assert resume.run_seed(load(seed=unset), None) != resume.run_seed(load(seed=unset), None)


def test_a_checkpoint_of_version_1_tells_what_it_knows(in_folder):
    group = {
        "lr": 5e-4,
        "initial_lr": 1e-3,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
    }
    then = SavedRun("ckpt", {"global_step": 2, "seed": 7}, {}, {"param_groups": [group]})
    config = load(learning_rate=1e-5, optimizer="torch-adamw")
    first, change = resume.notes(then, resume.settings(config, photos(), seed=7, steps=9))
    assert "earlier version" in first and "without checksums" in first
    assert change == '"learning_rate" was 0.001 and is 1e-05 from step 3 on'


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_schedule_goes_on_as_if_it_had_always_run(name, warmup):
    """To the bit, and whatever schedule the steps before had."""
    what = {"warmup": warmup, "total": 8, "power": 0.7, "lr_end": 1e-4}

    def optimizer():
        return build_optimizer("torch-adamw", [torch.nn.Parameter(torch.ones(1))], lr=1e-3)

    whole = optimizer()
    scheduler, rates = build_lr_scheduler(whole, name, **what), []
    for _ in range(8):
        rates.append(whole.param_groups[0]["lr"])
        whole.step()
        scheduler.step()
    for done in range(8):
        resumed = optimizer()
        # the one that is built before a checkpoint is looked for
        build_lr_scheduler(resumed, name, **what)
        scheduler = build_lr_scheduler(resumed, name, **what, done=done)
        for rate in rates[done:]:
            assert resumed.param_groups[0]["lr"] == rate == scheduler.get_last_lr()[0]
            resumed.step()
            scheduler.step()


@pytest.mark.parametrize("name", ["torch-adamw", "adamw_bf16"])
def test_only_moments_come_from_the_saved_optimiser(name):
    def stepped(**settings):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(5))
        optimizer = build_optimizer(name, {"a": parameter}, **settings)
        parameter.grad = torch.randn(5)
        return optimizer, parameter

    old, _ = stepped(lr=1e-3, seed=1)
    old.step()
    new, parameter = stepped(lr=1e-5, betas=(0.5, 0.6), weight_decay=0.5, eps=1e-3, seed=2)
    wanted = {key: value for key, value in new.param_groups[0].items() if key != "params"}
    load_moments(new, old.state_dict())
    assert {key: value for key, value in new.param_groups[0].items() if key != "params"} == wanted
    (moments,) = old.state.values()
    assert torch.equal(new.state[parameter]["exp_avg"], moments["exp_avg"])
    assert new.state[parameter]["step"] == 1
    two = build_optimizer(name, [torch.nn.Parameter(torch.ones(1)) for _ in range(2)], lr=1.0)
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, this one of \[2\]"):
        load_moments(two, old.state_dict())


def test_a_longer_run_with_other_settings(run, tmp_path):
    """The config's settings are in the optimiser and its schedule, which is where a run of that
    length has it.
    """
    cosine = FP32 | {"lr_scheduler": "cosine", "lr_end": 1e-5}
    run(name="long", max_train_steps=4, **cosine)
    run(name="made-long", max_train_steps=2, **cosine)
    _, out = run(name="made-long", max_train_steps=4, **cosine)
    assert "length was 2 steps and is 4" in out.getvalue()
    rates = [
        [m["learning_rate"] for m in read_metrics(tmp_path / n / "metrics.jsonl")]
        for n in ("long", "made-long")
    ]
    assert rates[0][2:] == rates[1][2:]

    new = cosine | {
        "learning_rate": 1e-4,
        "adam_weight_decay": 0.5,
        "optimizer_beta1": 0.5,
        "optimizer_beta2": 0.6,
        "seed": 12,
    }
    _, out = run(name="made-long", max_train_steps=6, **new)
    for change in (
        '"learning_rate" was 0.001 and is 0.0001 from step 5 on',
        '"adam_weight_decay" was 0.01 and is 0.5',
        '"adam_beta1" was 0.9 and is 0.5',
        '"adam_beta2" was 0.999 and is 0.6',
        '"seed" was 11 and is 12',
    ):
        assert out.getvalue().count(change) == 1, change
    saved = state.load_checkpoint(tmp_path / "made-long" / "checkpoint-6")
    group = saved.optimizer["param_groups"][0]
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ([0.5, 0.6], 0.5, 1e-4)
    assert saved.state["seed"] == 12
    # unset, it is the checkpoint's again
    _, out = run(name="made-long", max_train_steps=7, **new | {"seed": None})
    assert '"seed"' not in out.getvalue()


def test_what_init_lora_brings_is_said_and_recorded(run, tmp_path, write_config):
    first, _ = run(name="first", max_train_steps=1, lora_alpha=5, **FP32)
    told = {
        "init_lora": str(first),
        "lora_rank": 16,
        "lora_alpha": 32,
        "flux_lora_target": "all",
        "max_train_steps": 1,
    }
    lora, out = run(name="second", **told, **FP32)
    for line in (
        '"lora_rank" is 16: no effect',
        '"lora_alpha" is 32: no effect',
        '"flux_lora_target" is all (',
    ):
        assert out.getvalue().count(line) == 1, line
    fixed = state.load_checkpoint(tmp_path / "second" / "checkpoint-1").state["fixed"]
    assert (fixed["lora_rank"], fixed["lora_alpha"]) == (3, 5.0)
    assert read_lora(lora).targets == read_lora(first).targets

    # the file isn't needed any more; the same words, or the true ones, go on; others are refused
    first.unlink()
    longer = FP32 | {"max_train_steps": 2}
    _, out = run(name="second", **told | longer)
    assert "resumed from" in out.getvalue() and '"lora_rank" is 16: no effect' in out.getvalue()
    true = {"lora_rank": 3, "lora_alpha": 5, "flux_lora_target": "all+ffs"}
    _, out = run(name="second", **true, **FP32 | {"max_train_steps": 3})
    assert "resumed from" in out.getvalue() and "has 3" not in out.getvalue()
    with pytest.raises(
        ValueError, match=r"lora_rank 3, this run has 8; with lora_alpha 5, this run has 4;"
    ):
        run(name="second", **true | {"lora_rank": 8, "lora_alpha": 4}, **longer)


def test_a_run_that_began_with_odd_alphas_resumes_to_the_same_bits(run, tmp_path):
    """Alphas that no fp32 number is, of more than one rank: an exported file would round them."""
    first, _ = run(name="first", max_train_steps=1, **FP32)
    tensors = load_file(first)
    # a whole name: PEFT's patterns hold for every module that ends like them
    key = next(name for name in tensors if "transformer_blocks.0." in name).split(".lora_")[0]
    for half in ("A", "B"):
        tensors[f"{key}.lora_{half}.weight"] = tensors[f"{key}.lora_{half}.weight"].repeat(
            *((2, 1) if half == "A" else (1, 2))
        )
    odd = tmp_path / "odd.safetensors"
    name = key.removeprefix("transformer.")
    settings = {"r": 3, "lora_alpha": 0.1, "alpha_pattern": {name: 0.3}, "rank_pattern": {name: 6}}
    metadata = {f"transformer.{key}": value for key, value in settings.items()}
    save_file(tensors, odd, {"lora_adapter_metadata": json.dumps(metadata)})
    mode = FP32 | {"init_lora": str(odd), "lora_format": "comfyui"}
    whole, _ = run(name="whole", max_train_steps=4, **mode)
    run(name="stopped", max_train_steps=2, **mode)
    resumed, _ = run(name="stopped", max_train_steps=4, **mode)
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_changed_adapter_is_refused(run):
    run(max_train_steps=1, **FP32)
    with pytest.raises(ValueError) as caught:
        run(lora_alpha=7, flux_lora_target="all", train_batch_size=1, max_train_steps=2, **FP32)
    for part in (
        "train_batch_size 2, this run has 1",
        "lora_alpha 3, this run has 7",
        "flux_lora_target",
        "all (14 modules)",
    ):
        assert part in str(caught.value), part


def test_a_checkpoint_of_version_1_and_damaged_metrics_go_on_to_the_same_bits(run, tmp_path):
    whole, _ = run(name="whole", max_train_steps=3, **FP32)
    run(name="old", max_train_steps=2, **FP32)
    folder = tmp_path / "old" / "checkpoint-2"
    (folder / state.CHECKSUMS_NAME).unlink()
    content = json.loads((folder / state.STATE_NAME).read_text())
    del content["settings"], content["init_lora"]
    (folder / state.STATE_NAME).write_text(json.dumps(content | {"version": 1}))
    metrics = tmp_path / "old" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b"}\n{", b"\x00\xff\n{", 1))
    resumed, out = run(name="old", max_train_steps=3, **FP32)
    assert whole.read_bytes() == resumed.read_bytes()
    assert (
        out.getvalue().count("is of an earlier version") == 1
        and "1 of 2 lines can't be read" in out.getvalue()
    )
    assert [m["step"] for m in read_metrics(metrics)] == [2, 3]


def test_a_tracker_that_fails_ends_nothing(run, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the tracker is gone")

    for name in ("log", "close"):
        monkeypatch.setattr(TensorBoard, name, fail)
    monkeypatch.setattr(reporting, "plot_loss", fail)
    lora, out = run(max_train_steps=2, report_to="tensorboard", **FP32)
    assert (
        lora.exists() and out.getvalue().count("the tracker is gone; the run goes on without") == 2
    )
