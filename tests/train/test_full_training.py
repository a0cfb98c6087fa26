"""Runs that train every weight of a transformer: `model_type` "full"."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from fluxfast.adapters.full import FullKind
from fluxfast.adapters.kind import AdapterSettings, trainable_parameters
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.trainer import Trainer
from small_flux import small_flux
from support import make_inputs, relative_error

FULL = {"model_type": "full", "lora_rank": None, "flux_lora_target": None}
FP32 = {"optimizer": "torch-adamw", "mixed_precision": "no"}


def both_models(**config):
    """Ours with every weight training, and diffusers' with the same weights, in fp64."""
    ours = small_flux(dtype=torch.float64, **config)
    FullKind().add(ours, AdapterSettings("", rank=0, alpha=0, dtype=torch.float64))
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**{k: v for k, v in ours.config.items() if k[0] != "_"})
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return ours, theirs.requires_grad_(True)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_gradient_equals_diffusers(recompute):
    ours, theirs = both_models()
    ours.set_recompute(recompute)
    inputs = {name: t.double() for name, t in make_inputs(2, 3, 4).items()}
    target = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(5)).double()
    for model in (ours, theirs):
        (model(**inputs).sample - target).square().mean().backward()
    expected = dict(theirs.named_parameters())
    assert trainable_parameters(ours).keys() == expected.keys()
    for name, p in ours.named_parameters():
        assert expected[name].grad.norm() > 0, name
        # diffusers makes its time and position embeddings in fp32
        assert relative_error(p.grad, expected[name].grad) < 1e-5, name


def test_gradients_under_masked_text_equal_those_of_the_text_alone():
    ours, theirs = both_models()
    inputs = {name: t.double() for name, t in make_inputs(1, 3, 4, text=7).items()}
    mask = (torch.arange(7) < 4)[None]
    ours(**inputs, text_mask=mask).sample.square().mean().backward()
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :4]
    inputs["txt_ids"] = inputs["txt_ids"][:4]
    theirs(**inputs).sample.square().mean().backward()
    for (name, p), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(p.grad, expected.grad) < 1e-5, name


def test_bf16_products_of_fp32_weights_come_near_those_in_fp32():
    ours = small_flux(num_layers=1, num_single_layers=1).requires_grad_(True)
    inputs = make_inputs(2, 3, 4)
    exact = ours(**inputs).sample
    ours.autocast_dtype = torch.bfloat16
    rounded = ours(**inputs).sample
    assert 1e-4 < relative_error(rounded, exact) < 3e-2
    rounded.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.fixture
def base(workspace):
    return load_file(workspace / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def test_bf16_run_moves_every_weight_and_diffusers_loads_it(run, base):
    # AdamW's first step changes each weight by the rate, which no rounding may swallow: neighbours
    # of 1 are 0.008 apart in bf16
    fast = FULL | {"learning_rate": 0.02}
    path, out = run(**fast, max_train_steps=2, use_ema=True, ema_decay=0.5)
    assert path.parent.name == "transformer"
    trained = load_file(path)
    assert trained.keys() == base.keys()
    assert {t.dtype for t in trained.values()} == {torch.bfloat16}
    still = [name for name, t in trained.items() if torch.equal(t, base[name].bfloat16())]
    assert not still
    count = sum(t.numel() for t in trained.values())
    printed = out.getvalue()
    assert f"all of the transformer: {count:,} parameters" in printed
    assert "blocks op by op, as their weights train" in printed and "LoRA" not in printed

    theirs = FluxTransformer2DModel.from_pretrained(path.parent, torch_dtype=torch.float32)
    ours = FluxTransformer.from_pretrained(path.parent, torch_dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 4, 64, generator=g),
        "encoder_hidden_states": torch.randn(1, 3, 64, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        assert relative_error(ours(**inputs).sample, theirs(**inputs).sample) < 1e-5
    average = load_file(path.parents[1] / "ema" / "transformer" / path.name)
    assert average.keys() == trained.keys()
    assert any(not torch.equal(average[name], trained[name]) for name in trained)
    assert json.loads((path.parents[1] / "ema/transformer/config.json").read_text())


OPTIONS = {
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "use_ema": True,
    "flux_attention_masked_training": True,
    "caption_dropout_probability": 0.3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "tread_config": {
        "routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 1}]
    },
}


@pytest.mark.parametrize("more", [{}, OPTIONS, {"optimizer": "torch-adamw"}])
def test_a_run_is_resumed_to_the_same_bits(run, monkeypatch, more):
    whole, _ = run(**FULL, **more, name="whole", max_train_steps=4)
    step = Trainer.train_step

    def train_step(self, number):
        if number == 4:
            monkeypatch.setattr(Trainer, "train_step", step)
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        run(**FULL, **more, name="stopped", max_train_steps=4)
    stopped, out = run(**FULL, **more, name="stopped", max_train_steps=4)
    assert "step 2 of 4" in out.getvalue()
    assert whole.read_bytes() == stopped.read_bytes()
    again, out = run(**FULL, **more, name="stopped", max_train_steps=4)
    assert again == stopped and "the transformer" in out.getvalue()


def test_a_lora_does_not_go_on_from_it(run):
    run(**FULL, max_train_steps=2)
    with pytest.raises(ValueError, match="model_type full, this run has lora"):
        run(max_train_steps=4)


def test_the_loss_of_a_few_images_falls(trainer):
    made = trainer(**FULL, **FP32, learning_rate=3e-3, max_train_steps=40, lr_warmup_steps=0)
    made.batches = made.data.loader(0, made.objective.example)
    example = next(made.batches)
    losses = []
    for _ in range(40):
        loss = made.objective.loss(example)
        loss.backward()
        made.gradients.take()
        made.gradients.hand_over()
        made.optimizer.step()
        made.optimizer.zero_grad()
        losses.append(loss.item())
    made.batches.close()
    assert losses[-1] < 0.3 * losses[0]


def test_regularisation_data_is_refused(run):
    with pytest.raises(ConfigError, match="has no such base: remove that key"):
        run(**FULL, others=[], dataset={"is_regularisation_data": True})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_rank": 4}, '"lora_rank" is an option of adapters'),
        ({"lora_alpha": 4, "init_lora": "x"}, '"lora_alpha", "init_lora" are options'),
        ({"base_model_precision": "int8-quanto"}, "rounded weights can't be trained"),
        ({"enable_group_offload": True}, '"enable_group_offload" is true'),
        ({"vram_budget": 8}, '"vram_budget" is 8'),
        ({"cuda_graphs": True}, '"cuda_graphs" is true'),
        ({"recompute": "selective"}, "recompute all or nothing"),
        ({"compute_precision": "int8"}, '"compute_precision" is int8'),
        ({"push_to_hub": True}, "not implemented yet together"),
    ],
)
def test_what_can_not_go_with_it_is_refused(write_config, changes, told):
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(**FULL | changes))
    assert told in str(caught.value) and '"model_type" is full' in str(caught.value)


def test_schnell_wants_to_be_told_that_there_is_no_assistant(write_config):
    schnell = {**FULL, "model_flavour": "schnell"}
    with pytest.raises(ConfigError, match="no assistant LoRA can be beside that"):
        load_config(write_config(**schnell))
    load_config(write_config(**schnell, disable_assistant_lora=True, flux_fast_schedule=True))
