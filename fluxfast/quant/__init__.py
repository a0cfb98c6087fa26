"""Storage formats for frozen weights, and linears that keep theirs in one.

A new format is a file here and a line below (`format.Format`).
"""

from fluxfast.quant.format import Format
from fluxfast.quant.fp8_e4m3 import FP8_E4M3
from fluxfast.quant.int2 import INT2
from fluxfast.quant.int4 import INT4
from fluxfast.quant.int8 import INT8
from fluxfast.quant.nf4 import NF4
from fluxfast.quant.weight import QuantWeight

FORMATS: dict[str, Format] = {format.name: format for format in (INT8, INT4, NF4, INT2, FP8_E4M3)}

__all__ = ["FORMATS", "Format", "QuantWeight"]
