"""The storage formats that there are. A new one is a file beside this one and a line below."""

from fluxfast.quant.format import Format
from fluxfast.quant.fp8_e4m3 import FP8_E4M3
from fluxfast.quant.int2 import INT2
from fluxfast.quant.int4 import INT4
from fluxfast.quant.int8 import INT8
from fluxfast.quant.nf4 import NF4

FORMATS: dict[str, Format] = {format.name: format for format in (INT8, INT4, NF4, INT2, FP8_E4M3)}
