"""CLIP's score: how well drawn images fit their prompts.

It is 100 times the cosine of CLIP's embeddings of image and prompt, at least 0 (CLIPScore, arXiv
2104.08718, without its factor).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from fluxfast.config.settings import shown


class ClipScore:
    """Scores images by a CLIP model, which is in memory only while it does."""

    def __init__(self, model: str, device: torch.device) -> None:
        """model: a folder or a repository of the Hub."""
        self._path, self._device = model, device

    def check(self) -> None:
        """Raise ValueError where there is no CLIP model; nothing but its config is read."""
        try:
            found = CLIPConfig.get_config_dict(self._path)[0].get("model_type")
        except OSError as error:
            raise ValueError(
                f'"pretrained_evaluation_model_name_or_path" {self._path}: no such folder, and no '
                f"repository that can be read ({error})"
            ) from error
        if found != "clip":
            raise ValueError(
                f'"pretrained_evaluation_model_name_or_path" {self._path}: holds '
                f"{shown(found)}, expected a CLIP model such as openai/clip-vit-large-patch14"
            )

    @torch.no_grad()
    def run(self, drawn: Sequence[tuple[str, Image.Image, str]]) -> dict[str, float]:
        """`clip/mean`, `clip/min`, `clip/max` and `clip/std` of (label, image, prompt).

        Images with a label have metrics of their own: `clip/<label>/mean` and so on.
        """
        model = CLIPModel.from_pretrained(self._path, use_safetensors=True).to(self._device).eval()
        processor = CLIPProcessor.from_pretrained(self._path)
        by_label: dict[str, list[float]] = {}
        for label, image, prompt in drawn:
            by_label.setdefault(label, []).append(self._score(model, processor, image, prompt))
        metrics = {}
        for label, scores in by_label.items():
            start = f"clip/{label}/" if label else "clip/"
            found = torch.tensor(scores, dtype=torch.float64)
            metrics[f"{start}mean"] = float(found.mean())
            metrics[f"{start}min"], metrics[f"{start}max"] = float(found.min()), float(found.max())
            metrics[f"{start}std"] = float(found.std(correction=0))
        return metrics

    def _score(
        self, model: CLIPModel, processor: CLIPProcessor, image: Image.Image, prompt: str
    ) -> float:
        # CLIP reads 77 tokens
        inputs = processor(
            text=[prompt], images=image, return_tensors="pt", padding=True, truncation=True
        ).to(self._device)
        output = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return 100 * max(0.0, float(cosine))
