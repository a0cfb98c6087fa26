"""Every tensor's name and place in the files of other programs, and the sizes that they imply."""

import pytest
import torch
from checkpoint_cases import BFL

from bfl_reference import BflFlux
from fluxfast import FluxTransformer
from fluxfast.checkpoint import keys
from fluxfast.checkpoint.reader import CheckpointError
from support import SMALL


def test_sizes_are_inferred(bfl_file):
    config = FluxTransformer.from_single_file(bfl_file()).config
    expected = SMALL | {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}
    assert {k: config[k] for k in expected} == expected


def test_bfl_map_covers_the_real_model_exactly():
    """Every tensor of FLUX.1-dev has its place, and the packed ones add up to BFL's sizes."""
    with torch.device("meta"):
        ours = {
            k: tuple(v.shape) for k, v in FluxTransformer(guidance_embeds=True).state_dict().items()
        }
        theirs = BflFlux(
            **{
                "in_channels": 64,
                "dim": 3072,
                "n_heads": 24,
                "depth": 19,
                "depth_single": 38,
                "context": 4096,
                "pooled": 768,
            },
            axes=(16, 56, 56),
            guidance=True,
        ).state_dict()
    sources = keys.sources("bfl", ours)
    assert sources.keys() == ours.keys()
    elements = dict.fromkeys(theirs, 0)
    for name, source in sources.items():
        rows = source.rows or (0, theirs[source.key].shape[0])
        assert (rows[1] - rows[0], *theirs[source.key].shape[1:]) == ours[name]
        elements[source.key] += ours[name][0]
    assert elements == {k: v.shape[0] for k, v in theirs.items()}
    shapes = {k: tuple(v.shape) for k, v in theirs.items()}
    assert FluxTransformer.from_config(
        keys.infer_config("bfl", shapes, None) | {"num_layers": 0, "num_single_layers": 0}
    )


def test_head_size_without_flux_proportions(bfl_file):
    state = BflFlux(**BFL | {"n_heads": 4}, axes=(4, 4, 8), guidance=False).state_dict()
    with pytest.raises(CheckpointError, match="axes_dims_rope"):
        FluxTransformer.from_single_file(bfl_file(state))
    assert FluxTransformer.from_single_file(
        bfl_file(state), axes_dims_rope=(4, 4, 8)
    ).config.axes_dims_rope == (4, 4, 8)
