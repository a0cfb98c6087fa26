"""diffusers' caches skip as many calls in an accelerated transformer, whenever they come."""

import copy
import functools
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, ModelHook, SeaCacheConfig, TextKVCacheConfig
from diffusers.models.transformers import transformer_flux
from dropin_cases import counts, every_kind, hosts, output
from dropin_hosts import diffusers_host
from tiny_pipelines import TRUE_CFG, draw, tiny_pipeline, tiny_transformer

import fluxfast
from support import make_inputs, relative_error

# fp32: as for one forward; what is cached has the same roundings as what it was taken from
FP32 = 1e-5
STEPS, BLOCKS = 8, 5
BOTH_KINDS = ("transformer_blocks", "single_transformer_blocks")

pytestmark = pytest.mark.filterwarnings("ignore:fluxfast")


def taylor(_, **options):
    return TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, **options
    )


def broadcast(step):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=step,
        spatial_attention_block_identifiers=BOTH_KINDS,
    )


def faster(step):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        current_timestep_callback=step,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BFCHW",
        is_guidance_distilled=True,
        spatial_attention_block_identifiers=BOTH_KINDS,
    )


# a cache's config, from a function that tells the timestep, and whether it skips blocks or only
# attention
CACHES = {
    "first block": (lambda _: FirstBlockCacheConfig(threshold=1.5), "blocks"),
    "mag": (
        lambda _: MagCacheConfig(
            threshold=0.5, retention_ratio=0.1, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
        ),
        "blocks",
    ),
    "taylor": (taylor, "attention"),
    "taylor, lite": (functools.partial(taylor, use_lite_mode=True), "blocks"),
    "broadcast": (broadcast, "attention"),
    "faster": (faster, "attention"),
    # without what FluxPipeline would have to tell it, it lets everything be computed
    "sea": (lambda _: SeaCacheConfig(), None),
    # for another model's blocks
    "text's keys": (lambda _: TextKVCacheConfig(), None),
}


@pytest.fixture
def calls(monkeypatch):
    """How often the host's blocks and FLUX.1's attention processor were called."""
    seen = {"blocks": 0, "attention": 0}

    def count(owner, name, what):
        real = getattr(owner, name)

        @functools.wraps(real)
        def counted(*args, **kwargs):
            seen[what] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(transformer_flux.FluxTransformerBlock, "forward", "blocks")
    count(transformer_flux.FluxSingleTransformerBlock, "forward", "blocks")
    count(transformer_flux.FluxAttnProcessor, "__call__", "attention")
    return seen


def drawn(model, config, calls, **options):
    """What a pipeline draws with a cache, and the calls that the host's parts had."""
    pipe = tiny_pipeline("text", model)
    if config is not None:
        model.enable_cache(config(lambda: pipe.current_timestep))
    calls.update(blocks=0, attention=0)
    return draw(pipe, num_inference_steps=STEPS, **options), dict(calls)


@pytest.mark.parametrize("options", [{}, TRUE_CFG], ids=["", "true CFG"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_skips_as_many_calls(cache, before, options, calls):
    config, skips = CACHES[cache]
    host = tiny_transformer()
    plain, ours = copy.deepcopy(host), copy.deepcopy(host)
    all_calls = BLOCKS * STEPS * (2 if options else 1)
    expected, theirs = drawn(host, config, calls, **options)
    if before:
        pipe = tiny_pipeline("text", ours)
        ours.enable_cache(config(lambda: pipe.current_timestep))
        report = fluxfast.accelerate(ours)
        calls.update(blocks=0, attention=0)
        actual, mine = draw(pipe, num_inference_steps=STEPS, **options), dict(calls)
    else:
        report = fluxfast.accelerate(ours)
        actual, mine = drawn(ours, config, calls, **options)
    assert relative_error(actual, expected) < FP32
    # it does skip something, and that shows in what is drawn
    if skips is not None:
        assert theirs[skips] < all_calls
        assert relative_error(expected, drawn(plain, None, calls, **options)[0]) > 1e-3
    # a block's own forward is never the host's; its attention is where that is what is cached
    assert mine["blocks"] == 0 and report.calls() == theirs["blocks"]
    if skips == "attention":
        assert counts(report) == (0, all_calls, 0) and mine["attention"] == theirs["attention"]
    else:
        assert counts(report) == (theirs["blocks"], 0, 0)


def test_a_cache_outlives_what_accelerate_changes(calls):
    """Hooks keep the forward that was there: it must be the host's again after `restore`."""
    config, _ = CACHES["first block"]
    host = tiny_transformer()
    expected, theirs = drawn(host, config, calls)
    for before in (True, False):
        ours = tiny_transformer()
        pipe = tiny_pipeline("text", ours)
        if not before:
            fluxfast.accelerate(ours)
        ours.enable_cache(config(lambda: None))
        if before:
            fluxfast.accelerate(ours)
        fluxfast.restore(ours)
        calls.update(blocks=0, attention=0)
        assert torch.equal(draw(pipe, num_inference_steps=STEPS), expected)
        assert calls == theirs
        ours.disable_cache()
        report = fluxfast.accelerate(ours)
        assert relative_error(draw(pipe), draw(tiny_pipeline("text", tiny_transformer()))) < FP32
        assert counts(report) == (BLOCKS * 3, 0, 0)


def test_hooks_that_come_and_go_leave_nothing_behind():
    """They leave the forward that was ours as the block's own, which restore takes away."""
    ours = tiny_transformer()
    fluxfast.accelerate(ours)
    ours.enable_cache(CACHES["first block"][0](None))
    ours.disable_cache()
    assert "forward" in ours.transformer_blocks[0].__dict__
    fluxfast.restore(ours)
    assert "forward" not in ours.transformer_blocks[0].__dict__
    with torch.no_grad():
        fluxfast.accelerate(ours, strict=True)


@pytest.mark.parametrize("before", [True, False])
def test_a_copy_with_hooks_computes_with_its_own(before):
    host = tiny_transformer()
    ours = copy.deepcopy(host)
    if before:
        report = fluxfast.accelerate(ours)
    for block in (*ours.transformer_blocks, *ours.single_transformer_blocks):
        add_hook_to_module(block, AccelerateHook())
    if not before:
        report = fluxfast.accelerate(ours)
    again = copy.deepcopy(ours)
    for model in (host, again):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.8)
    pipes = [tiny_pipeline("text", model) for model in (host, again)]
    assert relative_error(draw(pipes[1]), draw(pipes[0])) < FP32
    assert counts(fluxfast.dropin.inspect(again)) == (BLOCKS * 3, 0, 0) and report.calls() == 0
    fluxfast.restore(again)
    assert torch.equal(draw(pipes[1]), draw(pipes[0]))


@every_kind
def test_a_forward_that_was_wrapped_is_the_hosts_after_restore(kind):
    host, ours = hosts(kind)
    fluxfast.accelerate(ours)
    inputs = make_inputs(2, 3, 5, guidance=False)
    for block in ours.modules():
        if type(block).__name__.endswith("Block"):
            name = "_forward" if kind == "bfl" else "forward"
            inner = getattr(block, name)
            setattr(block, name, lambda *a, inner=inner, **k: inner(*a, **k))
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    fluxfast.restore(ours)
    assert torch.equal(output(ours, inputs), output(host, inputs))


class Doubles(ModelHook):
    def post_forward(self, module, out):
        return tuple(2 * x for x in out)


def test_several_hooks_one_around_the_other():
    host = diffusers_host()
    ours = copy.deepcopy(host)
    inputs = make_inputs(1, 3, 4, guidance=False)
    for model in (host, ours):
        for i, block in enumerate(
            (model.transformer_blocks[1], model.single_transformer_blocks[0])
        ):
            registry = HookRegistry.check_if_exists_or_initialize(block)
            for name in "abc"[: i + 2]:
                registry.register_hook(Doubles(), name)
    report = fluxfast.accelerate(ours, strict=True)
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    for model in (host, ours):
        model.transformer_blocks[1]._diffusers_hook.remove_hook("a")
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (2 * BLOCKS, 0, 0)


def tea(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, **rest):
    """A model's forward as TeaCache replaces it: by the first block's modulated input it decides
    whether to compute, or to add what the blocks added before.
    """
    x, txt, seen = (
        self.x_embedder(hidden_states),
        self.context_embedder(encoder_hidden_states),
        self.seen,
    )
    times = [timestep * 1000, rest["guidance"] * 1000]
    temb = self.time_text_embed(*times, pooled_projections)
    pe = self.pos_embed(torch.cat([rest["txt_ids"], rest["img_ids"]]))
    changed = self.transformer_blocks[0].norm1(x, emb=temb)[0]
    if seen["computed"]:
        seen["sum"] += float((changed - seen["at"]).abs().mean() / seen["at"].abs().mean())
    computes = not seen["computed"] or seen["sum"] >= 0.35
    seen["computed"].append(computes)
    seen["at"], img = changed, x
    if computes:
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            txt, img = block(
                hidden_states=img, encoder_hidden_states=txt, temb=temb, image_rotary_emb=pe
            )
        seen["sum"], seen["residual"] = 0.0, img - x
    return (self.proj_out(self.norm_out(x + seen["residual"], temb)),)


@pytest.mark.parametrize("before", [True, False])
def test_a_cache_in_the_models_forward(before):
    host = tiny_transformer()
    ours = copy.deepcopy(host)
    if not before:
        report = fluxfast.accelerate(ours)
    results = []
    for model in (host, ours):
        model.seen, model.forward = {"sum": 0.0, "computed": []}, MethodType(tea, model)
        if before and model is ours:
            report = fluxfast.accelerate(ours)
        results.append(draw(tiny_pipeline("text", model), num_inference_steps=STEPS))
    assert relative_error(results[1], results[0]) < FP32
    computed = host.seen["computed"]
    assert ours.seen["computed"] == computed and 1 < sum(computed) < STEPS
    assert counts(report) == (BLOCKS * sum(computed), 0, 0)
