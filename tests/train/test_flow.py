import math

import pytest
import torch
from diffusers import FluxPipeline

from fluxfast.train import flow


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _quantiles(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.quantile(sigmas.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))


# the standard error of a quantile of 100,000 draws is under 0.002 for every density used here: 0.01
# is five of them
DRAWS, QUANTILE_TOLERANCE = 100_000, 0.01
NORMAL_QUANTILES = torch.tensor([-1.2815515655, 0.0, 1.2815515655], dtype=torch.float64)


@pytest.mark.parametrize(
    ("tokens_side", "mu", "k"), [(32, 0.63, 1.88), (64, 1.15, 3.16), (16, 0.5, 1.6487)]
)
def test_auto_shift_golden_values(tokens_side, mu, k):
    shift = flow.auto_shift(2 * tokens_side, 2 * tokens_side)
    assert shift == pytest.approx(k, abs=0.005)
    assert math.log(shift) == pytest.approx(mu, abs=0.0005)


def test_auto_shift_counts_patches_of_a_wide_latent_and_takes_the_schedulers_numbers():
    assert flow.auto_shift(96, 168) == pytest.approx(math.exp(0.5 + 0.65 / 3840 * (48 * 84 - 256)))
    k = flow.auto_shift(
        20, 20, base_image_seq_len=100, max_image_seq_len=200, base_shift=0.25, max_shift=2.0
    )
    assert k == pytest.approx(math.exp(0.25))


def test_apply_shift_multiplies_the_odds():
    s = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    shifted = flow.apply_shift(s, 3.0)
    torch.testing.assert_close(
        shifted, torch.tensor([0, 0.25, 0.75, 27 / 28, 1], dtype=torch.float64)
    )
    torch.testing.assert_close(flow.apply_shift(s, 1.0), s)


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.5, 1.5)])
def test_sigmoid_quantiles(scale, offset, shift):
    s = flow.sample_sigmas(
        DRAWS, generator=_generator(), sigmoid_scale=scale, offset=offset, shift=shift
    )
    expected = torch.sigmoid(scale * (NORMAL_QUANTILES + offset))
    if shift:
        expected = flow.apply_shift(expected, shift)
    assert s.dtype == torch.float32
    torch.testing.assert_close(_quantiles(s), expected, atol=QUANTILE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_uniform_quantiles(shift):
    s = flow.sample_sigmas(DRAWS, generator=_generator(), schedule="uniform", shift=shift)
    expected = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    if shift:
        expected = flow.apply_shift(expected, shift)
    torch.testing.assert_close(_quantiles(s), expected, atol=QUANTILE_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (1.0, 3.0), (5.0, 1.5)])
def test_beta_moments(alpha, beta):
    s = flow.sample_sigmas(
        DRAWS, generator=_generator(), schedule="beta", alpha=alpha, beta=beta
    ).double()
    mean = alpha / (alpha + beta)
    var = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    # standard errors are under 0.0008 for the mean and 0.0002 for the variance
    assert s.mean().item() == pytest.approx(mean, abs=0.004)
    assert s.var().item() == pytest.approx(var, abs=0.001)


def test_beta_shift_is_applied():
    plain = flow.sample_sigmas(63, generator=_generator(), schedule="beta")
    shifted = flow.sample_sigmas(63, generator=_generator(), schedule="beta", shift=2.5)
    torch.testing.assert_close(shifted, flow.apply_shift(plain, 2.5))


def test_fast_schedule_is_the_set_and_takes_no_shift():
    s = flow.sample_sigmas(DRAWS, generator=_generator(), schedule="fast", shift=3.0)
    values, counts = s.unique(return_counts=True)
    assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
    share = counts.double() / DRAWS
    torch.testing.assert_close(
        share, torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float64), atol=0.006, rtol=0
    )


@pytest.mark.parametrize("schedule", ["sigmoid", "uniform", "beta", "fast"])
def test_sigmas_follow_the_generator_alone(schedule):
    torch.manual_seed(1)
    a = flow.sample_sigmas(63, generator=_generator(7), schedule=schedule)
    torch.manual_seed(2)
    generator = _generator(7)
    b = flow.sample_sigmas(63, generator=generator, schedule=schedule)
    c = flow.sample_sigmas(63, generator=generator, schedule=schedule)
    assert torch.equal(a, b)
    assert not torch.equal(b, c)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="cubic"):
        flow.sample_sigmas(1, generator=_generator(), schedule="cubic")  # type: ignore[arg-type]


def test_custom_list_round_robin_goes_on_across_steps():
    values = [1000, 750, 500, 250, 1]
    walk = [
        flow.sigmas_from_list(3, values, mode="round-robin", generator=_generator(), step=i)
        for i in range(4)
    ]
    expected = [values[i % 5] / 1000 for i in range(12)]
    torch.testing.assert_close(torch.cat(walk), torch.tensor(expected))


def test_custom_list_random_draws_only_listed_sigmas():
    s = flow.sigmas_from_list(1000, [1.0, 0.5, 0.125], generator=_generator())
    assert s.unique().tolist() == [0.125, 0.5, 1.0]


@pytest.mark.parametrize("values", [[], [1001], [-0.5, 0.5], [500, -1]])
def test_custom_list_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match="flow_custom_timesteps"):
        flow.sigmas_from_list(1, values, generator=_generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_and_target(dtype):
    x0, eps = torch.randn(2, 3, 4, 6, 10, generator=_generator()).to(dtype)
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    s = sigmas.double().view(3, 1, 1, 1)
    noisy = flow.add_noise(x0, eps, sigmas)
    assert noisy.dtype == dtype
    # one rounding to the storage dtype: half a ulp of values up to about 4
    atol = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(
        noisy.double(), (1 - s) * x0.double() + s * eps.double(), atol=atol, rtol=0
    )
    assert torch.equal(noisy[0], x0[0])
    assert torch.equal(noisy[2], eps[2])
    answer = flow.target(x0, eps)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer.double(), eps.double() - x0.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
def test_huber_threshold_equals_the_ddpm_formulas(schedule):
    h = 0.1
    sigmas = torch.linspace(0, 0.999, 63, dtype=torch.float64)
    # a DDPM scheduler with the same noise-to-signal ratio: √((1 - ᾱ)/ᾱ) = σ/(1 - σ)
    alphas_cumprod = 1 / (1 + (sigmas / (1 - sigmas)) ** 2)
    expected = {
        "constant": torch.full_like(sigmas, h),
        "exponential": torch.exp(math.log(h) / 1000 * (1000 * sigmas)),
        "snr": (1 - h) / (1 + ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5) ** 2 + h,
    }[schedule]
    torch.testing.assert_close(flow.huber_threshold(sigmas, h, schedule), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["l2", "huber", "smooth_l1"])
def test_loss_and_gradient(kind, weighted):
    generator = _generator(3)
    pred = torch.randn(3, 4, 7, 9, generator=generator)
    # small and large errors, so that both ends of the pseudo-Huber curve are seen
    answer = pred + torch.randn(3, 4, 7, 9, generator=generator) * torch.logspace(-4, 1, 9)
    sigmas = torch.tensor([0.05, 0.5, 0.95])
    pred.requires_grad_()
    weight = torch.rand(3, 1, 7, 9, generator=generator) if weighted else None
    value = flow.loss(pred, answer, kind, sigmas=sigmas, weight=weight)
    value.mean().backward()

    exact = pred.detach().double().requires_grad_()
    d2 = (exact - answer.double()) ** 2
    c = ((1 - 0.1) * (1 - sigmas.double()) ** 2 + 0.1).view(3, 1, 1, 1)
    element = {
        "l2": d2,
        "huber": 2 * c * ((d2 + c * c).sqrt() - c),
        "smooth_l1": 2 * ((d2 + c * c).sqrt() - c),
    }[kind]
    if weight is not None:
        element = element * weight.double()
    expected = element.flatten(1).mean(1)
    expected.mean().backward()
    assert value.shape == (3,)
    assert value.dtype == torch.float32
    # fp32 arithmetic over 252 elements; the errors d themselves carry fp32's rounding of pred -
    # target
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pred.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_a_packed_mask_weighs_the_numbers_of_its_pixels():
    latents, mask = torch.randn(2, 16, 6, 10), torch.rand(2, 1, 6, 10)
    packed = flow.pack_latents(latents) * flow.pack_mask(mask, 16)
    assert torch.equal(packed, flow.pack_latents(latents * mask))


def test_loss_is_fp32_for_bf16_predictions():
    pred = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)
    answer = torch.full((2, 1, 4, 4), 3.0)
    value = flow.loss(pred, answer)
    assert value.dtype == torch.float32
    assert value.tolist() == [9, 9]


def test_unknown_loss_and_schedule_are_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="l1"):
        flow.loss(x, x, "l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear"):
        flow.huber_threshold(x[0], 0.1, "linear")  # type: ignore[arg-type]


def test_guidance():
    assert flow.guidance_vector(3, value=3.5, generator=_generator()).tolist() == [3.5] * 3
    g = flow.guidance_vector(
        DRAWS, "random-range", min=1.0, max=5.0, generator=_generator()
    ).double()
    assert g.min() >= 1
    assert g.max() <= 5
    torch.testing.assert_close(
        _quantiles(g),
        torch.tensor([1.4, 3, 4.6], dtype=torch.float64),
        atol=4 * QUANTILE_TOLERANCE,
        rtol=0,
    )
    with pytest.raises(ValueError, match="range"):
        flow.guidance_vector(1, "range", generator=_generator())  # type: ignore[arg-type]


@pytest.mark.parametrize(("h", "w"), [(2, 2), (6, 10), (22, 14)])
def test_packing_is_diffusers(h, w):
    latents = torch.randn(2, 16, h, w, generator=_generator())
    tokens = flow.pack_latents(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, h, w))
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 8 * h, 8 * w, 8), latents)
    expected = FluxPipeline._prepare_latent_image_ids(2, h // 2, w // 2, "cpu", torch.float32)
    assert torch.equal(flow.image_ids(h, w), expected)


def test_odd_latents_are_refused():
    with pytest.raises(ValueError, match="63 x 64"):
        flow.pack_latents(torch.zeros(1, 16, 63, 64))
