"""diffusers' pipelines draw the same with an accelerated transformer."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from dropin_cases import counts
from dropin_hosts import ATTENTION, add_lora
from peft import get_peft_model_state_dict
from tiny_pipelines import (
    PIPELINES,
    STEPS,
    TRUE_CFG,
    draw,
    embeds,
    tiny_pipeline,
    tiny_transformer,
)

import fluxfast
from support import relative_error

# fp32: as for one forward (1e-5), since a step adds a part of a prediction to the latents, and the
# sigmas' differences sum to 1
FP32 = 1e-5
BLOCKS = 5


def both(kind="text", **config):
    """The same pipeline twice, the second one accelerated, and the report."""
    host = tiny_transformer(PIPELINES[kind][1], **config)
    ours = copy.deepcopy(host)
    report = fluxfast.accelerate(ours)
    return tiny_pipeline(kind, host), tiny_pipeline(kind, ours), report


def assert_draws(host, ours, kind="text", **changes):
    expected, actual = draw(host, kind, **changes), draw(ours, kind, **changes)
    assert relative_error(actual, expected) < FP32
    return actual


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_draw_what_they_drew(kind):
    """Nobody freezes a transformer to draw with it: it is the lack of gradients that counts."""
    host, ours, report = both(kind)
    assert any(p.requires_grad for p in ours.transformer.parameters())
    assert "calls without gradients run fused" in report.blocks[0].because
    assert_draws(host, ours, kind)
    # a step fewer where noise is added to a picture in part; a negative prompt's calls are more
    steps = (STEPS - 1 if "strength" in PIPELINES[kind][2] else STEPS) * (1 + (kind == "true CFG"))
    assert counts(report) == (BLOCKS * steps, 0, 0)


def test_several_pictures_of_one_prompt():
    """The prompt's embeddings are of one sample, and the first block repeats them."""
    host, ours, report = both(guidance_embeds=False)
    pictures = [draw(pipe, num_images_per_prompt=2, output_type="pt") for pipe in (host, ours)]
    assert pictures[0].shape[:2] == (2, 3) and relative_error(*pictures) < FP32
    assert counts(report) == (BLOCKS * STEPS, 0, 0)


def test_inference_mode():
    host, ours, report = both()
    with torch.inference_mode():
        assert_draws(host, ours)
    assert counts(report) == (BLOCKS * STEPS, 0, 0)


def test_a_controlnet_can_be_accelerated_as_well():
    host, ours, _ = both("controlnet")
    report = fluxfast.accelerate(ours.controlnet)
    assert_draws(host, ours, "controlnet")
    assert counts(report) == (2 * STEPS, 0, 0)


def test_another_pipeline_of_the_same_parts():
    host, ours, report = both()
    others = [FluxImg2ImgPipeline.from_pipe(pipe) for pipe in (host, ours)]
    for other in others:
        other.set_progress_bar_config(disable=True)
    assert others[1].transformer is ours.transformer
    assert_draws(*others, "img2img")
    assert counts(report) == (BLOCKS * (STEPS - 1), 0, 0)


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    source = tiny_transformer()
    add_lora(source, targets=[*ATTENTION, "proj_mlp", "norm.linear"])
    FluxPipeline.save_lora_weights(folder, get_peft_model_state_dict(source))
    return folder / "pytorch_lora_weights.safetensors"


def test_loras_come_are_scaled_fused_and_go(lora_file):
    host, ours, report = both()
    drawn = [assert_draws(host, ours)]

    def after(what, **changes):
        for pipe in (host, ours):
            what(pipe)
        drawn.append(assert_draws(host, ours, **changes))

    after(lambda p: p.load_lora_weights(str(lora_file), adapter_name="one"))
    after(lambda p: p.set_adapters(["one"], [0.4]))
    after(lambda p: p.set_adapters(["one"], [1.0]), joint_attention_kwargs={"scale": 0.3})
    after(lambda p: p.fuse_lora(lora_scale=0.7))
    # it goes on with the scale that it was fused with
    after(lambda p: p.unfuse_lora())
    after(lambda p: p.unload_lora_weights())
    for i, same_as in enumerate((None, None, None, None, 4, 0), 1):
        if same_as is None:
            assert relative_error(drawn[i], drawn[i - 1]) > 1e-3, i
        else:
            assert relative_error(drawn[i], drawn[same_as]) < FP32, i
    assert counts(report) == (7 * BLOCKS * STEPS, 0, 0)


def test_a_lora_that_is_there_before(lora_file):
    host = tiny_pipeline("text", tiny_transformer())
    host.load_lora_weights(str(lora_file))
    ours = tiny_pipeline("text", copy.deepcopy(host.transformer))
    with torch.no_grad():
        report = fluxfast.accelerate(ours.transformer, strict=True)
    assert all(block.fused for block in report.blocks)
    assert_draws(host, ours, **TRUE_CFG)


@pytest.mark.filterwarnings("ignore:fluxfast")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("way", ["block_level", "leaf_level", "hooks of accelerate"])
def test_offloading(before, way):
    """What comes and goes by hooks on linears is called; blocks that come as a whole are fused."""

    def offload(model):
        cpu = torch.device("cpu")
        if way == "hooks of accelerate":
            cpu_offload(model, cpu)
        else:
            options = {"num_blocks_per_group": 2} if way == "block_level" else {}
            model.enable_group_offload(cpu, cpu, offload_type=way, **options)

    host = tiny_transformer()
    ours = copy.deepcopy(host)
    if before:
        offload(ours)
    report = fluxfast.accelerate(ours)
    if not before:
        offload(ours)
    offload(host)
    pipes = [tiny_pipeline("text", model) for model in (host, ours)]
    for pipe in pipes:
        # a pipeline asks its parts for a device, and offloaded ones have none
        pipe.vae = pipe.vae if way.endswith("level") else cpu_offload(pipe.vae, "cpu")
    assert_draws(*pipes)
    fused = BLOCKS * STEPS if way == "block_level" else 0
    assert counts(report)[0] == fused and report.calls() == BLOCKS * STEPS


def test_bf16(monkeypatch):
    """A CPU without a matrix unit: blocks in fp32, which the host's roundings are compared with."""
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: False)
    exact = tiny_transformer().bfloat16().float()
    host, ours = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    report = fluxfast.accelerate(ours)
    # values whose product with 1000 bf16 holds exactly: elsewhere the two precisions embed
    # different timesteps
    options = {"sigmas": [1.0, 0.5, 0.25], "guidance_scale": 4.0}
    truth = draw(tiny_pipeline("text", exact), **options)
    drawn = []
    for model in (host, ours):
        pipe = tiny_pipeline("text", model)
        pipe.vae.bfloat16()
        embeddings = {name: x.bfloat16() for name, x in embeds(7).items()}
        drawn.append(draw(pipe, **embeddings | options))
    assert drawn[1].dtype == torch.bfloat16 and counts(report) == (BLOCKS * STEPS, 0, 0)
    # 2^-8 a rounding, of which ours has fewer: a block rounds at its end
    errors = [relative_error(latents, truth) for latents in drawn]
    assert errors[1] < 2e-2 and errors[1] < errors[0]


def test_a_scheduler_of_another_kind_is_none_of_our_business():
    host, ours, report = both()
    for pipe in (host, ours):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    torch.manual_seed(0)
    expected = draw(host)
    torch.manual_seed(0)
    assert relative_error(draw(ours), expected) < FP32
    assert counts(report) == (BLOCKS * STEPS, 0, 0)
