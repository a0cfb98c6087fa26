"""y = x Wᵀ over stored rows: every format and dtype, every instruction set, against fp64 products
of what they decode to.
"""

import pytest
import torch

from fluxfast.quant import FORMATS, QuantWeight
from fluxfast.quant.gemv import gemv, gemv_ref
from quant_cases import AWKWARD, gaussian, heavy_tailed
from support import for_thread_counts, relative_error

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# sums of up to 4160 products in fp32, in some order
TOLERANCE = 1e-6


def stored(weight, name):
    if name in FLOATS:
        return weight.to(FLOATS[name])
    return QuantWeight.of(weight, FORMATS[name])


def vectors(batch, cols):
    return torch.randn(batch, cols, generator=torch.Generator().manual_seed(cols))


@pytest.mark.parametrize("name", [*FLOATS, *FORMATS])
@pytest.mark.parametrize("shape", [*AWKWARD, (9, 4160), (500, 96)])
def test_native_equals_fp64(isa, name, shape):
    weight = stored(heavy_tailed(*shape, seed=shape[1]), name)
    for batch in (1, 3):
        x = vectors(batch, shape[1])
        out = torch.full((batch, shape[0]), torch.nan)
        y = gemv(x, weight, out, impl="native")
        assert y is out
        assert relative_error(y, gemv_ref(x.double(), weight)) < TOLERANCE


@pytest.mark.parametrize("name", [*FLOATS, *FORMATS])
def test_threads_and_batch_change_no_bit(name):
    """What a sample gets does not depend on the others, nor on how rows are shared out."""
    weight, x = stored(gaussian(333, 200), name), vectors(4, 200)
    whole = gemv(x, weight)
    assert all(torch.equal(result, whole) for result in for_thread_counts(lambda: gemv(x, weight)))
    assert torch.equal(gemv(x, weight, threads=2), whole)
    assert torch.equal(torch.cat([gemv(row[None], weight) for row in x]), whole)


def test_rows_with_strides_are_read_in_place():
    wide = gaussian(20, 96).bfloat16()
    x = vectors(2, 40)
    assert torch.equal(gemv(x, wide[:, 8:48]), gemv(x, wide[:, 8:48].contiguous()))
    assert torch.equal(gemv(x[:, :20], wide.T), gemv(x[:, :20], wide.T.contiguous()))
    assert torch.equal(
        gemv(torch.stack([x, x], dim=-1)[..., 0], wide[:, :40]), gemv(x, wide[:, :40])
    )


@pytest.mark.parametrize("name", [*FLOATS, *FORMATS])
def test_ref_and_wider_vectors(name):
    weight = stored(gaussian(33, 70), name)
    x = vectors(2, 70)
    exact = gemv_ref(x.double(), weight)
    assert gemv(x.double(), weight).dtype == torch.float64
    assert torch.equal(gemv(x.double(), weight), exact)
    assert relative_error(gemv(x, weight, impl="ref"), exact) < TOLERANCE


def test_an_explicit_choice_never_falls_back():
    weight = gaussian(4, 8)
    with pytest.raises(ValueError, match=r"doesn't read torch\.float64"):
        gemv(vectors(1, 8), weight.double(), impl="native")
    with pytest.raises(ValueError, match=r"a tensor is torch\.float64"):
        gemv(vectors(1, 8).double(), weight, impl="native")
    assert gemv(vectors(1, 8), weight.double()).dtype == torch.float32
