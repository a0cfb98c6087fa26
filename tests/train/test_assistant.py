"""The assistant LoRA: there in training, not trained, not saved, off at validation."""

import json

import pytest
import torch
from kill_cases import Killed, kill_at, same_files
from peft import LoraConfig
from safetensors.torch import load_file
from test_lycoris_run import LOKR
from test_trainer import BF16, FP32, TREAD

from fluxfast.adapters.lora import load_lora, lora_layers
from fluxfast.adapters.presets import preset_targets
from fluxfast.cli.plan import plan_report
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.assistant import NAME, activate, drawing
from support import SMALL, make_inputs

SCHNELL = FP32 | {"model_flavour": "schnell", "flux_fast_schedule": True}


@pytest.fixture
def assistant(run):
    """The file of a LoRA that does something."""
    lora, _ = run(**FP32, name="assistant", max_train_steps=2, learning_rate=0.05)
    return str(lora)


KINDS = {"standard": {}, "dora": {"use_dora": True, "lora_dropout": 0.0}}


def predictions(trainer, workspace, assistant, strength):
    """The first batch's prediction: of training, of drawing, without the trained adapter, and what
    the base gives with the assistant at that strength and without it.
    """
    model, objective = trainer.transformer, trainer.objective
    batches = trainer.data.loader(0, objective.example)
    inputs = objective._model_inputs(next(batches))
    batches.close()
    base = FluxTransformer.from_pretrained(workspace / "pipeline", subfolder="transformer")

    def predict(transformer):
        with torch.no_grad():
            return transformer.eval()(**inputs, return_dict=False)[0]

    found = {"training": predict(model), "held": objective._base_prediction(inputs)}
    with drawing(model, trainer.config):
        found["drawing"] = predict(model)
    assert torch.equal(predict(model), found["training"])
    found["base"] = predict(base)
    load_lora(base, assistant)
    for module in base.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= strength
    found["assisted"] = predict(base)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_begins_on_the_base_with_its_assistant(trainer, workspace, assistant, kind):
    settings = SCHNELL | KINDS[kind] | {"assistant_lora_strength": 0.5}
    made = trainer(**settings, assistant_lora_path=assistant)
    found = predictions(made, workspace, assistant, 0.5)
    # fp32 products in another order; nothing is trained yet
    for one, other in (("training", "assisted"), ("held", "assisted"), ("drawing", "base")):
        torch.testing.assert_close(found[one], found[other], rtol=1e-4, atol=1e-5, msg=one)
    assert (found["assisted"] - found["base"]).abs().max() > 1e-3
    # what trains is the adapter alone
    trained = [n for n, p in made.transformer.named_parameters() if p.requires_grad]
    assert trained and not any("assistant" in name for name in trained)


def test_it_may_stay_on_for_drawing(trainer, workspace, assistant):
    made = trainer(**SCHNELL, assistant_lora_path=assistant, assistant_lora_inference_strength=1.0)
    found = predictions(made, workspace, assistant, 1.0)
    torch.testing.assert_close(found["drawing"], found["assisted"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mode",
    [
        BF16 | TREAD | {"base_model_precision": "int8-quanto"},
        FP32 | {"enable_group_offload": True},
        FP32 | {"base_model_precision": "nf4-bnb", "modulation_ahead": True},
        FP32 | {"dataset": {"is_regularisation_data": True, "repeats": 20}},
    ],
    ids=["int8-tread", "streamed", "nf4-ahead", "regularisation"],
)
def test_a_killed_run_ends_with_the_same_bits_and_saves_its_own_adapter(
    run, assistant, monkeypatch, mode
):
    mode = SCHNELL | mode | {"assistant_lora_path": assistant}
    whole, _ = run(name="whole", **mode)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **mode)
    killed, out = run(name="killed", **mode)
    assert same_files(whole, killed)
    assert "frozen and not saved" in " ".join(out.getvalue().split())
    plain, _ = run(name="plain", **mode | {"disable_assistant_lora": True})
    assert load_file(plain).keys() == load_file(whole).keys()
    if "dataset" not in mode:
        assert not same_files(whole, plain)


def test_an_assistant_on_modulation_keeps_it_on_the_device(run):
    """The run's own adapter is not there, so that only the loaded model shows it."""
    lora, _ = run(**FP32, name="norms", max_train_steps=2, flux_lora_target="ai-toolkit")
    mode = SCHNELL | {"assistant_lora_path": str(lora), "max_train_steps": 2}
    run(**mode, name="on the device")
    with pytest.raises(ConfigError, match=r"norm(1|1_context)?\.linear"):
        run(**mode, name="ahead", modulation_ahead=True)


def two_adapters(policy, targets):
    """A model in fp64 with a frozen adapter beside the one that trains, and one with it merged."""
    pair = []
    for merged in (False, True):
        torch.manual_seed(0)
        model = FluxTransformer(**SMALL).double().requires_grad_(False).train()
        for name, rank in ((NAME, 5), ("default", 3)):
            model.add_adapter(LoraConfig(r=rank, target_modules=list(targets)), adapter_name=name)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.2
        if merged:
            for layer in lora_layers(model, NAME).values():
                layer.merge(adapter_names=[NAME])
                # PEFT computes nothing beside a merged adapter
                layer.merged_adapters.clear()
                layer.delete_adapter(NAME)
                layer._active_adapter = ["default"]
        else:
            activate(model)
        model.set_recompute(policy)
        pair.append(model)
    return pair


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("target", ["all+ffs", "ai-toolkit"])
def test_gradients_beside_it_are_those_on_a_base_that_it_is_merged_into(policy, target):
    targets = [name for name in preset_targets(target) if "qkv" not in name]
    found = []
    for model in two_adapters(policy, targets):
        given = make_inputs(1, 7, 9)
        given = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in given.items()
        }
        given["hidden_states"].requires_grad_()
        out = model(**given, return_dict=False)[0]
        out.square().sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append({"out": out.detach(), "input": given["hidden_states"].grad, **trained})
    one, other = found
    assert one.keys() == other.keys() and len(one) > 20
    for name in one:
        # fp64, but for the sinusoids of positions and timesteps in fp32, which both have
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-8, msg=name)


def test_a_plan_counts_it(write_config, assistant):
    def planned(**settings):
        report = plan_report(load_config(write_config(**SCHNELL, **settings)), "RTX 4090")
        return report["vram"]["adapters"], " ".join(report["notes"])

    elements = sum(tensor.numel() for tensor in load_file(assistant).values())
    alone, _ = planned(disable_assistant_lora=True)
    # fp32
    assert planned(assistant_lora_path=assistant)[0] == alone + 4 * elements
    beside, notes = planned(assistant_lora_path="somebody/not-here")
    assert beside == alone and "somebody/not-here is not here, and not counted" in notes


def test_beside_lycoris_it_is_refused(run, tmp_path):
    file = tmp_path / "lokr.json"
    file.write_text(json.dumps(LOKR))
    with pytest.raises(ConfigError, match='"disable_assistant_lora": true'):
        run(**SCHNELL, lora_type="lycoris", lycoris_config=str(file))


def test_a_file_that_is_not_there_is_named_before_anything_is_loaded(run, tmp_path):
    with pytest.raises(ConfigError, match="gone"):
        run(**SCHNELL, assistant_lora_path=str(tmp_path / "gone.safetensors"))
