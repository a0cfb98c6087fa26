"""Validation images: diffusers' `FluxPipeline` around our transformer.

The prompts were encoded before the run. Files lie in `<output_dir>/validation_images`, named by
`image_files`. Step 0 draws with the adapters off, which is the base model; later images have that
one at their left, unless this is disabled. A grid has a row for each prompt and a column for each
step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from rich.console import Console
from torch import Tensor

from fluxfast.adapters.kinds import without_adapters
from fluxfast.data.images import UnreadableImage
from fluxfast.files import atomic_file
from fluxfast.progress import counting
from fluxfast.train.drawing import cut_at_zeros, decoded, guided_after
from fluxfast.train.edits import Edit, beside, load_references, reference_tokens, stitched
from fluxfast.train.events import say
from fluxfast.train.grid import Row, draw_grid, side_by_side
from fluxfast.train.image_files import (
    FOLDER,
    DrawnImage,
    drawn_images,
    file_name,
    file_words,
    grid_name,
)
from fluxfast.train.previews import PREVIEWED, Denoised, Drawing, Previewer, on_step_end


@dataclass(frozen=True)
class ValidationSettings:
    """What a round of validation draws.

    Attributes:
        prompts: texts by nickname, with the references that each is drawn with.
        negative_prompt: used where `guidance_real` is above 1.
        resolutions: (width, height) in pixels.
        steps: denoising steps.
        guidance: what the model is told.
        guidance_real: classifier-free guidance.
        no_cfg_steps: denoising steps before it begins.
        masked_text: whether T5's padding is left out of prompts, as it is in training.
        seed: of the first image of each prompt and size; the next has the next seed.
        other_noise: whether each step draws other noise, in place of that of `seed`.
        images_per_prompt: of each size.
        beside_base: whether each image has the base model's at its left.
        references_at: where references stand beside an image, "left" or "right".
        image_format: of the files: png, webp or jpeg; `quality` is the latter two's, up to 100.
    """

    prompts: Mapping[str, Edit]
    negative_prompt: str
    resolutions: Sequence[tuple[int, int]]
    steps: int
    guidance: float
    guidance_real: float
    seed: int
    images_per_prompt: int
    beside_base: bool
    references_at: str = "left"
    no_cfg_steps: int = 0
    masked_text: bool = False
    other_noise: bool = False
    image_format: str = "png"
    quality: int = 90


@dataclass(frozen=True)
class Drawn:
    """An image that validation has drawn and written.

    path: its file, where other images may stand beside it. image: it alone. label: of the weights
    that it was drawn with, "" where a step has one kind only.
    """

    path: Path
    nickname: str
    label: str
    prompt: str
    index: int
    image: Image.Image

    @property
    def name(self) -> str:
        """What its file is called by."""
        return f"{self.nickname}_{self.label}" if self.label else self.nickname


def png_of(path: Path) -> bytes:
    """An image's file as PNG, whatever its own format."""
    if path.suffix == ".png":
        return path.read_bytes()
    stream = io.BytesIO()
    with Image.open(path) as image:
        image.save(stream, format="PNG")
    return stream.getvalue()


class Validator:
    """Makes the validation images of a run. The VAE is loaded for each round and freed after it.

    `embeds` gives a prompt's text embeddings: prompt_embeds [1, L, D], pooled_prompt_embeds [1, P],
    and with `masked_text` attention_mask, bool [1, L]. `drawing` is a context in which the
    transformer draws. `previewer`, where it is set, is shown each denoising step.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        *,
        output_dir: Path,
        transformer: Any,
        scheduler: FlowMatchEulerDiscreteScheduler,
        load_vae: Callable[[], Any],
        embeds: Callable[[str], Mapping[str, Tensor]],
        dtype: torch.dtype,
        drawing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._drawing = drawing
        self.settings, self.folder = settings, output_dir / FOLDER
        self._transformer, self._scheduler, self._load_vae = transformer, scheduler, load_vae
        self._embeds, self._dtype = embeds, dtype
        self._words = file_words(settings.prompts)
        self.previewer: Previewer | None = None

    def run(self, step: int, console: Console, *, label: str = "") -> list[Drawn]:
        """Draw and write the images of a step.

        label: of the weights in use, where a step is drawn with several; it ends each nickname in
        the files' names. The global random state, the model's mode and its adapters stay as they
        were.
        """
        training = self._transformer.training
        self._transformer.eval()
        base_alone = without_adapters(self._transformer) if step == 0 else nullcontext()
        rng = torch.get_rng_state()
        try:
            with base_alone, self._drawing():
                return self._run(step, console, label)
        finally:
            torch.set_rng_state(rng)
            self._transformer.train(training)

    @torch.no_grad()
    def _run(self, step: int, console: Console, label: str) -> list[Drawn]:
        pipeline = self._pipeline()
        s = self.settings
        images = len(s.prompts) * len(s.resolutions) * s.images_per_prompt
        drawn = []
        previews = self.previewer.loaded() if self.previewer else nullcontext()
        with previews, counting(console, transient=True) as progress:
            bar = progress.add_task(f"drawing, step {step}", total=images * s.steps)

            def advance() -> None:
                progress.advance(bar)

            for nickname, edit in s.prompts.items():
                try:
                    references = load_references(edit.references)
                except UnreadableImage as error:
                    say(console, f"validation: {nickname} is not drawn, {error}")
                    continue
                with self._beside(pipeline.vae, references):
                    for size, index in self._series():
                        seed = s.seed + index + (step if s.other_noise else 0)
                        name = f"{nickname}_{label}" if label else nickname
                        drawing = Drawing(name, edit.prompt, size, step, s.steps)
                        on_step = self._on_step(drawing, advance)
                        image = self._image(pipeline, edit.prompt, size, seed, on_step)
                        path = self._path(step, self._word(nickname, label), index, size)
                        base = self._base_of(step, nickname, index, size)
                        self._save(image, path, references, base, step)
                        drawn.append(Drawn(path, nickname, label, edit.prompt, index, image))
        return drawn

    def _pipeline(self) -> FluxPipeline:
        pipeline = FluxPipeline(
            scheduler=type(self._scheduler).from_config(self._scheduler.config),
            vae=self._load_vae().to(self._transformer.device),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=self._transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline._callback_tensor_inputs = [*pipeline._callback_tensor_inputs, *PREVIEWED]
        return pipeline

    def _series(self) -> list[tuple[tuple[int, int], int]]:
        """(size, index) of the images of a prompt."""
        indices = range(self.settings.images_per_prompt)
        return [(size, index) for size in self.settings.resolutions for index in indices]

    def _word(self, nickname: str, label: str) -> str:
        """What is drawn of a nickname with some weights, in files' names."""
        word = self._words[nickname]
        return f"{word}_{file_words([label])[label]}" if label else word

    def _path(self, step: int, word: str, index: int, size: tuple[int, int]) -> Path:
        extension = {"jpeg": "jpg"}.get(self.settings.image_format, self.settings.image_format)
        return self.folder / file_name(step, word, index, size, extension)

    def grid(self, step: int, drawn: Sequence[Drawn]) -> Path | None:
        """Write the grid of what has been drawn at a step, beside the steps before it.

        None where nothing was drawn.
        """
        there = [
            each
            for each in drawn_images(self.folder, self.settings.references_at)
            if each.step <= step
        ]
        rows = [self._row(each, there) for each in drawn]
        if not rows:
            return None
        steps = sorted({each.step for each in there})
        return draw_grid(rows, steps, self.folder / grid_name(step))

    def _row(self, drawn: Drawn, there: Sequence[DrawnImage]) -> Row:
        own, base = self._word(drawn.nickname, drawn.label), self._words[drawn.nickname]
        number = f", image {drawn.index + 1}" if self.settings.images_per_prompt > 1 else ""
        size = drawn.image.size
        images = {
            each.step: each
            for each in there
            if (each.index, each.size) == (drawn.index, size)
            # the base model is drawn once, whatever weights are drawn with later
            and each.nickname == (own if each.step > 0 else base)
        }
        return Row(f"{drawn.name}{number}: {drawn.prompt}", size, images)

    def _beside(self, vae: Any, references: Sequence[Image.Image]) -> AbstractContextManager[None]:
        if not references:
            return nullcontext()
        return beside(self._transformer, *reference_tokens(vae, references))

    def _base_of(self, step: int, nickname: str, index: int, size: tuple[int, int]) -> Path | None:
        """The base model's image that an image of this step stands beside; None: there is none."""
        if step == 0 or not self.settings.beside_base:
            return None
        # an earlier version left the spaces of a nickname in
        there = [
            each.path
            for each in drawn_images(self.folder, self.settings.references_at)
            if each.step == 0
            and "-".join(each.nickname.split()) == self._words[nickname]
            and (each.index, each.size) == (index, size)
        ]
        return there[0] if there else None

    def _on_step(self, drawing: Drawing, advance: Callable[[], None]) -> Callable[[Denoised], None]:
        """What is done after each denoising step of an image."""

        def on_step(denoised: Denoised) -> None:
            advance()
            if self.previewer is not None:
                self.previewer.show(drawing, denoised)

        return on_step

    def _image(
        self,
        pipeline: FluxPipeline,
        prompt: str,
        size: tuple[int, int],
        seed: int,
        on_step: Callable[[Denoised], None],
    ) -> Image.Image:
        s = self.settings
        arguments = self._prompt_arguments(prompt)
        if s.guidance_real > 1:
            negative = self._prompt_arguments(s.negative_prompt)
            arguments |= {f"negative_{name}": tensor for name, tensor in negative.items()}
        late = s.guidance_real > 1 and s.no_cfg_steps > 0
        with ExitStack() as stack:
            if late:
                stack.enter_context(guided_after(self._transformer, s.no_cfg_steps))
            if s.masked_text:
                stack.enter_context(cut_at_zeros(self._transformer))
            latents = pipeline(
                **arguments,
                width=size[0],
                height=size[1],
                num_inference_steps=s.steps,
                guidance_scale=s.guidance,
                true_cfg_scale=s.guidance_real,
                # a generator on the CPU draws the same noise for every device
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=on_step_end(on_step),
                callback_on_step_end_tensor_inputs=list(PREVIEWED),
                output_type="latent",
            ).images
        return decoded(pipeline, latents, size)[0]

    def _prompt_arguments(self, prompt: str) -> dict[str, Tensor]:
        """The pipeline's `prompt_embeds` and `pooled_prompt_embeds` of a prompt."""
        embeds = self._embeds(prompt)
        text, pooled = embeds["prompt_embeds"], embeds["pooled_prompt_embeds"]
        if self.settings.masked_text:
            # the pipeline takes two prompts of one length only; `cut_at_zeros` undoes it
            text = text * embeds["attention_mask"][..., None]
        device = self._transformer.device
        return {
            "prompt_embeds": text.to(device, self._dtype),
            "pooled_prompt_embeds": pooled.to(device, self._dtype),
        }

    def _save(
        self,
        image: Image.Image,
        path: Path,
        references: Sequence[Image.Image],
        base: Path | None,
        step: int,
    ) -> None:
        """Write an image beside the base model's, or else beside its references."""
        s = self.settings
        if base is not None:
            # the base's image has the references beside it already
            with Image.open(base) as left:
                image = side_by_side([("base model", left), (f"step {step}", image)])
        elif references:
            image = stitched(image, references, s.references_at)
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {} if s.image_format == "png" else {"quality": s.quality}
        with atomic_file(path) as stream:
            image.save(stream, format=s.image_format.upper(), **options)
