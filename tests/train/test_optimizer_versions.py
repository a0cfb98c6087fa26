"""Which options fluxfast has versions of its own for, and which of the two a run takes."""

import inspect
import pkgutil

import pytest
import torch
from torch.nn import Parameter

from fluxfast.config.optimizers import OPTIMIZERS
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.train.optim import build_optimizer

FUSED = [name for name, kind in OPTIMIZERS.items() if kind.fused]


def test_what_has_a_version_of_ours():
    kinds = ("adamw", "adam", "lion")
    assert sorted(FUSED) == sorted(f"bnb-{kind}{bits}" for kind in kinds for bits in ("", "8bit"))


@pytest.mark.parametrize("name", FUSED)
def test_our_class_takes_what_its_record_says(name):
    fused = OPTIMIZERS[name].fused
    cls = pkgutil.resolve_name(fused.entry_point)
    assert {*inspect.signature(cls).parameters} - {"params", "lr"} == fused.arguments
    assert cls.op == fused.kernel
    assert OPTIMIZERS[name].defaults.keys() <= fused.arguments


@pytest.mark.parametrize(
    ("version", "arguments", "module"),
    [
        ("auto", {}, "fluxfast.train.blockwise_optim"),
        ("fluxfast", {"min_8bit_size": 64}, "fluxfast.train.blockwise_optim"),
        ("package", {}, "bitsandbytes.optim.adamw"),
        # what ours lacks
        ("auto", {"is_paged": False}, "bitsandbytes.optim.adamw"),
    ],
)
def test_the_version_that_is_built(version, arguments, module):
    p = Parameter(torch.ones(2))
    optimizer = build_optimizer("bnb-adamw8bit", [p], lr=1, version=version, **arguments)
    assert type(optimizer).__module__ == module
    assert optimizer.defaults["eps"] == 1e-6


def test_a_version_that_there_is_not_is_refused(write_config):
    for settings, said in (
        ({"optimizer_impl": "package"}, "package, but adamw_bf16 is fluxfast's own"),
        (
            {"optimizer": "bnb-lion8bit-paged", "optimizer_impl": "fluxfast"},
            "fluxfast, but bnb-lion8bit-paged has no version of fluxfast's",
        ),
        (
            {
                "optimizer": "bnb-lion8bit",
                "optimizer_impl": "fluxfast",
                "optimizer_config": "is_paged=true",
            },
            "takes no is_paged in fluxfast's version",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(write_config(**settings))


def test_auto_says_what_it_chose(write_config):
    def notes(**settings):
        return " ".join(load_config(write_config(**settings)).notes)

    assert "bnb-lion8bit is fluxfast's version" in notes(optimizer="bnb-lion8bit")
    told = notes(optimizer="bnb-lion8bit", optimizer_config="is_paged=false")
    assert "bnb-lion8bit is bitsandbytes's version: fluxfast's takes no is_paged" in told
    assert "version" not in notes(optimizer="bnb-lion8bit", optimizer_impl="package")
    assert "version" not in notes(optimizer="bnb-lion8bit-paged")


def test_a_run_goes_on_with_the_other_version(run):
    settings = {"optimizer": "bnb-adamw8bit", "optimizer_config": "min_8bit_size=64"}
    run(**settings, optimizer_impl="package", max_train_steps=2)
    _, out = run(**settings, optimizer_impl="fluxfast", max_train_steps=3)
    told = " ".join(out.getvalue().split())
    assert "resumed from" in told and '"optimizer_impl" was "package" and is "fluxfast"' in told
