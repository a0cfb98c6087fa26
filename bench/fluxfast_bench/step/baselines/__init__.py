"""The peers, each built from its public package in a small file of its own.

A new one is a file here and a line below.
"""

from fluxfast_bench.step.baselines import bitsandbytes, diffusers_peft, quanto, sdnq, torchao
from fluxfast_bench.step.contestants import Contestant

PEERS: list[Contestant] = [
    *diffusers_peft.CONTESTANTS,
    *quanto.CONTESTANTS,
    *bitsandbytes.CONTESTANTS,
    *sdnq.CONTESTANTS,
    *torchao.CONTESTANTS,
]

__all__ = ["PEERS"]
