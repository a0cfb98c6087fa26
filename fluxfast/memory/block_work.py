"""What a block launches, multiplies and moves in each direction, counted.

As its memory is (`block_memory`), it is found by running the block on meta tensors, as on a
GPU of the architecture in question. So the products are those that the block asks for, with the
sizes that linears side by side have, and a change to a block changes its predicted time. It takes
about 100 ms, and blocks that are alike are counted once.

Where Triton is installed our kernels are heard of launch by launch. Elsewhere our ops are counted
call by call, which comes to nearly the same.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache

from fluxfast.memory.block_memory import BlockWorkload, MetaBlock, block_workload
from fluxfast.memory.launched import Launched, Product, Watching
from fluxfast.memory.sizes import Workload
from fluxfast.ops import dispatch, registration


@dataclass
class Work:
    """What a block does in one direction.

    Attributes:
        launches: of kernels.
        moved: bytes of everything that waits for memory.
        thin: (bytes, FLOPs) of each of the adapters' thin products.
        products: (a wide product, its bytes), and how often it comes.
        attention: FLOPs of attention's forward.
        attention_backward: FLOPs of its forward, for each time that its backward runs.
    """

    launches: int = 0
    moved: int = 0
    thin: list[tuple[int, int]] = field(default_factory=list)
    products: Counter[tuple[Product, int]] = field(default_factory=Counter)
    attention: int = 0
    attention_backward: int = 0

    def add(self, found: Launched) -> None:
        self.launches += found.launches
        if found.product is not None:
            self.products[found.product, found.nbytes] += 1
        elif found.category == "attention":
            if found.op.endswith("_backward"):
                self.attention_backward += found.flops
            else:
                self.attention += found.flops
        elif found.flops:
            self.thin.append((found.nbytes, found.flops))
        else:
            self.moved += found.nbytes


@lru_cache(maxsize=4096)
def block_work(
    workload: Workload, index: int, recompute: str, arch: str, transposed_codes: bool = False
) -> tuple[Work, Work]:
    """Forward and backward of the block `index` of a workload, recomputed as `recompute` says.

    arch: the GPU's, as the kernels' launch tables have it ("sm_90"). transposed_codes: whether the
    base's codes have a transposed copy.
    """
    block = block_workload(workload, index, recompute, transposed_codes=transposed_codes)
    return _count(block, arch)


@lru_cache(maxsize=1024)
def _count(block: BlockWorkload, arch: str) -> tuple[Work, Work]:
    ran, first, forward, backward = MetaBlock(block), Work(), Work(), Work()
    works = [first]
    watching = Watching(lambda found: works[-1].add(found), block.batch)
    with ExitStack() as entered:
        if dispatch.HAS_TRITON:
            from fluxfast_kernels import matmul

            entered.enter_context(matmul.listening(watching.on_product))
        else:
            entered.enter_context(registration.listening(watching.on_op))
        on_launch = watching.on_launch if dispatch.HAS_TRITON else None
        entered.enter_context(ran.on_gpu(arch, on_launch))
        ran.warm_up()
        works.append(forward)
        entered.enter_context(watching)
        loss = ran.loss(ran(ran.streams()))
        works.append(backward)
        # with a gradient at hand, so that autograd makes none
        loss.backward(loss.detach())
    return forward, backward
