"""What a config's optimiser does to its other options, and what it can't go with."""

from fluxfast.config.derived import DerivedValues


def optimizer_notes(config: DerivedValues) -> list[str]:
    """What the optimiser does by itself, and whose version of it `auto` takes."""
    name, kind, notes = config.optimizer, config.optimizer_kind, []
    if kind.fused is not None and config.optimizer_impl == "auto":
        package = kind.entry_point.partition(".")[0]
        if config.optimizer_version is not None:
            told = f'in one launch ("optimizer_impl": "package" takes {package}\'s)'
            notes.append(
                f'"optimizer" {name} is fluxfast\'s version, which updates all tensors {told}'
            )
        else:
            lacks = sorted((config.optimizer_config or {}).keys() - kind.fused.arguments)
            notes.append(
                f"\"optimizer\" {name} is {package}'s version: fluxfast's takes no "
                f"{', '.join(lacks)}"
            )
    chosen = "learning_rate" in config.model_fields_set
    if kind.finds_rate and chosen and config.learning_rate < 0.1:
        notes.append(
            f'"learning_rate" is {config.learning_rate:g}: {name} finds the rate '
            "itself and multiplies it by this; 1 is usual"
        )
    if kind.clips:
        if "max_grad_norm" in config.model_fields_set:
            notes.append(f'"max_grad_norm" has no effect: {name} bounds its updates itself')
    elif (
        config.max_grad_norm
        and "max_grad_norm" in config.model_fields_set
        and "grad_clip_method" not in config.model_fields_set
    ):
        notes.append(
            f"gradients are clipped to a norm of {config.max_grad_norm:g} "
            '(SimpleTuner clips each value by default: "grad_clip_method": "value" does that)'
        )
    return notes


def optimizer_problems(config: DerivedValues) -> list[str]:
    """What keeps the optimiser from running, or from running as the config asks."""
    name, kind, problems = config.optimizer, config.optimizer_kind, []
    version = None
    try:
        version = config.optimizer_version
    except ValueError as error:
        problems.append(
            f'"optimizer_impl" is {config.optimizer_impl}, but {name} {error}; set it to "auto"'
        )
    if extra := kind.missing_extra(version):
        problems.append(
            f'"optimizer" {name} needs a package that is not installed: '
            f'pip install "fluxfast[{extra}]"'
        )
    for option, value, right in (
        ("mixed_precision", "no", config.weight_dtype_name != "fp32"),
        ("base_model_default_dtype", "fp32", config.base_model_default_dtype != "fp32"),
    ):
        if kind.weights == "bf16" and not right:
            problems.append(
                f'"optimizer" {name} trains bf16 weights, but "{option}" is {value}: '
                f'set "optimizer": "torch-adamw" or "{option}": "bf16"'
            )
            break
    if config.releases_gradients:
        problems += _release_problems(config)
    if (config.optimizer_beta1 is None) != (config.optimizer_beta2 is None):
        problems.append('"optimizer_beta1" and "optimizer_beta2" go together: give both or neither')
    return problems


def _release_problems(config: DerivedValues) -> list[str]:
    """What has to see all gradients before the update, and can't where they are let go."""
    released, problems = '"optimizer_release_gradients" is true', []
    if config.gradient_accumulation_steps > 1:
        problems.append(
            f'{released}: gradients are not accumulated; set "gradient_accumulation_steps" to 1'
        )
    if config.clipped_to:
        problems.append(
            f'{released}: gradients are not clipped; set "max_grad_norm" to 0, or take '
            '"optimizer": "optimi-stableadamw", which bounds its updates itself'
        )
    if config.cuda_graphs is True:
        problems.append(
            f"{released}: weights are updated within backward, which no CUDA graph replays; leave "
            '"cuda_graphs" out'
        )
    return problems
