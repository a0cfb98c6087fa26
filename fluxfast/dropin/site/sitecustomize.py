"""Python imports this when it starts, where this folder is in PYTHONPATH.

With FLUXFAST_DROPIN=1 it has FLUX.1's transformers accelerated (`fluxfast.dropin.startup`). A
`sitecustomize` that it hides is imported after it.
"""

import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if os.environ.get("FLUXFAST_DROPIN", "0") not in ("", "0"):
    try:
        from fluxfast.dropin.startup import install
    # a Python of another environment is none of ours
    except ImportError:
        pass
    else:
        install()

_own, _path = sys.modules.pop("sitecustomize", None), list(sys.path)
sys.path[:] = [each for each in sys.path if not each or Path(each).resolve() != HERE]
try:
    importlib.import_module("sitecustomize")
except ImportError:
    if _own is not None:
        sys.modules["sitecustomize"] = _own
finally:
    sys.path[:] = _path
