"""LyCORIS adapters beside the library's own: a config as a file, and a network of the library's."""

import json

import pytest

from fluxfast.config.lycoris import LycorisConfig, read_lycoris

LEAST = {"algo": "lokr", "multiplier": 1, "linear_dim": 4, "linear_alpha": 2}
# the class that targets are written for, by the name that diffusers has for it
_DIFFUSERS = {"Attention": "FluxAttention"}


@pytest.fixture
def lycoris_config(tmp_path):
    """Reads a lycoris_config: the least that one needs, and these keys."""

    def read(**keys) -> LycorisConfig:
        path = tmp_path / "lycoris_config.json"
        path.write_text(json.dumps({k: v for k, v in (LEAST | keys).items() if v is not None}))
        return read_lycoris(path)

    return read


@pytest.fixture
def library_network(monkeypatch):
    """The library's own network for a config, on a model of diffusers'."""
    wrapper = pytest.importorskip("lycoris.wrapper")
    network = wrapper.LycorisNetwork
    # its presets are kept on the class
    for name in [name for name in vars(network) if name.isupper()]:
        monkeypatch.setattr(network, name, getattr(network, name))

    def make(model, config: LycorisConfig):
        arguments = dict(config.given)
        network.apply_preset(_in_diffusers_words(arguments.pop("apply_preset", {})))
        return wrapper.create_lycoris(
            model,
            arguments.pop("multiplier"),
            arguments.pop("linear_dim", None),
            arguments.pop("linear_alpha"),
            **arguments,
        )

    return make


def _in_diffusers_words(preset: dict) -> dict:
    preset = dict(preset)
    if "target_module" in preset:
        preset["target_module"] = [_DIFFUSERS.get(n, n) for n in preset["target_module"]]
    if "module_algo_map" in preset:
        preset["module_algo_map"] = {
            _DIFFUSERS.get(n, n): entry for n, entry in preset["module_algo_map"].items()
        }
    return preset
