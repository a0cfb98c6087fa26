"""An accelerated diffusers model is still the same object, however it is looked at."""

import copy
import inspect
import itertools
import pickle
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from dropin_hosts import EVERYTHING, add_lora, diffusers_host, pair
from peft import LoraConfig, get_peft_model

import fluxfast
from support import make_inputs, relative_error

# two orders of summation differ by a few ulp per product, and depth adds them up
FP32 = 1e-5


def output(model, **inputs):
    with torch.no_grad():
        return model(**(make_inputs(1, 3, 4, guidance=False) | inputs)).sample


def test_the_object_is_what_it_was():
    host, ours = pair(diffusers_host)
    before = {name: id(p) for name, p in ours.named_parameters()}
    keys, modules = list(ours.state_dict()), [name for name, _ in ours.named_modules()]
    report = fluxfast.accelerate(ours)
    assert (
        report.layout == "diffusers"
        and len(report.blocks) == 5
        and all(block.fused for block in report.blocks)
    )
    assert type(ours) is FluxTransformer2DModel
    assert {name: id(p) for name, p in ours.named_parameters()} == before
    assert list(ours.state_dict()) == keys and [name for name, _ in ours.named_modules()] == modules
    assert (ours.dtype, ours.device, ours.config) == (host.dtype, host.device, host.config)
    kinds = {
        FluxTransformerBlock: ours.transformer_blocks,
        FluxSingleTransformerBlock: ours.single_transformer_blocks,
    }
    for kind, blocks in kinds.items():
        for block in blocks:
            assert isinstance(block, kind)
            assert (type(block).__name__, type(block).__module__) == (
                kind.__name__,
                kind.__module__,
            )
            assert type(block).__name__ in ours._no_split_modules
            assert (
                list(inspect.signature(block.forward).parameters)
                == list(inspect.signature(kind.forward).parameters)[1:]
            )


def test_restore_leaves_nothing_behind():
    host, ours = pair(diffusers_host)
    attributes = [set(module.__dict__) for module in ours.modules()]
    fluxfast.accelerate(ours, compute="int8", recompute="full", tread=[route()])
    fluxfast.restore(ours)
    assert [set(module.__dict__) for module in ours.modules()] == attributes
    assert type(ours.transformer_blocks[0]) is FluxTransformerBlock
    assert torch.equal(output(ours), output(host))
    fluxfast.accelerate(ours)
    for model in (host, ours):
        add_lora(model)
    fluxfast.restore(ours)
    assert torch.equal(output(ours), output(host))


def route(ratio=0.5, first=1, last=-2):
    return {"selection_ratio": ratio, "start_layer_idx": first, "end_layer_idx": last}


def test_copies_and_pickles_are_accelerated_too():
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(ours, recompute="selective")
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        block = again.transformer_blocks[0]
        assert type(block) is type(ours.transformer_blocks[0]) and block.policy == "selective"
        assert not {id(p) for p in again.parameters()} & {id(p) for p in ours.parameters()}
        assert relative_error(output(again), output(host)) < FP32
        fluxfast.restore(again)
        assert torch.equal(output(again), output(host))


def test_saves_as_before(tmp_path):
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(ours)
    ours.save_pretrained(tmp_path / "ours")
    host.save_pretrained(tmp_path / "host")
    assert (tmp_path / "ours/config.json").read_text() == (
        tmp_path / "host/config.json"
    ).read_text()
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(output(again), output(host))


def test_adapters_come_and_go():
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(ours)

    def check(what):
        expected, actual = output(host), output(ours)
        assert relative_error(actual, expected) < FP32, what
        return actual

    seen = [check("none")]

    def both(what, do):
        do(host)
        do(ours)
        seen.append(check(what))

    both("added", lambda m: add_lora(m, "a"))
    both("another", lambda m: add_lora(m, "b", targets=["to_q", "proj_mlp", "linear"], seed=9))
    both("two, scaled", lambda m: m.set_adapters(["a", "b"], [0.4, 1.7]))
    assert relative_error(output(ours, joint_attention_kwargs={"scale": 0.3}), seen[-1]) > 1e-3
    both("switched", lambda m: m.set_adapter("a"))
    both("disabled", lambda m: m.disable_adapters())
    both("enabled", lambda m: m.enable_adapters())
    both("merged", lambda m: m.fuse_lora())
    both("unmerged", lambda m: m.unfuse_lora())
    both("deleted", lambda m: m.delete_adapters(["a", "b"]))
    # only merging and unmerging change nothing
    for i, (before, after) in enumerate(itertools.pairwise(seen)):
        assert i in (6, 7) or relative_error(after, before) > 1e-3, i


def test_scale_of_a_call():
    host, ours = pair(diffusers_host)
    for model in (host, ours):
        add_lora(model)
    fluxfast.accelerate(ours)
    for scale in (0.3, 1.0, 0.0):
        kwargs = {"joint_attention_kwargs": {"scale": scale}}
        assert relative_error(output(ours, **copy.deepcopy(kwargs)), output(host, **kwargs)) < FP32


def test_lora_files_and_hot_swap(tmp_path):
    source = diffusers_host()
    add_lora(source)
    source.save_lora_adapter(tmp_path / "one")
    add_lora(source, "second", seed=8)
    source.save_lora_adapter(tmp_path / "two", adapter_name="second")
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(ours)
    options = {
        "prefix": None,
        "adapter_name": "x",
        "weight_name": "pytorch_lora_weights.safetensors",
    }
    for model in (host, ours):
        model.load_lora_adapter(tmp_path / "one", **options)
    first = output(ours)
    assert relative_error(first, output(host)) < FP32
    for model in (host, ours):
        model.load_lora_adapter(tmp_path / "two", hotswap=True, **options)
    assert relative_error(output(ours), output(host)) < FP32
    assert relative_error(output(ours), first) > 1e-3


def test_hooks_run_and_change_what_they_change():
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(ours)
    calls = []

    def double(module, args, out):
        calls.append(module)
        return out * 2

    names = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.act_mlp",
    ]
    names += [
        "single_transformer_blocks.1.proj_out",
        "transformer_blocks.0.norm2",
        "single_transformer_blocks.2.attn.norm_q",
    ]
    handles = []
    for name in names:
        for model in (host, ours):
            hook = double
            if name.endswith("attn"):
                hook = lambda module, args, out: (out[0] * 2, out[1])  # noqa: E731
            handles.append(model.get_submodule(name).register_forward_hook(hook))
    assert relative_error(output(ours), output(host)) < FP32
    assert sum(module is ours.transformer_blocks[0].attn.to_q for module in calls) == 1
    report = fluxfast.dropin.inspect(ours)
    assert sum(not block.fused for block in report.blocks) == 5
    for handle in handles:
        handle.remove()
    assert all(block.fused for block in fluxfast.dropin.inspect(ours).blocks)
    seen = []
    ours.single_transformer_blocks[1].register_forward_hook(
        lambda module, args, out: seen.append([x.shape for x in out])
    )
    output(ours)
    # text and image apart, as diffusers gives them
    assert seen == [[(1, 7, 64), (1, 12, 64)]]


def test_backends_projections_and_control_residuals():
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(ours)
    residuals = {
        "controlnet_block_samples": [torch.randn(1, 12, 64)],
        "controlnet_single_block_samples": [torch.randn(1, 12, 64), torch.randn(1, 12, 64)],
    }
    for do in (
        lambda m: m.set_attention_backend("native"),
        lambda m: m.set_attention_backend("_native_math"),
        lambda m: m.reset_attention_backend(),
        lambda m: m.fuse_qkv_projections(),
        lambda m: m.unfuse_qkv_projections(),
    ):
        for model in (host, ours):
            do(model)
            # projections that are fused later would train
            model.requires_grad_(False)
        assert relative_error(output(ours, **residuals), output(host, **residuals)) < FP32
        assert all(block.fused for block in fluxfast.dropin.inspect(ours).blocks)


def test_choices():
    _, ours = pair(diffusers_host)
    report = fluxfast.accelerate(
        ours, compute="int8", attention="ref", recompute=["full"] * 4 + ["none"], impl="ref"
    )
    assert (report.compute, report.attention, report.recompute, report.impl) == (
        "int8",
        "ref",
        "4 full, 1 none",
        "ref",
    )
    report = fluxfast.accelerate(ours)
    assert (report.compute, report.attention, report.recompute) == (
        "same",
        "auto",
        "as the host checkpoints",
    )
    assert len(report.linears) == 46 and report.count("fused") == 39
    for wrong, match in (
        ({"compute": "int4"}, "compute: expected one of .*; did you mean 'int8'"),
        ({"attention": "sage"}, "attention: expected one of"),
        ({"impl": "cuda"}, "impl: expected one of"),
        ({"recompute": "some"}, "recompute: expected one of none, selective, full; got 'some'"),
        ({"recompute": ["full"]}, "1 policies for 5 blocks"),
        ({"tread": [route(1.5)]}, "selection_ratio"),
    ):
        with pytest.raises(ValueError, match=match):
            fluxfast.accelerate(ours, **wrong)
    with pytest.raises(TypeError, match=r"expected diffusers' FluxTransformer2DModel.*got Linear"):
        fluxfast.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="own model already"):
        fluxfast.accelerate(fluxfast.FluxTransformer(**dict(ours.config)))
    with pytest.raises(ValueError, match=r"call fluxfast\.accelerate first"):
        fluxfast.dropin.inspect(diffusers_host())


def test_report_says_what_and_why():
    ours = diffusers_host()
    add_lora(ours, targets=EVERYTHING)
    ours.transformer_blocks[1].attn.to_v.register_forward_pre_hook(lambda *_: None)
    report = fluxfast.accelerate(ours)
    (own,) = (linear for linear in report.linears if linear.runs == "module")
    assert own.name == "transformer_blocks.1.attn.to_v" and own.because == "it has hooks"
    (block,) = (block for block in report.blocks if not block.fused)
    assert block.name == "transformer_blocks.1" and "1 of its linears" in block.because
    text = str(report)
    assert (
        "4 of 5 blocks can run fused" in text
        and "it has hooks (transformer_blocks.1.attn.to_v)" in text
    )
    assert report.to_dict()["linears"][0] == {
        **{
            "name": "transformer_blocks.0.attn.to_q",
            "runs": "fused",
            "base": "float32",
            "adapters": 1,
            "because": None,
        }
    }


def test_diffusers_own_machinery():
    """diffusers' caches, layer casts and offload, which work by a block's class or by hooks."""
    inputs = make_inputs(1, 3, 4, guidance=False)
    for use in (
        lambda m: m.enable_cache(FirstBlockCacheConfig(threshold=0.0)),
        lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        lambda m: m.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        lambda m: cpu_offload(m, torch.device("cpu")),
    ):
        host, ours = pair(diffusers_host)
        fluxfast.accelerate(ours)
        results = []
        for model in (host, ours):
            use(model)
            cached = (
                model.cache_context("x")
                if getattr(model, "is_cache_enabled", False)
                else nullcontext()
            )
            with torch.no_grad(), cached:
                results.append([model(**inputs).sample for _ in range(2)])
        for actual, expected in zip(results[1], results[0], strict=True):
            assert relative_error(actual, expected) < FP32


def test_wrappers_around_the_model():
    host, ours = pair(diffusers_host)
    wrapped = get_peft_model(
        ours, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    )
    assert len(fluxfast.accelerate(wrapped).blocks) == 5
    assert relative_error(output(wrapped.unload()), output(host)) < FP32
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(torch.compile(ours))
    assert fluxfast.dropin.inspect(ours).layout == "diffusers"
    # a checkpoint wrapper in a block's place, as OneTrainer puts one
    host, ours = pair(diffusers_host)
    ours.transformer_blocks[0] = Wrapper(ours.transformer_blocks[0])
    assert len(fluxfast.accelerate(ours).blocks) == 5
    assert relative_error(output(ours), output(host)) < FP32


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_block_whose_forward_was_replaced_before():
    host, ours = pair(diffusers_host)
    block = ours.transformer_blocks[0]
    # it asks the class, and keeps no forward of the block's that could be exchanged
    block.forward = lambda *args, **kwargs: FluxTransformerBlock.forward(block, *args, **kwargs)
    report = fluxfast.accelerate(ours)
    assert report.blocks[0].because == "its forward was replaced before accelerate()"
    assert report.count("module") == 14 and relative_error(output(ours), output(host)) < FP32
