"""Storage formats for frozen weights, and linears that keep theirs in one."""

from fluxfast.quant.format import Format
from fluxfast.quant.formats import FORMATS
from fluxfast.quant.weight import QuantWeight

__all__ = ["FORMATS", "Format", "QuantWeight"]
