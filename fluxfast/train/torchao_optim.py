"""torchao's optimisers with states in few bits, whose checkpoints are plain tensors.

Their states are tensors of torchao's own classes, which no file holds. Here each is a dict of the
plain tensors that it is made of.
"""

from collections.abc import Mapping
from typing import Any

import torchao.optim
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _plain(value: Any) -> Any:
    """A state's value; of one of torchao's tensors, the tensors that it is made of, by name."""
    if not is_traceable_wrapper_subclass(value):
        return value
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}


class _PlainCheckpoints:
    """An optimiser whose `state_dict` has no tensors of torchao's classes."""

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()  # type: ignore[misc]
        states = {
            index: {name: _plain(value) for name, value in state.items()}
            for index, state in whole["state"].items()
        }
        return {**whole, "state": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})  # type: ignore[misc]
        optimizer: Any = self
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            p, state = flat[int(index)], {}
            for name, value in saved.items():
                if isinstance(value, Mapping):
                    state[name] = optimizer._new_buffer(p, signed=name == "exp_avg")
                    for part, tensor in value.items():
                        getattr(state[name], part).copy_(tensor)
                else:
                    # the number of steps stays on the CPU
                    state[name] = value.clone() if name == "step" else value.to(p, copy=True)
            optimizer.state[p] = state


class AdamW8bit(_PlainCheckpoints, torchao.optim.AdamW8bit):
    """AdamW with 8-bit codes from bitsandbytes' map, and a scale for every 256 of them."""


class AdamW4bit(_PlainCheckpoints, torchao.optim.AdamW4bit):
    """AdamW with 4-bit codes, and a scale for every 128 of them."""


class AdamWFp8(_PlainCheckpoints, torchao.optim.AdamWFp8):
    """AdamW with states in e4m3, and a scale for every 256."""


class AdamFp8(_PlainCheckpoints, torchao.optim.AdamFp8):
    """Adam (whose decay is a part of the gradient) with states in e4m3."""
