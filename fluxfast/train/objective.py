"""The loss of a batch, as a run's config asks for it; the maths is in `flow`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fluxfast.config.run import TrainConfig
from fluxfast.data.batches import Batch
from fluxfast.model.modulation import Conditions
from fluxfast.model.pinned import pin, send
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import flow
from fluxfast.train.assistant import base_alone

# tokens: at most eight lengths of T5's 512, as many shapes as graphs are kept of
_TEXT_MULTIPLE = 64


def step_seed(seed: int, step: int, micro: int, purpose: str) -> int:
    """A 63-bit seed for one purpose in one micro-step."""
    digest = hashlib.blake2b(f"{seed}:{step}:{micro}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Example:
    """A micro-batch ready for the model: on the host, pinned where the device is a GPU.

    Attributes:
        step, micro: the micro-batch's place in the run; steps count from 1.
        hidden_states: the noisy latents, packed [B, S_img, C], and behind them the references.
        target: what the model should answer, packed fp32 [B, S_img, C].
        sigmas: noise levels, fp32 [B].
        guidance: the guidance that each sample is trained under, fp32 [B]; None where the model
            takes none.
        prompt_embeds, pooled: the text encoders' outputs [B, L, T5 width] and [B, CLIP width].
        size: (height, width) of the latents.
        text_mask: bool [B, L], false at text that nothing attends to; None: there is none.
        weight: what the loss of each element of `target` is multiplied with; None: nothing.
    """

    batch: Batch
    step: int
    micro: int
    hidden_states: Tensor
    target: Tensor
    sigmas: Tensor
    guidance: Tensor | None
    prompt_embeds: Tensor
    pooled: Tensor
    size: tuple[int, int]
    text_mask: Tensor | None = None
    weight: Tensor | None = None


class Objective:
    """Flow matching as a config asks for it.

    `shift_bounds` are `flow.auto_shift`'s keyword arguments, from the pipeline's scheduler.
    """

    def __init__(
        self,
        config: TrainConfig,
        transformer: FluxTransformer,
        seed: int,
        shift_bounds: Mapping[str, Any],
    ) -> None:
        self.config, self.transformer, self.seed, self.shift_bounds = (
            config,
            transformer,
            seed,
            shift_bounds,
        )
        self.device = transformer.device
        # position ids [S, 3] on the device, by the number of text tokens and the sizes of the
        # latents and of the references
        self._ids: dict[Any, tuple[Tensor, Tensor]] = {}

    def example(self, batch: Batch, number: int) -> Example:
        """Draw noise levels, guidance and noise for a micro-batch; may be called from any thread.

        number: of the micro-batch in the run, from 0. The same batch and number always give the
        same example.
        """
        config = self.config
        step, micro = (
            number // config.gradient_accumulation_steps + 1,
            number % config.gradient_accumulation_steps,
        )
        g = torch.Generator().manual_seed(step_seed(self.seed, step, micro, "flow"))
        sigmas = self._sigmas(batch, number, g)
        guidance = flow.guidance_vector(
            len(sigmas),
            config.flux_guidance_mode,
            value=config.flux_guidance_value,
            min=config.flux_guidance_min,
            max=config.flux_guidance_max,
            generator=g,
        )
        return self._noised(batch, (step, micro), sigmas, guidance, g)

    def evaluation_example(self, batch: Batch, sigma: float) -> Example:
        """A batch at one noise level, with the noise of seed 0: always the same example.

        Nothing weighs its loss. In place of a random guidance it has the middle of the range.
        """
        config = self.config
        sigmas = torch.full((len(batch.latents),), sigma)
        guidance = config.flux_guidance_value
        if config.flux_guidance_mode == "random-range":
            guidance = (config.flux_guidance_min + config.flux_guidance_max) / 2
        unweighted = replace(batch, loss_mask=None, keep_mask=None)
        g = torch.Generator().manual_seed(0)
        return self._noised(unweighted, (0, 0), sigmas, torch.full_like(sigmas, guidance), g)

    def _noised(
        self,
        batch: Batch,
        place: tuple[int, int],
        sigmas: Tensor,
        guidance: Tensor,
        generator: torch.Generator,
    ) -> Example:
        """The example of a batch at these noise levels. place: its step and micro-step."""
        dtype = self.config.weight_dtype
        x0 = batch.latents.float()
        eps = torch.randn(x0.shape, generator=generator)

        text, text_mask = batch.prompt_embeds, None
        if self.config.flux_attention_masked_training:
            # a graph is of one shape, so few lengths are better there than short ones
            multiple = 1 if self.transformer.graphs is None else _TEXT_MULTIPLE
            text, text_mask = flow.cut_text(text, batch.attention_mask, multiple)

        def ready(tensor: Tensor) -> Tensor:
            return pin(tensor, self.device)

        return Example(
            batch,
            *place,
            hidden_states=ready(
                torch.cat(
                    [
                        flow.pack_latents(latents).to(dtype)
                        for latents in (flow.add_noise(x0, eps, sigmas), *batch.references)
                    ],
                    dim=1,
                )
            ),
            target=ready(flow.pack_latents(flow.target(x0, eps))),
            sigmas=ready(sigmas),
            guidance=ready(guidance) if self.transformer.config.guidance_embeds else None,
            prompt_embeds=ready(text.to(dtype)),
            pooled=ready(batch.pooled_prompt_embeds.to(dtype)),
            size=(x0.shape[-2], x0.shape[-1]),
            text_mask=None if text_mask is None else ready(text_mask),
            weight=None
            if batch.loss_mask is None
            else ready(flow.pack_mask(batch.loss_mask, x0.shape[1])),
        )

    def modulation_conditions(self, example: Example) -> Conditions:
        """The inputs of the model's modulation in this example; may be called from any thread."""
        return Conditions.of(
            example.sigmas, example.guidance, example.pooled, self.config.weight_dtype
        )

    def loss(self, example: Example) -> Tensor:
        """The flow-matching loss: predict eps - x0 at the sampled sigmas. It is not waited for."""
        config, place = self.config, (self.seed, example.step, example.micro)
        inputs = self._model_inputs(example)
        target = send(example.target, self.device)
        if example.batch.is_regularisation_data:
            target = self._base_prediction(inputs)
        # for the adapters' dropout, which draws from the device's own generator
        torch.manual_seed(step_seed(*place, "dropout"))
        if self.transformer.router is not None:
            self.transformer.router.generator.manual_seed(step_seed(*place, "tread"))
            inputs["force_keep_mask"] = example.batch.keep_mask
        return self.transformer.region(
            flow.loss,
            self._prediction(inputs),
            target,
            config.loss_type,
            huber_c=config.huber_c,
            huber_schedule=config.huber_schedule,
            sigmas=send(example.sigmas, self.device),
            weight=None if example.weight is None else send(example.weight, self.device),
        ).mean()

    @torch.no_grad()
    def evaluation_loss(self, example: Example) -> Tensor:
        """The mean squared error of a prediction, a scalar on the device.

        It is that error whatever `loss_type` says, so that runs can be compared by it.
        """
        prediction = self._prediction(self._model_inputs(example))
        return (prediction - send(example.target, self.device)).square().mean()

    def _prediction(self, inputs: dict[str, Any]) -> Tensor:
        """What the model predicts, fp32 [B, S, 64]."""
        return self.transformer(**inputs, return_dict=False)[0].float()

    def _sigmas(self, batch: Batch, number: int, g: torch.Generator) -> Tensor:
        config = self.config
        if config.custom_sigmas is not None:
            return flow.sigmas_from_list(
                len(batch.latents),
                config.custom_sigmas,
                mode=config.flow_timesteps_mode,
                generator=g,
                step=number,
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

    def _model_inputs(self, example: Example) -> dict[str, Any]:
        # conditions stay where modulation is computed: on the host, if that is done ahead
        near = self.device if self.transformer.modulation is None else torch.device("cpu")
        references = tuple(tuple(each.shape[-2:]) for each in example.batch.references)
        img_ids, txt_ids = self._position_ids(
            example.size, references, example.prompt_embeds.shape[1]
        )
        inputs: dict[str, Any] = {
            "hidden_states": send(example.hidden_states, self.device),
            "timestep": send(example.sigmas, near),
            "encoder_hidden_states": send(example.prompt_embeds, self.device),
            "pooled_projections": send(example.pooled, near),
            "img_ids": img_ids,
            "txt_ids": txt_ids,
        }
        if example.text_mask is not None:
            inputs["text_mask"] = send(example.text_mask, self.device)
        if references:
            inputs["scene_tokens"] = example.target.shape[1]
        if example.guidance is not None:
            inputs["guidance"] = send(example.guidance, near)
        return inputs

    def _position_ids(
        self, size: tuple[int, int], references: tuple[Any, ...], text: int
    ) -> tuple[Tensor, Tensor]:
        key = (size, references, text)
        if key not in self._ids:
            image = flow.image_ids(*size, device=self.device)
            if references:
                image = torch.cat([image, flow.reference_ids(references, device=self.device)])
            self._ids[key] = image, torch.zeros(text, 3, device=self.device)
        return self._ids[key]

    @torch.no_grad()
    def _base_prediction(self, inputs: dict[str, Any]) -> Tensor:
        """What the model predicts without the trained adapter: regularisation data's target."""
        with base_alone(self.transformer):
            return self._prediction(inputs)
