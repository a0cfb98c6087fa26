"""Where the Triton kernels run: on the GPU if there is one, else in Triton's interpreter; what
tests may not leave behind.

pytest runs a worker on each core (pyproject.toml). A worker, and the processes that its tests
start, compute with their share of the cores: threads of OpenMP that outnumber the cores wait for
each other instead of working.
"""

import os
import sys

import pytest
import torch

if torch.cuda.is_available():
    # for tests of the same bits: cuBLAS reads it once, at whatever product comes first
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # before anything imports triton, which reads it once
    os.environ["TRITON_INTERPRET"] = "1"

from fluxfast.ops import dispatch
from peers import without_compilers

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    # for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

ISAS = dispatch.native.cpu_isas() if dispatch.HAS_NATIVE else []


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that the native module can use here; pytest skips what asks for one
    where there is none.
    """
    dispatch.native.use_cpu_isa(request.param)
    yield request.param
    dispatch.native.use_cpu_isa(ISAS[-1])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What runs find out about this machine stays among the tests."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def assumed_rates(monkeypatch, tmp_path):
    """No GPU's rates are measured, whatever the package has stored."""
    from fluxfast.memory import rates

    monkeypatch.setattr(rates, "STORED", tmp_path / "no-rates.json")
    rates.rates_of.cache_clear()
    yield
    rates.rates_of.cache_clear()


@pytest.fixture(autouse=True)
def own_attention_backend():
    """diffusers' `set_attention_backend` chooses for the whole process, and another back end gives
    other bits.
    """
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        # diffusers 0.36 has no method for it
        native = dispatch.AttentionBackendName.NATIVE
        dispatch._AttentionBackendRegistry._active_backend = native


@pytest.fixture
def one_thread():
    """Tensors of a few KB, where threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def eager_peers():
    """optimum-quanto and bitsandbytes compute what they do anyway, without starting a compiler for
    it.
    """
    with without_compilers():
        yield
