"""The FLUX.1 transformer on our blocks.

It is diffusers' `FluxTransformer2DModel` by type, config, module names and signature. Between
blocks it does what diffusers' does, except that text and image stay one joint tensor through all
single blocks. On a CPU it computes in fp32 whatever the weights are stored in, since bf16 is many
times slower there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from fluxfast.checkpoint import opening
from fluxfast.config.precision_words import COMPUTE_WORDS, compute_named
from fluxfast.model.blocks import convert_block
from fluxfast.model.compiled import Compile, CompiledRegions, any_length
from fluxfast.model.diffusers_forward import (
    NO_CONTROL,
    Control,
    control_residual,
    joint_ids,
    lora_scale,
    project_image_prompts,
)
from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.model.graphs import StepGraphs
from fluxfast.model.modulation import Conditions, ModulationAhead, embed
from fluxfast.model.rope import rope_tables
from fluxfast.model.routing import Draws, Router, RouteState, resolve_routes
from fluxfast.model.streams import joined
from fluxfast.model.surroundings import block_vectors, embed_tokens, predict
from fluxfast.model.tape import POLICIES
from fluxfast.model.text_mask import MaskedText
from fluxfast.ops import attention_sage
from fluxfast.ops.attention import BACKENDS
from fluxfast.ops.linear.group import COMPUTE
from fluxfast.text import wrong_choice


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

    # lists, as in diffusers' own declarations
    _no_split_modules = ["DoubleStreamBlock", "SingleStreamBlock"]  # noqa: RUF012
    _repeated_blocks = ["DoubleStreamBlock", "SingleStreamBlock"]  # noqa: RUF012
    # what computes the modulation of all blocks on the host; where it is None, each block computes
    # its own
    modulation: ModulationAhead | None = None
    # what replays `run_blocks` as CUDA graphs; where it is None, `run_blocks` runs
    graphs: StepGraphs | None = None
    # what compiles regions of forward; where it is None, they run as they are
    compiled: CompiledRegions | None = None
    # where the gradients of all that trains are, if its owner has made it
    gradients: FlatGradients | None = None
    # the dtype of the products of wider weights that train (mixed precision); None: the weights'
    autocast_dtype: torch.dtype | None = None

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
                f"attention_head_dim {attention_head_dim}, got a sum of {sum(axes_dims_rope)}"
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
            convert_block(block)
        self.gradient_checkpointing_interval = 1
        self._checkpoints_itself = True
        self.recompute: list[str] | None = None
        self.router: Router | None = None

    def set_routes(self, routes: Iterable[Mapping[str, Any]] | None, seed: int = 42) -> None:
        """Set the TREAD routes of training, the `routes` of a `tread_config`; None sets none.

        Each has selection_ratio (the part of the image tokens to drop), start_layer_idx and
        end_layer_idx. They are active in training mode with gradients enabled. Raises ValueError
        naming a route that is out of range, out of order, or overlaps the one before it.
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
        """Load a diffusers folder, local or a hub id (`config.json` and safetensors), or one file.

        Arguments: subfolder, torch_dtype (or dtype), revision, variant, cache_dir, token,
        local_files_only, force_download. Raises `checkpoint.CheckpointError` naming the file where
        one is missing, truncated, or holds other tensors than the config asks for.
        """
        return opening.load_folder(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: str | os.PathLike, **kwargs: Any
    ) -> FluxTransformer:
        """Load one safetensors file, whatever its ending, in BFL's, Comfy's or diffusers' names.

        The names in it tell which it has; Comfy's begin with `model.diffusion_model.`. Sizes are
        inferred from the tensors, unless `config` (a dict, a config.json, or the folder of one)
        gives them. Arguments: torch_dtype (or dtype); config; axes_dims_rope, which no file stores,
        where the head dimension is not FLUX.1's 128. Raises `checkpoint.CheckpointError` naming the
        file and the first keys that are missing or unexpected.
        """
        return opening.load_single_file(cls, pretrained_model_link_or_path_or_dict, **kwargs)

    def set_modulation_ahead(self, ahead: bool) -> None:
        """Whether modulation and the time embedding are computed on the CPU, ahead of the blocks.

        Their weights are in host memory then (`fluxfast.model.modulation`); False brings them back
        to the model's device. Raises ValueError naming a linear that can't go there: one that
        carries an adapter, or trains.
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
        """Whether training replays its forward and backward as CUDA graphs, one for each shape.

        options: `StepGraphs`'s. Raises ValueError where steps can't be captured
        (`fluxfast.model.graphs`). While graphs are on, adapters may train, but none may come, go,
        or change its scale, and each forward must be followed by its backward.
        """
        self.graphs = StepGraphs.on_gpu(self, **options) if on else None

    def prepare_modulation(self, conditions: Callable[[], Conditions]) -> None:
        """Have a thread compute the modulation of a coming forward from what `conditions` returns.

        `conditions` is called in that thread. The forward compares its own conditions with these,
        and computes modulation itself if they differ. Does nothing unless modulation is ahead.
        """
        if self.modulation is not None:
            self.modulation.prepare(
                conditions, self.device, compute_dtype(self.device, self.x_embedder_dtype)
            )

    def _modulation_input(
        self, conditions: Conditions, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The conditioning vector [B, D], or with modulation ahead the vectors of all blocks."""
        if self.modulation is not None:
            return self.modulation.flat_vectors(conditions, device, dtype)
        return self.region(embed, self.time_text_embed, conditions, dtype)

    def region(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args)`, compiled where that was chosen (`set_compile`)."""
        run = function if self.compiled is None else partial(self.compiled, function)
        return run(*args, **kwargs)

    def set_compile(self, how: Compile | None) -> None:
        """Have torch.compile compile what is around the blocks, and with `how.blocks` the blocks.

        None compiles nothing. Blocks that are streamed can't be compiled: their weights are not
        where they were.
        """
        self.compiled = None if how is None else CompiledRegions(how)

    @property
    def device(self) -> torch.device:
        # diffusers takes the first parameter's device, which with modulation ahead is the host
        return super().device if self.modulation is None else self._x_embedder_weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FluxTransformer:
        fn = fn if self.modulation is None else self.modulation.staying(fn)
        return super()._apply(fn, recurse)

    def set_compute(self, compute: str, outliers: int = 0) -> None:
        """Set what the blocks' wide products run in, which need not be how weights are stored.

        compute: "same" (the activations' dtype), "int8" or "fp8" (8-bit codes with a scale a row).
        outliers: how many channels of each product's input, the largest, stay out of the codes
        (`fluxfast.ops.linear.group`). Raises ValueError on another name or a negative number.
        """
        named = compute_named(compute)
        if named not in COMPUTE:
            raise ValueError(wrong_choice("compute", compute, COMPUTE_WORDS))
        if outliers < 0:
            raise ValueError(f"outliers: expected a number of channels, 0 or more, got {outliers}")
        for block in self.blocks:
            block.compute, block.outliers = named, outliers

    def set_attention(self, backend: str) -> None:
        """Set what the blocks compute attention with.

        backend: "auto", the fastest that there is; PyTorch's "cudnn", "flash", "efficient", or on a
        CPU "cpu"; "native", ours in fp32 on a CPU; "ref", plain torch; or, to draw images only, one
        of `fluxfast.ops.attention_sage`. Raises ValueError on another name; a back end that can't
        do a call is an error in that call.
        """
        known = (*BACKENDS, *attention_sage.FUNCTIONS)
        if backend not in known:
            raise ValueError(wrong_choice("attention", backend, known))
        for block in self.blocks:
            block.attention = backend

    def set_recompute(self, policy: str | Sequence[str] | None) -> None:
        """Set what backward recomputes: "none", "selective" or "full", for all blocks or for each.

        What a policy keeps instead is in `fused_double.KEPT_DOUBLE` and `single_block.KEPT_SINGLE`.
        With None, the default, the blocks that gradient checkpointing asks for recompute all, and
        the others nothing. Raises ValueError on another name, or a list of another length than the
        number of blocks.
        """
        policies = [policy] * len(self.blocks) if isinstance(policy, str) else policy
        if policies is not None and len(policies) != len(self.blocks):
            raise ValueError(
                f"recompute: expected a policy for each of {len(self.blocks)} blocks, got "
                f"{len(policies)}"
            )
        for name in policies or ():
            if name not in POLICIES:
                raise ValueError(wrong_choice("recompute", name, POLICIES))
        self.recompute = None if policies is None else list(policies)

    @property
    def blocks(self) -> list[Any]:
        """The double blocks, then the single ones: the order in which they run and are numbered."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Recompute blocks in backward: themselves, or by the checkpoint function that is given."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func)
        self._checkpoints_itself = gradient_checkpointing_func is None

    def _block_calls(self) -> list[Callable[..., Any]]:
        """What to call for each block in this forward, after its policy is set.

        That is the block itself, or the caller's own checkpoint function around it.
        """
        calls: list[Callable[..., Any]] = []
        regions = self.compiled if self.compiled and self.compiled.how.blocks else None
        for i, block in enumerate(self.blocks):
            asked = self.gradient_checkpointing and i % self.gradient_checkpointing_interval == 0
            by_function = asked and not self._checkpoints_itself and torch.is_grad_enabled()
            if self.recompute is None and by_function:
                block.policy = "none"
                calls.append(partial(self._gradient_checkpointing_func, block))
                continue
            if self.recompute is not None:
                block.policy = self.recompute[i]
            else:
                block.policy = "full" if asked else "none"
            calls.append(block if regions is None else partial(regions.call_block, block))
        return calls

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
        scene_tokens: int | None = None,
        text_mask: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow [B, S_img, out_channels]; arguments are diffusers', and three more.

        hidden_states [B, S_img, in_channels]; encoder_hidden_states [B, S_txt,
        joint_attention_dim]; pooled_projections [B, pooled_projection_dim]; timestep [B] in 0..1;
        guidance [B] as it is; ids [S, 3]. With modulation ahead, pooled_projections, timestep and
        guidance should be on the CPU, since forward has to wait for copies of them from the device.
        force_keep_mask [B, S_img]: image tokens that no route may drop (`set_routes`).
        scene_tokens: how many of the image tokens, from the first, belong to the scene that is
        predicted; the others are Kontext's references, which no route drops and for which nothing
        is predicted: S_img is `scene_tokens` in the output and in force_keep_mask then.
        text_mask: bool [B, S_txt], false at text tokens that no token attends to. Raises
        ValueError where a model with guidance embeds gets no guidance.
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
        with self._mixed_precision(hidden_states.device):
            mod = self._modulation_input(conditions, hidden_states.device, dtype)
        ids = joint_ids(txt_ids, img_ids).to(hidden_states.device)
        if self.compiled is not None:
            any_length(ids, dim=0)
        tables = self.region(rope_tables, ids, tuple(self.config.axes_dims_rope))
        trains = self.training and torch.is_grad_enabled()
        router = self.router if trains else None
        batch, tokens, _ = hidden_states.shape
        draws: Draws = {}
        if router is not None:
            scene = tokens if scene_tokens is None else scene_tokens
            draws = router.draws(
                batch, scene, force_keep_mask, hidden_states.device, references=tokens - scene
            )
        inputs = [hidden_states.to(dtype), encoder_hidden_states.to(dtype), mod, *tables]
        if text_mask is not None:
            inputs.append(text_mask)
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
            output = self.graphs(router, draws, *inputs, scene_tokens=scene_tokens)
        else:
            scaled = lora_scale(self, kwargs.pop("scale", 1.0))
            with scaled, self._mixed_precision(hidden_states.device):
                project_image_prompts(self, kwargs)
                output = self.run_blocks(
                    router,
                    draws,
                    *inputs,
                    kwargs=kwargs,
                    control=control,
                    scene_tokens=scene_tokens,
                )
        output = output.to(in_dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _mixed_precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which products are in `autocast_dtype`, if there is one."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast_dtype)

    def run_blocks(
        self,
        router: Router | None,
        draws: Draws,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        mod: Tensor,
        cos: Tensor,
        sin: Tensor,
        text_mask: Tensor | None = None,
        *,
        kwargs: dict[str, Any] | None = None,
        control: Control = NO_CONTROL,
        scene_tokens: int | None = None,
    ) -> Tensor:
        """The prediction from inputs in the activations' dtype: all that runs on the device.

        It depends on its tensors, the weights and, with dropout, the device's generator alone, and
        it reads nothing back from the device, so that `StepGraphs` can capture it.
        """
        masked = MaskedText(text_mask, kwargs or {})
        mods = self._modulation_of_blocks(mod, len(hidden_states))
        img, txt = self.region(embed_tokens, self, hidden_states, encoder_hidden_states)
        route = RouteState(router, draws, (cos, sin), txt.shape[1])
        doubles, singles = len(self.transformer_blocks), len(self.single_transformer_blocks)
        calls = self._block_calls()

        for i in range(doubles):
            img = route.before(i, img)
            txt, img = calls[i](img, txt, mods[i], route.pe, masked.beside(img.shape[1]))
            if control.double is not None:
                sample = control_residual(control.double, i, doubles, control.repeat)
                img = img + route.of_kept(sample)
            img = route.after(i, img)

        x, txt_len = joined(txt, img), txt.shape[1]
        for i in range(doubles, doubles + singles):
            x = route.before_joint(i, x)
            x = calls[i](x, None, mods[i], route.pe, masked.beside(x.shape[1] - txt_len))
            if control.single is not None:
                sample = control_residual(control.single, i - doubles, singles)
                x = torch.cat([x[:, :txt_len], x[:, txt_len:] + route.of_kept(sample)], dim=1)
            x = route.after_joint(i, x)

        # all image tokens without a count of the scene's
        scene = x[:, txt_len:][:, :scene_tokens]
        return self.region(predict, self, scene, mods[-1])

    def _modulation_of_blocks(self, mod: Tensor, batch: int) -> list[Any]:
        """What each block, and the last layer behind them, is given as its modulation."""
        if self.modulation is not None:
            return [*self.modulation.views(mod, batch)]
        how = None if self.compiled is None else self.compiled.how
        if how is None or how.blocks or any(b.residency is not None for b in self.blocks):
            return [mod] * (len(self.blocks) + 1)
        return [*(self.region(block_vectors, block, mod) for block in self.blocks), mod]

    @property
    def x_embedder_dtype(self) -> torch.dtype:
        # x_embedder is never quantised, so its dtype is the one the model was loaded in
        return self._x_embedder_weight.dtype

    @property
    def _x_embedder_weight(self) -> Tensor:
        module: Any = self.x_embedder
        return getattr(module, "base_layer", module).weight
