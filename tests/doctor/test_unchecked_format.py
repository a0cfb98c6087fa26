"""The doctor has nothing to compare a format with that is its own reference, and says so."""

import pytest
from doctor_cases import outcomes, scope

from fluxfast.ops import dispatch
from fluxfast.quant import FORMATS
from toy_format import COLUMNS


@pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built")
def test_what_there_is_to_check(monkeypatch):
    monkeypatch.setitem(FORMATS, "columns", COLUMNS)
    found = outcomes(scope(formats=("columns",), computes=("same", "int8"), modulation_ahead=True))
    own = {name: o for name, o in found.items() if name.startswith("columns:")}
    assert {o.what for o in own.values() if o.what} == {
        f"columns.{task}" for task in ("quantize", "dequantize", "codes")
    }
    for outcome in own.values():
        assert outcome.status == "not checked" and "columns has its reference" in outcome.cause
    ahead = [o for name, o in found.items() if name.startswith("modulation ahead, columns")]
    assert [o.status for o in ahead] == ["not checked"] and "by its reference" in ahead[0].cause
    products = [o for name, o in found.items() if "columns weights" in name and o not in ahead]
    assert products and {o.status for o in products} == {"pass"}
