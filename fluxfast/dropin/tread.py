"""TREAD in diffusers' own model: its forward, with routes between the blocks. Everywhere else its
own forward runs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fluxfast.model.diffusers_forward import (
    control_residual,
    joint_ids,
    lora_scale,
    project_image_prompts,
)
from fluxfast.model.routing import Router, RouteState


def set_router(model: Any, router: Router | None) -> None:
    """Route the image tokens of a diffusers model during training; None: no more.

    Raises ValueError for a model whose forward is not diffusers' own.
    """
    if router is None:
        model.__dict__.pop("_fluxfast_router", None)
        if getattr(model.__dict__.get("forward"), "__func__", None) is routed_forward:
            del model.__dict__["forward"]
        return
    mine = getattr(model.__dict__.get("forward"), "__func__", None) is routed_forward
    if type(model).forward is not FluxTransformer2DModel.forward or (
        "forward" in model.__dict__ and not mine
    ):
        raise ValueError(
            "tread: routes run in the forward of diffusers' FluxTransformer2DModel, and this "
            f"{type(model).__name__} has "
            "another; leave tread out, use the host's own router if it has one, or call "
            "accelerate before it is wrapped"
        )
    model.__dict__["_fluxfast_router"] = router
    model.__dict__["forward"] = MethodType(routed_forward, model)


def routed_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: list[Tensor] | None = None,
    controlnet_single_block_samples: list[Tensor] | None = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
    force_keep_mask: Tensor | None = None,
) -> Any:
    """As `FluxTransformer2DModel.forward`; force_keep_mask [B, S_img]: image tokens that no route
    may drop.
    """
    router = self.__dict__.get("_fluxfast_router")
    if router is None or not self.training or not torch.is_grad_enabled():
        return type(self).forward(
            self,
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids,
            txt_ids,
            guidance,
            # by name, which is where diffusers looks for an adapter scale in it
            joint_attention_kwargs=joint_attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            return_dict=return_dict,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
        )
    kwargs = dict(joint_attention_kwargs or {})
    with lora_scale(self, kwargs.pop("scale", 1.0)):
        img, txt = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        times = [t.to(img.dtype) * 1000 for t in (timestep, guidance) if t is not None]
        vec = self.time_text_embed(*times, pooled_projections)
        project_image_prompts(self, kwargs)
        draws = router.draws(img.shape[0], img.shape[1], force_keep_mask, img.device)
        route = RouteState(router, draws, self.pos_embed(joint_ids(txt_ids, img_ids)), txt.shape[1])
        number = 0
        for blocks, samples, repeat in (
            (self.transformer_blocks, controlnet_block_samples, controlnet_blocks_repeat),
            (self.single_transformer_blocks, controlnet_single_block_samples, False),
        ):
            for i, block in enumerate(blocks):
                img = route.before(number, img)
                txt, img = _call(self, block, img, txt, vec, route.pe, kwargs)
                if samples is not None:
                    img = img + route.of_kept(control_residual(samples, i, len(blocks), repeat))
                img = route.after(number, img)
                number += 1
        output = self.proj_out(self.norm_out(img, vec))
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _call(
    model: Any,
    block: nn.Module,
    img: Tensor,
    txt: Tensor,
    vec: Tensor,
    pe: Any,
    kwargs: dict[str, Any],
) -> Any:
    if model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, img, txt, vec, pe, kwargs)
    return block(
        hidden_states=img,
        encoder_hidden_states=txt,
        temb=vec,
        image_rotary_emb=pe,
        joint_attention_kwargs=kwargs,
    )
