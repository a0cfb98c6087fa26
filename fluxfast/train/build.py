"""From the config to a run's parts: the data with its caches, the model, what validation needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from rich.console import Console
from torch import Tensor

from fluxfast.adapters.kind import AdapterFile
from fluxfast.config.attention import MECHANISMS
from fluxfast.config.datasets import DataConfig, load_data_config
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError, read_json, shown
from fluxfast.data.batches import Batch, BatchLoader
from fluxfast.data.encode import EncoderSettings
from fluxfast.data.encoders import compute_dtype
from fluxfast.data.model_folders import local_folder
from fluxfast.data.prepare import prepare
from fluxfast.data.prepared import Prepared, PreparedDataset
from fluxfast.data.sampler import Sampler
from fluxfast.data.survey import progress_bars
from fluxfast.memory.stream import BlockStream, stream_blocks
from fluxfast.memory.wishes import Wishes, wishes_of
from fluxfast.model.apply import Choices, drawing_with, make_ready
from fluxfast.model.compiled import CompiledRegions, cache_in
from fluxfast.model.transformer import FluxTransformer
from fluxfast.text import text_problem
from fluxfast.train import choose
from fluxfast.train.adapter import add_adapter
from fluxfast.train.assistant import activate, add_assistant
from fluxfast.train.base_model import load_transformer, open_base, originals_of, quantizing_device
from fluxfast.train.choose import BatchShape, tokens_of
from fluxfast.train.compiling import CompileProgress
from fluxfast.train.data_options import survey_options
from fluxfast.train.edits import dataset_edits, prompt_edits
from fluxfast.train.events import say
from fluxfast.train.run_events import RunEvents
from fluxfast.train.validation import ValidationSettings, Validator

# the nickname of validation_prompt, beside those of the user's library
PRIMARY_PROMPT = "validation"
VAE_DTYPES = {
    "default": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass
class RunData:
    """The prepared datasets, the position in them, and the options of `load_batch`."""

    config: DataConfig
    prepared: Prepared
    sampler: Sampler
    batch_options: Mapping[str, Any]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every image in the first epoch."""
        return [sample.target for dataset in self.prepared.datasets for sample in dataset.samples]

    @property
    def batch_shapes(self) -> list[BatchShape]:
        """The batches of every epoch, each once."""
        combined = bool(self.batch_options["combine_references"])
        datasets = self.prepared.datasets
        return [shape for dataset in datasets for shape in _batch_shapes(dataset, combined)]

    @property
    def encoded_pixels(self) -> int:
        """Pixels of the largest image that is encoded while the run trains; 0: none is."""
        on_demand = [each for each in self.prepared.datasets if each.on_demand is not None]
        return max((w * h for dataset in on_demand for w, h in dataset.sizes), default=0)

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of most images, for the LoRA's metadata."""
        sizes = self.sizes
        return max(sorted(set(sizes)), key=sizes.count)

    @property
    def instance_prompts(self) -> list[str]:
        return sorted(
            {dataset.instance_prompt for dataset in self.config.images if dataset.instance_prompt}
        )

    def loader(self, batch: int, then: Callable[[Batch, int], Any]) -> BatchLoader:
        """What `then` makes of the run's batches, from number `batch` on.

        Batches are counted from 0, over all micro-steps.
        """
        return BatchLoader(
            self.prepared,
            self.sampler,
            step=batch,
            **self.batch_options,
            then=then,
        )


def _batch_shapes(dataset: PreparedDataset, combined: bool) -> Iterator[BatchShape]:
    """A batch for each size of a dataset, with the most tokens of references that it may have."""
    total = sum if combined else max
    most: dict[tuple[int, int], int] = {}
    for sample in dataset.samples:
        tokens = total([tokens_of(reference.target) for reference in sample.references] or [0])
        most[sample.target] = max(tokens, most.get(sample.target, 0))
    for size in sorted(dataset.sizes):
        # a size that only a later epoch has is taken for the largest
        references = most.get(size, max(most.values(), default=0))
        yield BatchShape(size, dataset.train_batch_size, dataset.id, references)


@dataclass
class Parts:
    """The model, ready to train, and what depends on it.

    Attributes:
        choices: how the model computes.
        stream: who streams its blocks; None: they are resident.
        scheduler: the pipeline's.
        validator: None where validation is off or has no prompt.
        compiling: tells how torch.compile goes; None: nothing is compiled.
    """

    transformer: FluxTransformer
    choices: Choices
    stream: BlockStream | None
    scheduler: FlowMatchEulerDiscreteScheduler
    validator: Validator | None
    compiling: CompileProgress | None = None

    @property
    def shift_bounds(self) -> dict[str, Any]:
        """`flow.auto_shift`'s keyword arguments."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return {name: self.scheduler.config[name] for name in names}


def load_data(
    config: TrainConfig, seed: int, device: torch.device, console: Console, events: RunEvents
) -> RunData:
    """Read the dataloader's config, fill the caches, print the closing table."""
    data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
    for note in data.notes:
        say(console, note)
    prompts = validation_prompts(config)
    with progress_bars(console) as progress:
        prepared = prepare(
            data,
            _encoder_settings(config, device),
            extra_prompts=[
                *prompts.values(),
                *([config.validation_negative_prompt] if prompts else []),
            ],
            progress=progress,
            encoding=events.stage("init_vae_cache"),
            **survey_options(config),
        )
    console.print(prepared.report)
    sampler = Sampler(
        prepared.datasets,
        seed=seed,
        sampling=config.data_backend_sampling,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    return RunData(
        data,
        prepared,
        sampler,
        {
            "caption_dropout_probability": config.caption_dropout_probability,
            "combine_references": config.combines_references,
            "masked_loss_probability": config.masked_loss_probability,
        },
    )


def validation_prompts(config: TrainConfig) -> dict[str, str]:
    """Nickname to prompt: validation_prompt and the user's library."""
    if config.validation_disable:
        return {}
    prompts = {PRIMARY_PROMPT: config.validation_prompt} if config.validation_prompt else {}
    if config.user_prompt_library:
        library = read_json(config.user_prompt_library)
        if not isinstance(library, dict) or not all(
            isinstance(text, str) for text in library.values()
        ):
            raise ConfigError(
                [
                    f'{config.user_prompt_library}: expected {{"nickname": "prompt", ...}}, all '
                    "of them texts"
                ]
            )
        problems = [
            f'{config.user_prompt_library}: the prompt "{nickname}" {problem}'
            for nickname, text in library.items()
            if (problem := text_problem(text))
        ]
        if PRIMARY_PROMPT in library and prompts:
            problems.append(
                f'{config.user_prompt_library}: "{PRIMARY_PROMPT}" is the nickname of '
                "validation_prompt: take another one"
            )
        if problems:
            raise ConfigError(problems)
        prompts |= library
    for name, text in [
        *prompts.items(),
        ("validation_negative_prompt", config.validation_negative_prompt),
    ]:
        if (name + text).encode(errors="replace").decode() != name + text:
            raise ConfigError(
                [
                    f"the prompt {shown(name)} holds half of a character ({ascii(text)[:100]}): "
                    "write it anew"
                ]
            )
    return prompts


def _encoder_settings(config: TrainConfig, device: torch.device) -> EncoderSettings:
    quantised = {config.text_encoder_1_precision, config.text_encoder_2_precision} != {"no_change"}
    return EncoderSettings(
        pipeline=config.base_source,
        vae=config.vae_source,
        t5=config.t5_source,
        variant=config.variant,
        device=device,
        text_dtype=config.weight_dtype,
        clip_precision=config.text_encoder_1_precision,
        t5_precision=config.text_encoder_2_precision,
        quantize_on=quantizing_device(config.quantize_via, device) if quantised else "cpu",
        vae_dtype=VAE_DTYPES[config.vae_dtype],
        max_length=config.tokenizer_max_length,
        t5_padding=config.t5_padding,
        vae_batch_size=config.vae_batch_size,
        vae_tiling=config.vae_enable_tiling,
        vae_slicing=config.vae_enable_slicing,
    )


def load_parts(
    config: TrainConfig,
    lora: AdapterFile | None,
    data: RunData,
    seed: int,
    device: torch.device,
    console: Console,
    *,
    saved: Mapping[str, Tensor] | None,
) -> Parts:
    """Load the transformer, give it its adapter, and get it ready to train and to validate.

    lora: the file that says what the adapter is like, if the config doesn't. saved: a checkpoint's
    adapter, which takes the place of a new one. What the run chooses by itself is
    chosen before anything is loaded, and once more when the model is there to be looked at.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        local_folder(config.base_source._replace(subfolder="scheduler"))
    )
    base, wishes = open_base(config), wishes_of(config)
    facts = choose.facts_before_loading(
        config, base, data.batch_shapes, device, encoded_pixels=data.encoded_pixels
    )
    choices = choose.choose(wishes, facts)
    choose.tell_budget(choices, wishes, facts, console)
    transformer = load_transformer(config, base, choices, device, console)
    if config.tread_config:
        transformer.set_routes([route.model_dump() for route in config.tread_config.routes])
    originals = originals_of(config, base, device)
    add_assistant(config, transformer, console)
    add_adapter(
        config, transformer, lora, seed=seed, saved=saved, originals=originals, console=console
    )
    activate(transformer)
    facts = choose.facts_of_model(facts, config, transformer)
    choices = choose.choose(wishes, facts)
    make_ready(transformer, choices)
    if choices.deterministic:
        use_deterministic_algorithms()
    choose.tell(choices, wishes, facts, transformer, console)
    stream = _stream(config, choices, transformer, device, console)
    if choices.graphs:
        transformer.set_cuda_graphs(
            True, optional=wishes.cuda_graphs == "auto", say=partial(say, console)
        )
    return Parts(
        transformer,
        choices,
        stream,
        scheduler,
        _validator(config, wishes, data, seed, transformer, scheduler),
        _compiling(config, wishes, console),
    )


def _compiling(config: TrainConfig, wishes: Wishes, console: Console) -> CompileProgress | None:
    """Who tells of torch.compile, once its results have a folder; None where nobody compiles."""
    if wishes.compile is None and wishes.draws_compiled is None:
        return None
    return CompileProgress(partial(say, console), str(cache_in(config.cache_dir / "compiled")))


def use_deterministic_algorithms() -> None:
    """Have PyTorch compute the same bits each time on a GPU; our own kernels always do."""
    # cuBLAS, where it computes on several streams; read when its first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # it is no matter of ours, and a pass over all memory that is taken
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _stream(
    config: TrainConfig,
    choices: Choices,
    transformer: FluxTransformer,
    device: torch.device,
    console: Console,
) -> BlockStream | None:
    """Stream the blocks of a transformer that has its adapters, and say so, if that was chosen."""
    if not choices.streams:
        return None
    if choices.use_stream and device.type != "cuda":
        say(console, '"group_offload_use_stream" has no effect: there is no CUDA device')
    if device.type == "cuda" and not choices.use_stream:
        say(
            console,
            'the step waits for each copy of weights: "group_offload_use_stream": true copies '
            "beside the computation",
        )
    folder = config.group_offload_to_disk_path
    disk_path = Path(folder).expanduser() if folder else None
    stream = stream_blocks(
        transformer,
        device,
        slots=choices.slots,
        blocks_per_group=choices.blocks_per_group,
        use_stream=choices.use_stream,
        disk_path=disk_path,
        inputs_on_host=choices.host_inputs,
    )
    where = "in host memory" if disk_path is None else f"in {disk_path}"
    say(
        console,
        f"blocks are streamed: {stream.block_bytes / 2**30:.2f} GiB {where}, "
        f"{stream.ring_bytes / 2**30:.2f} GiB on the device (a ring of {stream.schedule.slots})",
    )
    if stream.shortfall:
        say(console, stream.shortfall)
    return stream


def _validator(
    config: TrainConfig,
    wishes: Wishes,
    data: RunData,
    seed: int,
    transformer: FluxTransformer,
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> Validator | None:
    prompts = prompt_edits(config, validation_prompts(config))
    if not config.validation_disable:
        prepared = (*data.prepared.datasets, *data.prepared.held_out)
        prompts |= dataset_edits(config, data.config, prepared)
    if not prompts:
        return None
    settings = ValidationSettings(
        prompts=prompts,
        negative_prompt=config.validation_negative_prompt,
        resolutions=config.validation_resolutions,
        steps=config.validation_num_inference_steps,
        guidance=config.validation_guidance,
        guidance_real=config.validation_guidance_real,
        seed=seed if config.validation_seed is None else config.validation_seed,
        images_per_prompt=config.num_validation_images,
        beside_base=not config.disable_benchmark,
        references_at=config.validation_stitch_input_location,
        other_noise=config.validation_randomize,
        image_format=config.validation_image_format,
        quality=config.validation_image_quality,
        no_cfg_steps=config.validation_no_cfg_until_timestep,
        masked_text=config.flux_attention_masked_training,
    )

    def embeds(prompt: str) -> dict[str, Tensor]:
        tensors = data.prepared.prompts.get(prompt)
        return {name: tensor[None] for name, tensor in tensors.items()}

    def load_vae() -> Any:
        vae = AutoencoderKL.from_pretrained(
            local_folder(config.vae_source),
            torch_dtype=compute_dtype(transformer.device, VAE_DTYPES[config.vae_dtype]),
        )
        if config.vae_enable_tiling:
            vae.enable_tiling()
        if config.vae_enable_slicing:
            vae.enable_slicing()
        return vae.eval()

    return Validator(
        settings,
        output_dir=config.output_dir,
        transformer=transformer,
        scheduler=scheduler,
        load_vae=load_vae,
        embeds=embeds,
        dtype=config.weight_dtype,
        drawing=_drawing(wishes, transformer),
    )


def _drawing(
    wishes: Wishes, transformer: FluxTransformer
) -> Callable[[], AbstractContextManager[None]]:
    """The context in which validation images are drawn: its own attention, compiled or not."""
    compiled = None
    if wishes.draws_compiled is not None:
        # graphs of training serve here too, where something is compiled there
        compiled = transformer.compiled or CompiledRegions(wishes.draws_compiled)
    attention = MECHANISMS[wishes.mechanism].drawing
    return partial(drawing_with, transformer, attention, compiled)
