"""A run with `lora_type: lycoris`: trained, killed, resumed, gone on from, read by others."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fluxfast.adapters.kinds import KINDS
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.memory.block_memory import block_memory
from fluxfast.memory.plan import account
from fluxfast.memory.wishes import wishes_of
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.adapter import settings_of
from fluxfast.train.choose import BatchShape, choose, facts_of, workload_of
from fluxfast.train.trainer import Trainer

FP32 = {"optimizer": "torch-adamw", "mixed_precision": "no", "lora_type": "lycoris"}
LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 2,
    "linear_alpha": 1,
    "factor": 4,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"FeedForward": {"factor": 8}},
        "target_name": ["nothing"],
    },
}
OTHERS = {
    "LoHa and OFT": {
        "algo": "loha",
        "apply_preset": {
            "target_module": ["Attention"],
            "module_algo_map": {"FeedForward": {"algo": "diag-oft"}},
        },
    },
    "DyLoRA": {"algo": "dylora", "linear_dim": 4, "block_size": 2},
    "LoKr with all options": {
        "use_scalar": True, "dora_wd": True, "rank_dropout": 0.2, "module_dropout": 0.1,
        "decompose_both": True, "linear_dim": 1,
    },
    "full": {"algo": "full"},
}  # fmt: skip


@pytest.fixture
def lycoris(tmp_path):
    """Writes a lycoris_config; returns the options that name it."""

    def write(file="lycoris.json", **changes):
        path = tmp_path / file
        path.write_text(json.dumps(LOKR | changes))
        return FP32 | {"lycoris_config": str(path)}

    return write


@pytest.fixture
def killed(monkeypatch):
    """Has the next run end as by a kill before a step."""

    def kill_before(number):
        step = Trainer.train_step

        def train_step(self, now):
            if now == number:
                monkeypatch.setattr(Trainer, "train_step", step)
                raise KeyboardInterrupt
            return step(self, now)

        monkeypatch.setattr(Trainer, "train_step", train_step)

    return kill_before


@pytest.mark.parametrize("changes", [{}, *OTHERS.values()], ids=["LoKr", *OTHERS])
def test_a_killed_run_ends_with_the_same_bits(changes, run, lycoris, killed):
    options = lycoris(**changes)
    whole, _ = run(name="whole", max_train_steps=4, **options)
    killed(4)
    with pytest.raises(KeyboardInterrupt):
        run(name="stopped", max_train_steps=4, **options)
    stopped, out = run(name="stopped", max_train_steps=4, **options)
    assert "step 2 of 4" in out.getvalue()
    assert whole.read_bytes() == stopped.read_bytes()
    assert all(tensor.isfinite().all() for tensor in load_file(whole).values())


@pytest.mark.parametrize("changes", [{}, OTHERS["LoHa and OFT"], {"dora_wd": True}])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_streamed_and_recomputed_blocks_train_the_same(changes, precision, run, lycoris):
    """Also with an adapter on modulation, and regularisation images."""
    targets = LOKR["apply_preset"] | changes.get("apply_preset", {}) | {"target_name": [".*norm.*"]}
    options = lycoris(**changes | {"apply_preset": targets})
    options |= {"max_train_steps": 2, "base_model_precision": precision}
    plain, _ = run(name="plain", **options, recompute="none")
    streamed, _ = run(name="streamed", **options, recompute="full", enable_group_offload=True)
    found, expected = load_file(streamed), load_file(plain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # the recomputed products are the same ones
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), name
    regularised, _ = run(name="regularised", dataset={"is_regularisation_data": True}, **options)
    assert load_file(regularised).keys() == expected.keys()


# how bf16 bases and adapters of either type meet in the library's modules
@pytest.mark.parametrize("optimizer", ["adamw_bf16", "torch-adamw"])
@pytest.mark.parametrize(
    "algo", ["lokr", "lora", "loha", "dylora", "glora", "full", "diag-oft", "boft", "ia3"]
)
def test_runs_in_bf16(algo, optimizer, run, lycoris):
    targets = {"target_module": ["Attention"]}
    options = lycoris(algo=algo, block_size=2, apply_preset=targets)
    path, _ = run(
        **options | {"max_train_steps": 2, "optimizer": optimizer, "mixed_precision": "bf16"}
    )
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_a_start_like_the_base(run, lycoris):
    whole = {"full_matrix": True, "linear_dim": None}
    path, _ = run(max_train_steps=1, init_lokr_norm=0.1, **lycoris(**whole))
    assert all(t.any() for name, t in load_file(path).items() if name.endswith("lokr_w2"))
    with pytest.raises(ConfigError, match="init_lokr_norm fills w1 and w2 as they are, but a rank"):
        run(max_train_steps=1, init_lokr_norm=0.1, name="narrow", **lycoris())


def test_its_file_is_diffusers_and_its_config_lies_beside_it(run, lycoris):
    options = lycoris(apply_preset={"target_module": ["Attention"]})
    path, out = run(max_train_steps=2, lora_rank=7, **options)
    printed = out.getvalue()
    assert '"lora_rank", "flux_lora_target" have no effect: "lycoris_config" takes' in printed
    assert "LyCORIS: lokr on 14 modules" in printed
    beside = json.loads(path.with_name("lycoris_config.json").read_text())
    assert beside == LOKR | {"apply_preset": {"target_module": ["Attention"]}}
    saved = load_file(path)
    assert not any(name.endswith("alpha") for name in saved)
    model = FluxTransformer.__base__(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=64,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.load_lora_adapter(saved, prefix="transformer")
    model.fuse_lora()
    moved = 0
    for name, module in model.named_modules():
        if (w1 := saved.get(f"transformer.{name}.lokr_w1")) is None:
            continue
        moved += 1
        prefix = f"transformer.{name}.lokr_w2"
        w2 = saved.get(prefix)
        w2 = saved[f"{prefix}_a"] @ saved[f"{prefix}_b"] if w2 is None else w2
        delta = module.base_layer.weight - weights[f"{name}.weight"]
        # fp32, of numbers of the weights' size
        assert torch.allclose(delta, torch.kron(w1, w2), atol=1e-6)
    assert moved == 14


@pytest.mark.parametrize("changes", [{}, {"multiplier": 0.5, "use_scalar": True}])
def test_init_lora_goes_on_from_its_file(changes, run, lycoris, monkeypatch):
    first, _ = run(name="first", max_train_steps=3, **lycoris(**changes))
    begun, kind, step = [], KINDS["lycoris"], Trainer.train_step

    def train_step(self, number):
        if not begun:
            begun.append(kind.save(self.transformer, self.config.output_dir / "start"))
        if number == 4 and len(begun) == 1:
            begun.append(None)
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    # other targets and another factor, of which the file's are said
    targets = {"target_module": ["Attention"]}
    again = lycoris("other.json", factor=2, apply_preset=targets, **changes)
    again |= {"name": "second", "init_lora": str(first), "max_train_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        run(**again)
    second, out = run(**again)
    printed = " ".join(out.getvalue().split())
    assert "step 2 of 4" in printed
    assert "lokr on 18, 18 modules" in printed
    assert '"lycoris_config" is for 14 modules: no effect, the LyCORIS that the run' in printed
    assert "18 modules (the first that only one of them has" in printed
    saved, start, end = (load_file(path) for path in (first, begun[0], second))
    assert saved.keys() == start.keys() == end.keys()
    for name, tensor in saved.items():
        # halved and doubled again at most
        assert torch.equal(start[name], tensor), name
    assert any(not torch.equal(end[name], tensor) for name, tensor in saved.items())


def test_what_a_resumed_run_must_not_change(run, lycoris, write_config):
    run(max_train_steps=2, **lycoris())
    for changes, text in (
        ({"factor": 2}, "lycoris_config lokr with .*, this run has lokr with .* on .*"),
        ({"linear_alpha": 4}, r"scale 0\.5, this run has lokr with .*scale 2 on"),
        ({"algo": "loha"}, "lycoris_config lokr with .* this run has loha with"),
        (
            {"apply_preset": {"target_module": ["Attention"]}},
            r"18 modules \(.*\), this run has for 14 modules",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            run(max_train_steps=4, **lycoris(**changes))
    with pytest.raises(ConfigError, match="a LyCORIS adapter, this run has LoRA"):
        run(max_train_steps=4, optimizer="torch-adamw", mixed_precision="no")
    _, out = run(max_train_steps=4, **lycoris(rank_dropout=0.1))
    assert '"lycoris_config" was {"algo": "lokr"' in out.getvalue()


@pytest.mark.parametrize("changes", [{}, OTHERS["LoHa and OFT"], {"dora_wd": True}])
def test_a_plan_counts_it(changes, write_config, lycoris):
    config = load_config(write_config(**lycoris(**changes)))
    workload = workload_of(config, BatchShape((512, 512), 1, "photos"))
    with torch.device("meta"):
        model = FluxTransformer(guidance_embeds=True)
    kind = KINDS["lycoris"]
    kind.add(model, settings_of(config))
    trained = sum(t.numel() for t in kind.state(model).values() if t.ndim)
    assert workload.adapters == trained
    plan = account(workload, choose(wishes_of(config), facts_of(config, workload, None)))
    assert plan.vram["adapters"] == plan.vram["gradients"] == 4 * trained
    assert block_memory(workload, 0, "none").kept > 0


def test_mistakes_are_found_before_a_run(write_config, lycoris, run):
    with pytest.raises(ConfigError, match="LyCORIS has no lora_format 'kohya'"):
        run(lora_format="kohya", **lycoris())
    path, _ = run(lora_format="lycoris", max_train_steps=1, **lycoris())
    assert all(name.startswith("lycoris_") for name in load_file(path))
    for changes, text in (
        ({"algo": "full"}, '"lycoris_config" has algo full, .* int8-quanto has rounded them'),
        ({"factr": 3}, r'lycoris\.json: "factr" is not known; did you mean "factor"'),
    ):
        with pytest.raises(ConfigError, match=text):
            load_config(write_config(base_model_precision="int8-quanto", **lycoris(**changes)))
    with pytest.raises(ConfigError, match=r"config/lycoris_config\.json: no such file"):
        load_config(write_config(**FP32))
    # nobody reads the file of another kind of run
    assert load_config(write_config(lycoris_config="absent.json")).lycoris_config is None
