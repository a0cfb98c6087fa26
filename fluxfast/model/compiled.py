"""torch.compile on a transformer: on the regions around its blocks, and on blocks where asked.

A fused block is one node whose kernels no compiler can join, so what there is to gain is around the
blocks: many small operations on the embeddings, the modulation, the last layer and the loss. Each
of these is a function that `CompiledRegions` compiles when it is first called. Where blocks are
compiled as well, they run op by op through the registered ops (`fluxfast.ops.registration`), and
one graph serves all blocks of a kind.

Graphs take any number of tokens. A graph is made again where something else changes: the batch's
size (once, and from then on it may be any), whether gradients are wanted, a text mask.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# graphs of one function, beyond which PyTorch would run it uncompiled: here that is an error
MOST_GRAPHS = 64
# Modes in which Inductor records each region as a CUDA graph of its own. Where no gradient is
# wanted of a region, the next one may overwrite what it gave.
GRAPH_MODES = ("reduce-overhead", "max-autotune")
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class Compile(NamedTuple):
    """How torch.compile is asked for.

    backend: one of PyTorch's, such as "inductor". mode: Inductor's; "": its default. fullgraph:
    whether code that can't be compiled as a whole is an error. dynamic: whether all sizes may
    change from the first graph on, not only token counts. blocks: whether blocks are compiled too.
    """

    backend: str = "inductor"
    mode: str = ""
    fullgraph: bool = False
    dynamic: bool = False
    blocks: bool = False

    @property
    def has_graphs(self) -> bool:
        """Whether Inductor records CUDA graphs of its own, on a GPU."""
        return self.mode in GRAPH_MODES


def missing(how: Compile, device_type: str) -> str | None:
    """What this machine lacks to compile for a type of device; None where it lacks nothing."""
    if how.backend != "inductor":
        return None
    if device_type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else "Inductor makes Triton kernels, and Triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is not None:
        return None
    return f"Inductor needs a C++ compiler, and there is no {compiler} (the variable CXX names one)"


def cache_in(folder: Path) -> Path:
    """Have Inductor keep what it compiles in a folder, for the next run; returns where it does.

    CACHE_VARIABLE, where the user has set it, names another one.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # PyTorch sets the variable itself, to its default, where an import has asked for the folder
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(folder.absolute())
    return Path(os.environ[CACHE_VARIABLE])


class CompiledRegions:
    """Calls functions of tensors and modules compiled, each compiled when it is first called."""

    def __init__(self, how: Compile) -> None:
        self.how = how
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, region: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `region` returns; tensors [B, S, ...] of it may have any S.

        Raises where it has to be compiled more than MOST_GRAPHS times.
        """
        compiled = self._compiled.get(region)
        if compiled is None:
            compiled = self._compiled[region] = self._compile(region)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.ndim >= 3:
                any_length(tensor)
        return compiled(*args, **kwargs)

    def call_block(
        self,
        block: Any,
        img: Tensor,
        txt: Tensor | None,
        mod: Any,
        tables: Sequence[Tensor],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What a block returns, compiled; arguments are the block's own.

        Raises ValueError for a block that is streamed: a graph would hold weights that move.
        """
        if block.residency is not None:
            raise ValueError("torch.compile: a streamed block can't be compiled; compile no blocks")
        for table in tables[:2]:
            any_length(table, dim=0)
        for rows in tables[2:]:
            any_length(rows)
        if (mask := kwargs.get("attention_mask")) is not None:
            any_length(mask, dim=mask.ndim - 1)
        return self(_call, block, img, txt, mod, tables, kwargs)

    def _compile(self, region: Callable[..., Any]) -> Callable[..., Any]:
        # imported by torch.compile in any case, and by nobody else
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
        dynamo.fail_on_recompile_limit_hit = True
        how = self.how
        return torch.compile(
            region,
            backend=how.backend,
            mode=how.mode or None,
            fullgraph=how.fullgraph,
            dynamic=True if how.dynamic else None,
        )


def _call(block: Any, *args: Any) -> Any:
    """A block's call, as a function of the block, so that one graph serves all blocks of a kind."""
    return block(*args)


def any_length(tensor: Tensor, dim: int = 1) -> None:
    """Tell torch.compile that the size of a dimension may change; 1 has a graph of its own."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)
