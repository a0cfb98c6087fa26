"""How the tests call peers: what they compute is the same, without the compilers that some of them
start for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """What optimum-quanto's C++ extension computes: the `8 // bits` codes of each byte, all the
    lowest ones first.
    """
    return torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)])


@contextmanager
def without_compilers() -> Iterator[None]:
    """optimum-quanto unpacks in Python and bitsandbytes quantises eagerly.

    Otherwise the first builds a C++ extension (25 s) and the second compiles its functions (10 s)
    at their first call.
    """
    with torch.compiler.set_stance("force_eager"), _quanto_in_python():
        yield


@contextmanager
def _quanto_in_python() -> Iterator[None]:
    try:
        from optimum.quanto.library.extensions.cpp import ext
    except ImportError:
        yield
        return
    before, ext._lib = ext._lib, SimpleNamespace(unpack=unpack)
    try:
        yield
    finally:
        ext._lib = before
