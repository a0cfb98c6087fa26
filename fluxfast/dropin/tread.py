"""TREAD in diffusers' own model: its forward, with routes between the blocks.

Without routes, or outside training, diffusers' own forward runs.
"""

from __future__ import annotations

import inspect
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

# what the host calls its forward with; ours takes the same
_SIGNATURE = inspect.signature(FluxTransformer2DModel.forward)


def set_router(model: Any, router: Router | None) -> None:
    """Route the image tokens of a diffusers model during training; None takes the routes away.

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
            f"{type(model).__name__} has another; leave tread out, use the host's own router if it "
            "has one, or call accelerate before it is wrapped"
        )
    model.__dict__["_fluxfast_router"] = router
    model.__dict__["forward"] = MethodType(routed_forward, model)


def routed_forward(
    self: Any, *args: Any, force_keep_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """`FluxTransformer2DModel.forward` with routes; it takes the same arguments, and one more.

    force_keep_mask [B, S_img]: image tokens that no route may drop.
    """
    given = _SIGNATURE.bind(self, *args, **kwargs)
    router = self.__dict__.get("_fluxfast_router")
    if router is None or not self.training or not torch.is_grad_enabled():
        # by name, since diffusers looks for an adapter scale among the named arguments only
        return type(self).forward(**given.arguments)
    given.apply_defaults()
    a = given.arguments
    block_kwargs = dict(a["joint_attention_kwargs"] or {})
    with lora_scale(self, block_kwargs.pop("scale", 1.0)):
        img = self.x_embedder(a["hidden_states"])
        txt = self.context_embedder(a["encoder_hidden_states"])
        times = [a[name] for name in ("timestep", "guidance") if a[name] is not None]
        times = [t.to(img.dtype) * 1000 for t in times]
        vec = self.time_text_embed(*times, a["pooled_projections"])
        project_image_prompts(self, block_kwargs)
        draws = router.draws(img.shape[0], img.shape[1], force_keep_mask, img.device)
        tables = self.pos_embed(joint_ids(a["txt_ids"], a["img_ids"]))
        route = RouteState(router, draws, tables, txt.shape[1])
        number = 0
        for blocks, samples, repeat in (
            (
                self.transformer_blocks,
                a["controlnet_block_samples"],
                a["controlnet_blocks_repeat"],
            ),
            (self.single_transformer_blocks, a["controlnet_single_block_samples"], False),
        ):
            for i, block in enumerate(blocks):
                img = route.before(number, img)
                txt, img = _call(self, block, img, txt, vec, route.pe, block_kwargs)
                if samples is not None:
                    img = img + route.of_kept(control_residual(samples, i, len(blocks), repeat))
                img = route.after(number, img)
                number += 1
        output = self.proj_out(self.norm_out(img, vec))
    return Transformer2DModelOutput(sample=output) if a["return_dict"] else (output,)


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
