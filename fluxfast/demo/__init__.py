"""The demo: a toy world of illustrated scenes, a base that has learnt it, and what to teach it."""

from importlib import resources
from pathlib import Path

# the toy base: a pipeline's folder, as diffusers has it (tools/train_toy_base.py made it)
BASE = Path(str(resources.files(__name__))) / "base"
