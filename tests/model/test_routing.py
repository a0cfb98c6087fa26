"""TREAD: which tokens a route drops, that blocks see the rest as if they were alone, and that
everything comes back.
"""

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast.model.routing import Router, keep_count, resolve_routes
from support import SMALL, make_inputs, randomise, relative_error

# fp32: the same sums in another order
FP32 = 1e-5
BLOCKS = SMALL["num_layers"] + SMALL["num_single_layers"]


def route(ratio, first, last):
    return {"selection_ratio": ratio, "start_layer_idx": first, "end_layer_idx": last}


def make_model(**config):
    model = FluxTransformer(**SMALL | {"guidance_embeds": True} | config)
    randomise(model)
    return model.train()


def test_flux_indices():
    assert resolve_routes([route(0.5, 2, -2)], 57) == ((0.5, 2, 55),)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ([route(0.5, 2, 5)], "route 0 .*no block 5; the model has 5, 0 to 4"),
        ([route(0.5, -6, 2)], "no block -6"),
        ([route(0.5, 3, 1)], "ends at block 1, before it starts at block 3"),
        (
            [route(0.5, 0, 2), route(0.5, 2, 3)],
            "route 1 .*starts at block 2, but the route before it ends at block 2",
        ),
        ([route(0.5, 3, 4), route(0.5, 0, 1)], "route 1 .*may not overlap"),
        ([route(1.0, 0, 1)], "selection_ratio is the part"),
        ([route(-0.1, 0, 1)], "selection_ratio is the part"),
    ],
)
def test_bad_routes_are_named(routes, message):
    with pytest.raises(ValueError, match=message):
        make_model().set_routes(routes)


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [(1024, 0.5, 512), (63, 0.5, 31), (5, 0.1, 5), (7, 0.5, 3), (4, 0.99, 0)],
)
def test_keep_counts(tokens, ratio, kept):
    """K = S - round(S·ratio), with Python's rounding of halves to even: 63·0.5 = 31.5 drops 32,
    7·0.5 = 3.5 drops 4.
    """
    assert keep_count(tokens, ratio) == kept


def test_draws_are_uniform_sorted_and_resumable():
    router = Router(resolve_routes([route(0.5, 0, 1)], 5), seed=3)
    counts = torch.zeros(12)
    for _ in range(400):
        index = router.draw(2, 12, 0.5, None, torch.device("cpu"))
        assert index.shape == (2, 6) and (index.diff(dim=1) > 0).all()
        counts += torch.bincount(index.flatten(), minlength=12)
    # 800 draws of 6 of 12: each token 400 times, give or take 5 standard deviations of 14
    assert (counts - 400).abs().max() < 71
    state = router.generator.get_state()
    expected = router.draw(3, 12, 0.5, None, torch.device("cpu"))
    router.generator.set_state(state)
    assert torch.equal(router.draw(3, 12, 0.5, None, torch.device("cpu")), expected)


def test_forced_tokens_stay_and_raise_the_count_for_all():
    router = Router(resolve_routes([route(0.75, 0, 1)], 5))
    forced = torch.zeros(2, 16, dtype=torch.bool)
    forced[0, 3:12] = True
    forced[1, 15] = True
    index = router.draw(2, 16, 0.75, forced, torch.device("cpu"))
    assert index.shape == (2, 9)
    assert set(range(3, 12)) == set(index[0].tolist()) and 15 in index[1].tolist()
    assert router.draw(1, 16, 0.75, torch.ones(1, 16), torch.device("cpu")) is None
    with pytest.raises(ValueError, match=r"expected \[2, 16\]"):
        router.draw(2, 16, 0.75, forced[:, :9], torch.device("cpu"))


def run(model, inputs, **kwargs):
    out = model(**inputs, **kwargs).sample
    out.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return out.detach(), grads


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratio_zero_is_no_route_bit_for_bit(checkpointing):
    model, inputs = make_model(), make_inputs(2, 3, 4)
    if checkpointing:
        model.enable_gradient_checkpointing()
    plain_out, plain = run(model, inputs)
    model.set_routes([route(0.0, 1, 3)])
    out, grads = run(model, inputs)
    assert torch.equal(out, plain_out)
    assert all(torch.equal(grads[n], g) for n, g in plain.items())


def by_hand(model, inputs, first, last, index):
    """The routed model from its parts: blocks of their own class on tokens gathered by torch,
    tables gathered per sample.
    """
    seen = {}

    def keep_inputs(module, args):
        seen["args"] = args

    handle = model.transformer_blocks[0].register_forward_pre_hook(keep_inputs)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    img, txt, vec, (cos, sin), _ = seen["args"]
    txt_len, whole = txt.shape[1], None
    outs = []
    for b in range(len(img)):
        x_img, x_txt, rows = img[b : b + 1], txt[b : b + 1], torch.arange(len(cos))
        for i in range(BLOCKS):
            if i == first:
                whole, x_img = x_img, x_img[:, index[b]]
                rows = torch.cat([torch.arange(txt_len), txt_len + index[b]])
            pe = (cos[rows], sin[rows])
            if i < SMALL["num_layers"]:
                x_txt, x_img = model.transformer_blocks[i](x_img, x_txt, vec[b : b + 1], pe)
            else:
                block = model.single_transformer_blocks[i - SMALL["num_layers"]]
                x_txt, x_img = block(x_img, x_txt, vec[b : b + 1], pe)
            if i == last:
                whole = whole.clone()
                whole[:, index[b]] = x_img
                x_img, rows = whole, torch.arange(len(cos))
        outs.append(x_img)
    return torch.cat(outs)


def finish(model, inputs, img):
    """What follows the blocks, by diffusers' own module."""
    seen = {}
    handle = model.transformer_blocks[0].register_forward_pre_hook(
        lambda m, args: seen.update(vec=args[2])
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return model.proj_out(model.norm_out(img, seen["vec"]))


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (1, 3), (2, 4), (3, 3)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_routed_block_is_the_block_on_the_kept_tokens(first, last, checkpointing):
    """Routes in double blocks, in single blocks, and across; batch 2 with other tokens in each
    sample.
    """
    model, inputs = make_model(), make_inputs(2, 3, 4)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.set_routes([route(0.5, first, last)], seed=5)
    state = model.router.generator.get_state()
    out, grads = run(model, inputs)
    model.router.generator.set_state(state)
    index = model.router.draw(2, 12, 0.5, None, torch.device("cpu"))
    model.router = None
    plain, _ = run(model, inputs)
    assert relative_error(out, plain) > 1e-3
    expected = finish(model, inputs, by_hand(model, inputs, first, last, index))
    assert relative_error(out, expected) < FP32
    expected.square().sum().backward()
    assert all(
        relative_error(grads[n], p.grad) < 2e-5
        for n, p in model.named_parameters()
        if "blocks" in n
    )


def test_recomputed_blocks_see_the_same_tokens():
    model, inputs = make_model(), make_inputs(2, 4, 4)
    model.set_routes([route(0.25, 0, 1), route(0.5, 2, -1)], seed=9)
    plain_out, plain = run(model, inputs)
    model.router.generator.manual_seed(9)
    model.enable_gradient_checkpointing()
    out, grads = run(model, inputs)
    assert torch.equal(out, plain_out)
    assert all(torch.equal(grads[n], g) for n, g in plain.items())


def test_only_in_training_with_gradients():
    model, inputs = make_model(), make_inputs(1, 4, 4)
    plain = model(**inputs).sample
    model.set_routes([route(0.5, 0, -1)])
    assert relative_error(model(**inputs).sample, plain) > 1e-2
    with torch.no_grad():
        assert relative_error(model(**inputs).sample, plain) < FP32
    assert relative_error(model.eval()(**inputs).sample, plain) < FP32


def test_dropped_tokens_carry_their_gradient_past_the_route():
    """All blocks routed, all tokens but one dropped: the others reach the output unchanged, and no
    other token's input.
    """
    model, inputs = make_model(), make_inputs(1, 2, 4)
    model.set_routes([route(0.87, 0, -1)])
    x = inputs["hidden_states"].requires_grad_()
    out = model(**inputs).sample
    index = Router(model.router.routes).draw(1, 8, 0.87, None, torch.device("cpu"))
    dropped = [i for i in range(8) if i not in index[0]]
    grad = torch.autograd.grad(out[:, dropped].sum(), x)[0]
    assert grad[:, dropped].abs().min(dim=-1).values.gt(0).all()
    assert grad[:, index[0]].abs().max() == 0


def test_control_residuals_meet_their_tokens():
    """A residual that is the same for every token gives the same with and without knowing which
    were dropped.
    """
    model, inputs = make_model(), make_inputs(1, 2, 4)
    residual = torch.randn(1, 8, 64)
    model.set_routes([route(0.5, 0, -2)], seed=1)
    out = model(
        **inputs, controlnet_block_samples=[residual], controlnet_single_block_samples=[residual]
    ).sample
    model.set_routes([route(0.5, 0, -2)], seed=1)
    index = Router(model.router.routes, seed=1).draw(1, 8, 0.5, None, torch.device("cpu"))
    # what a dropped token would have got inside the route must not matter
    changed = residual.clone()
    changed[:, [i for i in range(8) if i not in index[0]]] += 100
    samples = [changed] * 2, [changed] * 2 + [residual]
    again = model(
        **inputs, controlnet_block_samples=samples[0], controlnet_single_block_samples=samples[1]
    ).sample
    model.set_routes([route(0.5, 0, -2)], seed=1)
    plain = model(
        **inputs,
        controlnet_block_samples=[residual] * 2,
        controlnet_single_block_samples=[residual] * 3,
    ).sample
    assert torch.equal(again, plain) and out.isfinite().all()
