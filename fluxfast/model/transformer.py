"""The FLUX.1 transformer: diffusers' `FluxTransformer2DModel` by type, config, module names and
signature, with our blocks.

Between blocks everything is as in diffusers, except that text and image stay one joint tensor
through all single blocks. On a CPU the arithmetic is fp32 whatever the weights are stored in (bf16
there is many times slower, and worse).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from fluxfast.checkpoint import flux
from fluxfast.model.blocks import adopt
from fluxfast.model.diffusers_forward import (
    NO_CONTROL,
    Control,
    control_residual,
    joint_ids,
    lora_scale,
    project_image_prompts,
)
from fluxfast.model.graphs import StepGraphs
from fluxfast.model.linear import project
from fluxfast.model.modulation import Conditions, ModulationAhead, embed
from fluxfast.model.routing import Draws, Router, RouteState, resolve_routes
from fluxfast.model.tape import POLICIES
from fluxfast.ops.linear.group import COMPUTE
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm


def rope_tables(ids: Tensor, axes_dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """cos and sin [S, Σ axes_dims / 2] fp32 of position ids [S, axes]; frequencies in fp64, as in
    BFL's `rope`.
    """
    parts = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        parts.append(torch.outer(ids[:, axis].double(), 10000.0**-exponents))
    angles = torch.cat(parts, dim=-1)
    return angles.cos().float(), angles.sin().float()


def compute_dtype(device: torch.device, storage: torch.dtype) -> torch.dtype:
    """The dtype of activations: the weights' own on an accelerator, at least fp32 on a CPU."""
    if device.type == "cpu" and storage != torch.float64:
        return torch.float32
    return storage if storage.itemsize > 1 else torch.bfloat16


class FluxTransformer(FluxTransformer2DModel):
    """FLUX.1's transformer on fluxfast's ops; a drop-in for `diffusers.FluxTransformer2DModel`.

    Constructor arguments and `forward` are diffusers' own. `gradient_checkpointing_interval` n
    (after `enable_gradient_checkpointing()`) checkpoints every nth block; 1, the default,
    checkpoints all.
    """

    _no_split_modules = ["DoubleStreamBlock", "SingleStreamBlock"]  # noqa: RUF012 (diffusers' own declarations are lists)
    _repeated_blocks = ["DoubleStreamBlock", "SingleStreamBlock"]  # noqa: RUF012
    # who computes modulation on the host; None: each block its own
    modulation: ModulationAhead | None = None
    # who replays what `run_blocks` launches; None: it is run
    graphs: StepGraphs | None = None

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
    ) -> None:
        if sum(axes_dims_rope) != attention_head_dim or any(dim % 2 for dim in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {tuple(axes_dims_rope)}: expected even numbers that sum to "
                "attention_head_dim "
                f"{attention_head_dim}, got a sum of {sum(axes_dims_rope)}"
            )
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        for block in self.blocks:
            adopt(block)
        self.gradient_checkpointing_interval = 1
        self._checkpoints_itself = True
        self.recompute: list[str] | None = None
        self.router: Router | None = None

    def set_routes(self, routes: Iterable[Mapping[str, Any]] | None, seed: int = 42) -> None:
        """TREAD: the `routes` of a `tread_config` (None: none), active in training mode with
        gradients enabled.

        Each has selection_ratio (the part of the image tokens to drop), start_layer_idx and
        end_layer_idx. Raises ValueError naming a route that is out of range, out of order, or
        overlaps the one before it.
        """
        blocks = len(self.transformer_blocks) + len(self.single_transformer_blocks)
        self.router = None if routes is None else Router(resolve_routes(routes, blocks), seed)

    def to_json_string(self) -> str:
        # a saved config names diffusers' class, so that every program can load the folder
        config = json.loads(super().to_json_string())
        config["_class_name"] = FluxTransformer2DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> FluxTransformer:
        """Load a diffusers folder (local, or a hub id): `config.json` and safetensors, sharded or
        not; or one file.

        Arguments: subfolder, torch_dtype (or dtype), revision, variant, cache_dir, token,
        local_files_only, force_download. Raises `checkpoint.CheckpointError` naming the file where
        one is missing, truncated, or holds other tensors than the config asks for.
        """
        return flux.load_folder(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: str | os.PathLike, **kwargs: Any
    ) -> FluxTransformer:
        """Load one safetensors file, of any ending: BFL's, Comfy's (`model.diffusion_model.`
        prefix) or diffusers', told apart by its keys.

        Sizes are inferred from the tensors, unless `config` (a dict, a config.json, or the folder
        of one) gives them. Arguments: torch_dtype (or dtype); config; axes_dims_rope, which no file
        stores, where the head dimension is not FLUX.1's 128. Raises `checkpoint.CheckpointError`
        naming the file and the first keys that are missing or unexpected.
        """
        return flux.load_single_file(cls, pretrained_model_link_or_path_or_dict, **kwargs)

    def set_modulation_ahead(self, ahead: bool) -> None:
        """Keep the weights of modulation and of the time embedding in host memory and compute both
        on the CPU (see `fluxfast.model.modulation`), or bring them back to the model's device.

        Raises ValueError naming a linear that can't go: one that carries an adapter, or trains.
        """
        if ahead == (self.modulation is not None):
            return
        if ahead:
            self.modulation = ModulationAhead(self)
        elif self.modulation is not None:
            device, modulation = self.device, self.modulation
            self.modulation = None
            modulation.release(device)

    def set_cuda_graphs(self, on: bool, **options: Any) -> None:
        """Replay the forward and backward of training as CUDA graphs, captured once for each shape
        of the inputs.

        `options` are `StepGraphs`'s. Raises ValueError where that can't be
        (`fluxfast.model.graphs`). From the first step on until graphs are set off again, adapters
        may train, but none may come, go, or change its scale; and each forward is followed by its
        backward.
        """
        self.graphs = StepGraphs.on_gpu(self, **options) if on else None

    def prepare_modulation(self, conditions: Callable[[], Conditions]) -> None:
        """Have a thread compute the modulation of a forward that is to come, with what
        `conditions`, called there, gives.

        The forward finds it by its values, and computes its own where it has others. Does nothing
        unless modulation is ahead.
        """
        if self.modulation is not None:
            self.modulation.prepare(
                conditions, self.device, compute_dtype(self.device, self.x_embedder_dtype)
            )

    def _modulation_input(
        self, conditions: Conditions, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """What the blocks' modulation is made of: vec [B, D], or all vectors that it would become
        (`ModulationAhead`).
        """
        if self.modulation is not None:
            return self.modulation.flat_vectors(conditions, device, dtype)
        return embed(self.time_text_embed, conditions, dtype)

    @property
    def device(self) -> torch.device:
        # diffusers takes the first parameter's, which is one of those that stay on the host
        return super().device if self.modulation is None else self._x_embedder_weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FluxTransformer:
        return super()._apply(
            fn if self.modulation is None else self.modulation.staying(fn), recurse
        )

    def set_compute(self, compute: str, outliers: int = 0) -> None:
        """What the blocks' wide products run in: "same" (the activations' dtype), "int8" or "e4m3"
        (codes, a scale a row).

        Independent of how weights are stored. outliers: how many channels of each product's input,
        the largest, stay out of the codes (`ops.linear_group`). Raises ValueError on another name
        or a negative number.
        """
        if compute not in COMPUTE or outliers < 0:
            raise ValueError(
                f"compute must be one of {COMPUTE} and outliers not negative, not {compute!r} "
                f"and {outliers}"
            )
        for block in self.blocks:
            block.compute, block.outliers = compute, outliers

    def set_recompute(self, policy: str | Sequence[str] | None) -> None:
        """What each block recomputes in backward: "none", "selective" or "full" (`model.fused`),
        one for all or one a block.

        None, the default: "full" for the blocks that gradient checkpointing asks for, "none" for
        the others.
        """
        policies = [policy] * len(self.blocks) if isinstance(policy, str) else policy
        if policies is not None and len(policies) != len(self.blocks):
            raise ValueError(
                f"recompute: expected a policy for each of {len(self.blocks)} blocks, got "
                f"{len(policies)}"
            )
        for name in policies or ():
            if name not in POLICIES:
                raise ValueError(f"recompute: a policy is one of {POLICIES}, not {name!r}")
        self.recompute = None if policies is None else list(policies)

    @property
    def blocks(self) -> list[Any]:
        """The double blocks, then the single ones: the order in which they run and are numbered."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Recompute blocks in backward: by their own policy, or through
        `gradient_checkpointing_func` where one is given.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func)
        self._checkpoints_itself = gradient_checkpointing_func is None

    def _run(self, index: int, block: Any, *args: Any) -> Any:
        """A block, numbered through both kinds, checkpointed if it is one of every
        `gradient_checkpointing_interval`.
        """
        asked = self.gradient_checkpointing and index % self.gradient_checkpointing_interval == 0
        if (
            self.recompute is None
            and asked
            and not self._checkpoints_itself
            and torch.is_grad_enabled()
        ):
            block.policy = "none"
            return self._gradient_checkpointing_func(block, *args)
        block.policy = (
            self.recompute[index] if self.recompute is not None else "full" if asked else "none"
        )
        return block(*args)

    def forward(
        self,
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
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow: hidden_states [B, S_img, in_channels], encoder_hidden_states [B, S_txt,
        joint_attention_dim], pooled_projections [B, pooled], timestep and guidance [B] in 0..1 and
        as is, ids [S, 3]; returns [B, S_img, out]. With modulation ahead those three are wanted on
        the CPU: from the device, forward has to wait for them.

        force_keep_mask [B, S_img]: image tokens that no route may drop (`set_routes`).
        """
        kwargs = dict(joint_attention_kwargs or {})
        in_dtype = hidden_states.dtype
        dtype = compute_dtype(hidden_states.device, self.x_embedder_dtype)
        if self.config.guidance_embeds and guidance is None:
            raise ValueError(
                "guidance is required: this model was distilled with guidance embeds "
                "(config.guidance_embeds)"
            )

        guidance = guidance if self.config.guidance_embeds else None
        conditions = Conditions.of(timestep, guidance, pooled_projections, in_dtype)
        mod = self._modulation_input(conditions, hidden_states.device, dtype)
        tables = rope_tables(
            joint_ids(txt_ids, img_ids).to(hidden_states.device), tuple(self.config.axes_dims_rope)
        )
        trains = self.training and torch.is_grad_enabled()
        router = self.router if trains else None
        batch, tokens, _ = hidden_states.shape
        draws = (
            {}
            if router is None
            else router.draws(batch, tokens, force_keep_mask, hidden_states.device)
        )
        inputs = (hidden_states.to(dtype), encoder_hidden_states.to(dtype), mod, *tables)
        control = Control(
            controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat
        )

        if (
            self.graphs is not None
            and trains
            and not kwargs
            and control.double is None
            and control.single is None
        ):
            output = self.graphs(router, draws, *inputs)
        else:
            with lora_scale(self, kwargs.pop("scale", 1.0)):
                project_image_prompts(self, kwargs)
                output = self.run_blocks(router, draws, *inputs, kwargs=kwargs, control=control)
        output = output.to(in_dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def run_blocks(
        self,
        router: Router | None,
        draws: Draws,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        mod: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        kwargs: dict[str, Any] | None = None,
        control: Control = NO_CONTROL,
    ) -> Tensor:
        """From the inputs in the activations' dtype to the prediction: all that a step computes on
        the device.

        A function of its tensors and of the weights alone: nothing random, nothing read back.
        """
        kwargs = kwargs or {}
        mods: list[Any] = [mod] * (len(self.blocks) + 1)
        if self.modulation is not None:
            mods = [*self.modulation.views(mod, len(hidden_states))]
        img, txt = (
            project(hidden_states, self.x_embedder),
            project(encoder_hidden_states, self.context_embedder),
        )
        route = RouteState(router, draws, (cos, sin), txt.shape[1])
        for i, block in enumerate(self.transformer_blocks):
            img = route.before(i, img)
            txt, img = self._run(i, block, img, txt, mods[i], route.pe, kwargs)
            if control.double is not None:
                img = img + route.of_kept(
                    control_residual(
                        control.double, i, len(self.transformer_blocks), control.repeat
                    )
                )
            img = route.after(i, img)

        x, txt_len = torch.cat([txt, img], dim=1), txt.shape[1]
        for i, block in enumerate(self.single_transformer_blocks):
            number = len(self.transformer_blocks) + i
            x = route.before_joint(number, x)
            x = self._run(number, block, x, None, mods[number], route.pe, kwargs)
            if control.single is not None:
                sample = control_residual(control.single, i, len(self.single_transformer_blocks))
                x = torch.cat([x[:, :txt_len], x[:, txt_len:] + route.of_kept(sample)], dim=1)
            x = route.after_joint(number, x)

        last = mods[-1]
        vectors = (
            last[0]
            if isinstance(last, tuple)
            else project(torch.nn.functional.silu(last), self.norm_out.linear)
        )
        scale, shift = vectors.chunk(2, dim=-1)
        img = modulated_layer_norm(x[:, txt_len:], scale, shift, eps=self.norm_out.norm.eps)
        return project(img, self.proj_out)

    @property
    def x_embedder_dtype(self) -> torch.dtype:
        # x_embedder is never quantised, so its dtype is the one the model was loaded in
        return self._x_embedder_weight.dtype

    @property
    def _x_embedder_weight(self) -> Tensor:
        module: Any = self.x_embedder
        return getattr(module, "base_layer", module).weight
