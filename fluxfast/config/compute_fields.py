"""The options of attention and of torch.compile, under SimpleTuner's names.

They are fields of the run's config like all others (`run_fields`).
"""

from typing import Annotated, Literal

from fluxfast.config.attention import runnable
from fluxfast.config.option import option
from fluxfast.config.settings import Settings, named_in

# switches that these options are only read with
SAGE = "attention_mechanism=sageattention*"
_COMPILES = "dynamo_backend or validation_torch_compile"
_INDUCTOR = "dynamo_backend=inductor or validation_torch_compile"


class ComputeFields(Settings):
    """What a config file can say of attention and of torch.compile."""

    attention_mechanism: Annotated[str, named_in(runnable)] = "diffusers"
    """Implementation of attention; diffusers is the fastest of PyTorch's own."""
    sageattention_usage: Literal["inference", "training", "training+inference"] = option(
        "inference", only_with=SAGE, on_resume="ignored"
    )
    """When SageAttention runs: inference, while validation images are drawn, is what there is."""
    dynamo_backend: Literal["no", "inductor", "eager", "aot_eager"] = "no"
    """Compile what is around the blocks with torch.compile; eager and aot_eager are for finding
    errors."""
    dynamo_mode: Literal[
        "", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = option("", only_with=_INDUCTOR)
    """Inductor's mode; on a GPU, cuda_graphs takes reduce-overhead's and max-autotune's place."""
    dynamo_fullgraph: bool = option(False, only_with=_COMPILES, on_resume="ignored")
    """Make code that can't be compiled as a whole an error."""
    dynamo_dynamic: bool = option(False, only_with=_COMPILES, on_resume="ignored")
    """Compile for any size at once; token counts may change in any case."""
    dynamo_use_regional_compilation: bool = option(False, only_with=_COMPILES)
    """Compile the blocks too, one graph for each kind, in place of running them fused."""
    validation_torch_compile: bool = option(
        False, only_with="validation_disable=false", on_resume="ignored"
    )
    """Compile the transformer that draws validation images."""
