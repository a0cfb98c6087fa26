"""The loss of a batch: what is drawn at random, what the model is given, what its answer is compared with.

The maths is in `flow`; this is where a run's settings meet it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.data.batches import Batch
from fluxfast.model.modulation import Conditions
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import flow
from fluxfast.train.config import TrainConfig


def step_seed(seed: int, step: int, micro: int, purpose: str) -> int:
    """A 63-bit seed for one purpose in one micro-step."""
    digest = hashlib.blake2b(f"{seed}:{step}:{micro}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Draw(NamedTuple):
    """A batch's noise levels [B], its guidance [B] (None where the model takes none), and the generator that its noise is
    drawn from next.
    """

    sigmas: Tensor
    guidance: Tensor | None
    generator: torch.Generator


class Objective:
    """Flow matching as a config asks for it. `shift_bounds` are `flow.auto_shift`'s, from the pipeline's scheduler."""

    def __init__(
        self, config: TrainConfig, transformer: FluxTransformer, seed: int, shift_bounds: Mapping[str, Any]
    ) -> None:
        self.config, self.transformer, self.seed, self.shift_bounds = config, transformer, seed, shift_bounds
        self.device = transformer.device

    def draw(self, batch: Batch, step: int, micro: int) -> Draw:
        """What micro-batch `micro` of step `step` is trained with; the same each time that it is asked for."""
        config = self.config
        g = torch.Generator().manual_seed(step_seed(self.seed, step, micro, "flow"))
        sigmas = self._sigmas(batch, (step - 1) * config.gradient_accumulation_steps + micro, g)
        guidance = flow.guidance_vector(
            len(sigmas),
            config.flux_guidance_mode,
            value=config.flux_guidance_value,
            min=config.flux_guidance_min,
            max=config.flux_guidance_max,
            generator=g,
        )
        return Draw(sigmas, guidance if self.transformer.config.guidance_embeds else None, g)

    def modulation_conditions(self, batch: Batch, step: int, micro: int) -> Conditions:
        """What the model's modulation will be a function of in that micro-batch's loss; from any thread."""
        sigmas, guidance, _ = self.draw(batch, step, micro)
        dtype = self.config.weight_dtype
        return Conditions.of(sigmas, guidance, batch.pooled_prompt_embeds.to(dtype), dtype)

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        """The flow-matching loss of micro-batch `micro` of step `step`: predict eps - x0 at a sampled sigma."""
        config = self.config
        x0 = batch.latents.float()
        sigmas, guidance, generator = self.draw(batch, step, micro)
        eps = torch.randn(x0.shape, generator=generator)
        inputs = self._model_inputs(flow.add_noise(x0, eps, sigmas), sigmas, guidance, batch)
        target = flow.pack_latents(flow.target(x0, eps)).to(self.device)
        if batch.is_regularisation_data:
            target = self._base_prediction(inputs)
        # for the adapters' dropout, which draws from the device's own generator
        torch.manual_seed(step_seed(self.seed, step, micro, "dropout"))
        if self.transformer.router is not None:
            self.transformer.router.generator.manual_seed(step_seed(self.seed, step, micro, "tread"))
        prediction = self.transformer(**inputs, return_dict=False)[0]
        return flow.loss(
            prediction.float(),
            target,
            config.loss_type,
            huber_c=config.huber_c,
            huber_schedule=config.huber_schedule,
            sigmas=sigmas.to(self.device),
        ).mean()

    def _sigmas(self, batch: Batch, number: int, g: torch.Generator) -> Tensor:
        config = self.config
        if config.custom_sigmas is not None:
            return flow.sigmas_from_list(
                len(batch.latents), config.custom_sigmas, mode=config.flow_timesteps_mode, generator=g, step=number
            )
        shift = config.flow_schedule_shift
        if config.flow_schedule_auto_shift:
            shift = flow.auto_shift(*batch.latents.shape[-2:], **self.shift_bounds)
        schedule = config.schedule
        assert schedule != "custom"
        return flow.sample_sigmas(
            len(batch.latents),
            generator=g,
            schedule=schedule,
            sigmoid_scale=config.flow_sigmoid_scale,
            offset=batch.timestep_sampling_offset,
            alpha=config.flow_beta_schedule_alpha,
            beta=config.flow_beta_schedule_beta,
            shift=shift,
        )

    def _model_inputs(self, noisy: Tensor, sigmas: Tensor, guidance: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        dtype, device = self.config.weight_dtype, self.device
        # where modulation is computed
        near = device if self.transformer.modulation is None else torch.device("cpu")
        inputs = {
            "hidden_states": flow.pack_latents(noisy).to(device, dtype),
            "timestep": sigmas.to(near),
            "encoder_hidden_states": batch.prompt_embeds.to(device, dtype),
            "pooled_projections": batch.pooled_prompt_embeds.to(near, dtype),
            "img_ids": flow.image_ids(*noisy.shape[-2:], device=device),
            "txt_ids": torch.zeros(batch.prompt_embeds.shape[1], 3, device=device),
        }
        if guidance is not None:
            inputs["guidance"] = guidance.to(near)
        return inputs

    @torch.no_grad()
    def _base_prediction(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the model without the adapters predicts: the target of regularisation data."""
        self.transformer.disable_adapters()
        try:
            return self.transformer(**inputs, return_dict=False)[0].float()
        finally:
            self.transformer.enable_adapters()
