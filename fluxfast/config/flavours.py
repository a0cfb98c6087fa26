"""The flavours of FLUX.1: everything in which one is unlike another, a record for each.

A new flavour is a record here. Config, plan and trainer read it as `TrainConfig.flavour`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# features of an image token: the 16 latent channels of 2 x 2 pixels
IN_CHANNELS = 64


class License(NamedTuple):
    """A licence in the words of the Hub's model cards: its id, and name and text where it has none.

    What is trained on a model may be published under the model's licence.
    """

    id: str
    name: str = ""
    link: str = ""


DEV_LICENSE = License(
    "other",
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)


@dataclass(frozen=True)
class Flavour:
    """What holds for every run on one set of FLUX.1's weights.

    Attributes:
        repository: the pipeline on the Hub that is loaded where the config names none.
        takes_guidance: whether the transformer has a guidance embedder (it is guidance-distilled).
        text_tokens: T5 tokens of a caption; no other number is trained.
        in_channels: features of an image token as the transformer takes it, with those of its
            conditioning, if it has any.
        takes_references: whether it sees images beside the one that it draws, and needs them.
        few_steps: whether it draws in a few large steps, so that it is trained on
            `flux_fast_schedule` unless the user insists on another schedule.
        forced: values that take the place of the config's own, by option: the schedule's shift, for
            one, or a mask on attention.
        forced_because: why, for the note that a run prints.
        assistant_lora: a frozen LoRA that training has beside its own (file or Hub repository).
        guidance_real: classifier-free guidance at validation where the config asks for none.
        least_validation_steps: validation never takes fewer denoising steps.
        good_validation_steps: (fewest, most) denoising steps that draw well; None: any number.
        advice: what the note about another number of steps says of the flavour.
        notes: what a run always prints.
        architecture: the base model's name in the metadata of a saved LoRA (ModelSpec's
            `modelspec.architecture`, without "/lora").
        license: the weights', which a published LoRA names as its own.
    """

    repository: str
    architecture: str
    takes_guidance: bool = True
    text_tokens: int = 512
    in_channels: int = IN_CHANNELS
    takes_references: bool = False
    few_steps: bool = False
    forced: Mapping[str, Any] = field(default_factory=dict)
    forced_because: str = ""
    assistant_lora: str | None = None
    guidance_real: float | None = None
    least_validation_steps: int = 1
    good_validation_steps: tuple[int, int] | None = None
    advice: str = ""
    notes: tuple[str, ...] = ()
    license: License = DEV_LICENSE

    def draws_well_in(self, steps: int) -> bool:
        """Whether so many denoising steps suit it."""
        if self.good_validation_steps is None:
            return True
        fewest, most = self.good_validation_steps
        return fewest <= steps <= most


FLAVOURS = {
    "krea": Flavour("black-forest-labs/FLUX.1-Krea-dev", architecture="flux-krea"),
    "dev": Flavour(
        "black-forest-labs/FLUX.1-dev",
        architecture="flux-dev",
        good_validation_steps=(15, 28),
        advice="FLUX.1-dev is at its best with 15 to 28",
    ),
    "schnell": Flavour(
        "black-forest-labs/FLUX.1-schnell",
        architecture="flux-schnell",
        takes_guidance=False,
        text_tokens=256,
        few_steps=True,
        good_validation_steps=(1, 4),
        advice="FLUX.1-schnell needs no more than 4",
        assistant_lora="ostris/FLUX.1-schnell-training-adapter",
        license=License("apache-2.0"),
    ),
    "kontext": Flavour(
        "black-forest-labs/FLUX.1-Kontext-dev",
        architecture="flux-kontext",
        takes_references=True,
    ),
    "fluxbooru": Flavour(
        "terminusresearch/fluxbooru-v0.3",
        architecture="flux-fluxbooru",
        forced={
            "flux_guidance_value": 3.5,
            "validation_guidance_real": 6.0,
            "flux_attention_masked_training": False,
        },
        forced_because="fluxbooru is de-distilled",
        least_validation_steps=28,
    ),
    "libreflux": Flavour(
        "jimmycarter/LibreFlux-SimpleTuner",
        architecture="flux-libreflux",
        takes_guidance=False,
        forced={"flux_attention_masked_training": True},
        forced_because="LibreFlux was trained without T5's padding and is de-distilled",
        guidance_real=6.0,
        least_validation_steps=28,
        license=License("apache-2.0"),
        notes=(
            "no token attends to T5's padding (SimpleTuner adds 1 to the scores of the other "
            "tokens instead, which only favours them)",
        ),
    ),
}
