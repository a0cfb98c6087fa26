"""Blocks whose calls run by launch plans, and twins of them that run as they are.

Our kernels run in Triton's interpreter, and get addresses as on a GPU. The first call with a key
runs, the second is recorded, the third compared, and the fourth is the first that is replayed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from block_cases import EVERYTHING
from fluxfast.checkpoint.side_by_side import pack_groups
from fluxfast.model.launch_plans import LaunchPlans
from fluxfast.model.rope import rope_tables
from fluxfast.quant import Format
from fluxfast_kernels import matmul
from fluxfast_kernels.waves import scheduled
from small_flux import small_flux

TINY = {
    "attention_head_dim": 16,
    "num_attention_heads": 1,
    "axes_dims_rope": (4, 6, 6),
    "num_layers": 1,
}
# calls of a key until one is replayed
CALLS = 4
# of products; those that a GPU would take are slow in the interpreter
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 3, "num_warps": 4, "num_stages": 2}


def small_schedule(kind, rows, cols, k, arch, multiprocessors):
    """In the place of `waves.best_schedule`."""
    persistent = kind.endswith("_persistent")
    numbers = {"PERSISTENT": int(persistent), "PROGRAMS": 3, "CUT": int(persistent)}
    return scheduled(kind, rows, cols, k, {**TILE, **numbers})


def decode_by_kernels(monkeypatch):
    """Decode on a CPU as on a GPU, where the native module would; weights are still encoded by it.

    Products of codes take small tiles.
    """
    chosen = Format.implementation

    def implementation(self, task, *args):
        return "triton" if task in ("dequantize", "codes") else chosen(self, task, *args)

    monkeypatch.setattr(Format, "implementation", implementation)
    monkeypatch.setattr(matmul, "best_schedule", small_schedule)


def block_of(model, kind):
    return (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0]


def make_model(plans, storage=None, layers=1, **options):
    """Its blocks run on our kernels, with attention by one of torch's own operations."""
    model = small_flux(storage, EVERYTHING, **TINY | {"num_single_layers": layers})
    pack_groups(model)
    chosen = {"impl": "triton", "attention": "cpu", "launch_plans": plans} | options
    for block in model.blocks:
        for name, value in chosen.items():
            setattr(block, name, value)
    return model


def step(block, seed, *, batch=1, tokens=2, grad=True, index=None, mask=None, between=lambda: None):
    """Outputs and gradients for random inputs and gradients; under no_grad outputs alone.

    between: is called between forward and backward.
    """
    g = torch.Generator().manual_seed(seed)
    img, txt = (torch.randn(batch, n, 16, generator=g) for n in (tokens, 1))
    ids = torch.randint(0, 30, (tokens + 1, 3), generator=g)
    pe = rope_tables(ids, TINY["axes_dims_rope"])
    pe = pe if index is None else (*pe, index)
    mods = [torch.randn(batch, n, generator=g) for n in (96, 96)]
    if hasattr(block, "proj_mlp"):
        img, txt, mods = torch.cat([txt, img], 1), None, [mods[0][:, :48].contiguous()]
    leaves = [x.requires_grad_(grad) for x in (img, txt) if x is not None]
    torch.manual_seed(seed)
    kwargs = None if mask is None else {"attention_mask": mask}
    outs = block(img, txt, tuple(mods), pe, kwargs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if not torch.is_grad_enabled():
        return list(outs)
    between()
    leaves = [x for x in leaves if grad] + [p for p in block.parameters() if p.requires_grad]
    douts = [torch.randn(out.shape, generator=g) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, douts, allow_unused=True)]


def same(actual, expected):
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None) and (a is None or torch.equal(a, e)), i


def replays(
    kind: str,
    storage: str | None = None,
    of: Callable[..., list[Tensor | None]] = step,
    prepare: Callable[[Any], object] = lambda model: None,
    **options: Any,
) -> None:
    """Steps until a plan has taken over, whose results are those of a twin without plans.

    prepare: is given each of both models first.
    """
    plans = LaunchPlans()
    models = [make_model(p, storage, **options) for p in (plans, None)]
    for model in models:
        prepare(model)
    mine, plain = (block_of(model, kind) for model in models)
    for seed in range(CALLS):
        made = of(mine, seed)
    same(made, of(plain, CALLS - 1))
    assert plans.off is None and not plans.reasons and plans.replayed == 2
