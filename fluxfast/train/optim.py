"""Building a run's optimiser, its state in checkpoints, and gradient clipping."""

import inspect
import logging
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fluxfast.config.optimizers import OPTIMIZERS, OptimizerImpl, optimizer_options

logger = logging.getLogger("fluxfast")

# Elements whose squares one sum takes. torch's norm on a CPU adds fp32 numbers up in a row: of 65
# million elements at once, it is 0.5 % too small.
_NORM_ELEMENTS = 1 << 20


def build_optimizer(
    name: str,
    params: Mapping[str, Parameter] | Iterable[Parameter],
    *,
    lr: float,
    seed: int = 0,
    version: OptimizerImpl = "auto",
    **arguments: Any,
) -> Optimizer:
    """The optimiser of that name in `config.optimizers`, in our version or its package's.

    `arguments` take the place of its record's defaults. `seed` is for those that round at random.
    Of parameters given by name, those whose names contain bias, norm or embed aren't decayed.

    Raises:
        ValueError: there is no record of that name, there is no such version, or its class has no
            such argument.
    """
    if name not in OPTIMIZERS:
        known = ", ".join(optimizer_options())
        raise ValueError(f"optimizer {name!r} isn't implemented: choose one of {known}")
    kind = OPTIMIZERS[name]
    check_arguments(name, arguments, version)
    fused = kind.version(version, arguments)
    arguments = {**kind.defaults, **arguments, **({"seed": seed} if kind.takes_seed else {})}
    named = params if isinstance(params, Mapping) else {str(i): p for i, p in enumerate(params)}
    groups = _decay_groups(named, arguments.get("weight_decay", 0.0))
    if kind.sorts_matrices:
        groups = [part | {"lr": lr} for group in groups for part in _by_matrices(group)]
    entry_point = kind.entry_point
    if fused is not None:
        entry_point = fused.entry_point
    elif groups[0]["params"][0].device.type == "cpu":
        arguments |= kind.on_cpu
        if kind.cpu_entry_point is not None:
            entry_point = kind.cpu_entry_point
            logger.info("%s: its state has no pages on a CPU", name)
    optimizer: Any = pkgutil.resolve_name(entry_point)(groups, lr=lr, **arguments)
    # what schedules begin with
    optimizer.defaults.setdefault("lr", lr)
    if kind.averages:
        optimizer.train()
    return optimizer


def check_arguments(
    name: str, arguments: Mapping[str, Any], version: OptimizerImpl = "auto"
) -> None:
    """Raise ValueError naming those of the arguments that the optimiser's class does not have."""
    kind = OPTIMIZERS[name]
    fused = kind.version(version, arguments)
    known = fused.arguments if fused else _parameters(pkgutil.resolve_name(kind.entry_point))
    if unknown := sorted(arguments.keys() - known):
        raise ValueError(
            f"optimizer {name!r} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )


def _parameters(cls: type[Optimizer]) -> set[str]:
    """The names of a class's own keyword arguments: not those that a run sets itself."""
    return {*inspect.signature(cls).parameters} - {"params", "lr", "seed", "kwargs"}


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """The weights to keep and to draw with, where they are not those that are being trained.

    A schedule-free optimiser trains at one point and keeps an average; the others have one only.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in params]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        # going to the average and back rounds, and a resumed run has not been there
        with torch.no_grad():
            torch._foreach_copy_(params, trained)


def _decay_groups(params: Mapping[str, Parameter], weight_decay: float) -> list[dict[str, Any]]:
    plain = [
        p for name, p in params.items() if any(part in name for part in ("bias", "norm", "embed"))
    ]
    decayed = [p for p in params.values() if not any(p is other for other in plain)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _by_matrices(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The matrices of a group of parameters, and the rest of it, each of which says what it is."""
    parts = [
        {**group, "params": [p for p in group["params"] if (p.ndim == 2) is matrices]}
        | {"use_muon": matrices}
        for matrices in (True, False)
    ]
    return [part for part in parts if part["params"]]


def load_moments(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Take each parameter's state (moments and step count) from a saved `state_dict()`.

    What the optimiser counts for a group as a whole comes with it. Learning rate, betas, epsilon
    and weight decay stay the optimiser's own. ValueError where `saved` has other numbers of
    parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    counts = [[len(group["params"]) for group in groups] for groups in (own, saved["param_groups"])]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the saved optimiser has groups of {counts[1]} parameters, this one of {counts[0]}"
        )
    told = _parameters(type(optimizer)) | {"params", "lr", "initial_lr", "seed", "use_muon"}
    for group, before in zip(own, saved["param_groups"], strict=True):
        # some classes keep the betas a second time, one by one
        counted = {k for k in before if k not in told and not k.startswith("beta")}
        group.update({name: before[name] for name in counted})
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
    # torch casts a state to its parameter's type
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    for index, kept in saved["state"].items():
        state = optimizer.state[flat[int(index)]]
        for name, value in kept.items():
            if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
                state[name] = state[name].to(value.dtype)


def clip_gradients(
    gradients: Sequence[Tensor], method: Literal["value", "norm"], max_norm: float
) -> Tensor:
    """Clip in place; returns the gradients' total L2 norm before that.

    They may be in any number of tensors. The norm is an fp32 scalar on their device, which nobody
    waits for. `norm` scales all gradients so that the total is at most `max_norm`, as
    `torch.nn.utils.clip_grad_norm_` does; `value` clamps every element to ± `max_norm`. 0 clips
    nothing.
    """
    if method not in ("value", "norm"):
        raise ValueError(f"unknown grad_clip_method {method!r}: choose value or norm")
    if not gradients:
        return torch.zeros(())
    # squares of bf16 gradients are added up in fp32
    parts = [part for each in gradients for part in each.flatten().split(_NORM_ELEMENTS)]
    total = torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32))
    )
    if max_norm > 0 and method == "norm":
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(gradients), factor)
    elif max_norm > 0:
        for each in gradients:
            each.clamp_(-max_norm, max_norm)
    return total
