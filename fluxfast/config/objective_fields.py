"""The options of the objective: noise levels, the loss, what guidance the model is told.

They are fields of the run's config like all others (`run_fields`).
"""

from typing import Literal

from pydantic import Field

from fluxfast.config.option import option
from fluxfast.config.settings import Settings


class ObjectiveFields(Settings):
    """What a config file can say of the objective."""

    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target."""
    huber_schedule: Literal["snr", "exponential", "constant"] = option(
        "snr", only_with="loss_type=huber"
    )
    """How huber's width follows the timestep."""
    huber_c: float = option(0.1, gt=0, only_with="loss_type=huber or loss_type=smooth_l1")
    """Width of the quadratic part of huber and smooth_l1."""
    flow_sigmoid_scale: float = Field(1.0, gt=0)
    """Standard deviation of the normal under the sigmoid schedule."""
    flow_schedule_shift: float = Field(0.0, ge=0)
    """Static shift k of sigma: k s / (1 + (k - 1) s) (0: none)."""
    flow_schedule_auto_shift: bool = False
    """Shift sigma by the image's resolution, as FLUX.1 does at inference."""
    flow_use_uniform_schedule: bool = False
    """Sample sigma uniformly."""
    flow_use_beta_schedule: bool = False
    """Sample sigma from a beta distribution."""
    flow_beta_schedule_alpha: float = option(2.0, gt=0, only_with="flow_use_beta_schedule")
    """First parameter of the beta distribution."""
    flow_beta_schedule_beta: float = option(2.0, gt=0, only_with="flow_use_beta_schedule")
    """Second parameter of the beta distribution."""
    flow_custom_timesteps: tuple[float, ...] | None = Field(None, min_length=1)
    """Sigmas (all up to 1) or timesteps (up to 1000): a list, or numbers between commas."""
    flow_timesteps_mode: Literal["fixed-list", "round-robin"] = option(
        "fixed-list", only_with="flow_custom_timesteps"
    )
    """Draw from the custom timesteps, or take turns."""
    flux_fast_schedule: bool = False
    """FLUX.1-schnell's schedule: mostly sigma 1, else 0.75, 0.5 or 0.25."""
    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    """Guidance that training tells the model."""
    flux_guidance_value: float = option(1.0, ge=0, only_with="flux_guidance_mode=constant")
    """Guidance in constant mode; 1 keeps the distillation."""
    flux_guidance_min: float = option(0.0, ge=0, only_with="flux_guidance_mode=random-range")
    """Lowest guidance in random-range mode."""
    flux_guidance_max: float = option(4.0, ge=0, only_with="flux_guidance_mode=random-range")
    """Highest guidance in random-range mode."""
