"""The options of a run's evaluation: the loss on held-out images, CLIP's score of drawn ones, and
what follows from them.

They are fields of the run's config like all others (`run_fields`).
"""

from typing import Literal

from fluxfast.config.option import option
from fluxfast.config.settings import Settings
from fluxfast.config.validation_fields import VALIDATION


class EvaluationFields(Settings):
    """What a config file can say of evaluation.

    The evaluation loss is computed where the dataloader's config has datasets of `dataset_type`
    eval; without one, the options that begin with eval_ have no effect.
    """

    eval_loss_disable: bool = option(False, on_resume="ignored")
    """Compute no evaluation loss, even where datasets are held out."""
    eval_steps_interval: int | None = option(None, ge=0, on_resume="ignored")
    """Optimiser steps between evaluations (with no eval interval: checkpoint_step_interval)."""
    eval_epoch_interval: int | None = option(None, ge=0, on_resume="ignored")
    """Epochs between evaluations."""
    eval_timesteps: int = option(28, ge=1, on_resume="ignored")
    """Noise levels that each held-out image's loss is computed at."""
    num_eval_images: int = option(4, ge=1, on_resume="ignored")
    """Images of each held-out dataset, and samples whose references Kontext's validation has."""
    eval_dataset_pooling: bool = option(False, on_resume="ignored")
    """Report one loss over all held-out datasets in place of one each."""
    evaluation_type: Literal["none", "clip"] = option(
        "none", only_with=VALIDATION, on_resume="ignored"
    )
    """clip: how well validation images fit their prompts."""
    pretrained_evaluation_model_name_or_path: str = option(
        "openai/clip-vit-large-patch14-336",
        only_with=(VALIDATION, "evaluation_type"),
        on_resume="ignored",
    )
    """Folder or repository of the CLIP model of evaluation_type clip."""
    checkpoints_keep_best: int = option(0, ge=0, on_resume="ignored", ours=True)
    """Checkpoints of the lowest evaluation losses to keep, beside the newest ones."""
    early_stopping_patience: int | None = option(None, ge=1, on_resume="ignored", ours=True)
    """End the run after so many evaluations without a lower loss (unset: never)."""
