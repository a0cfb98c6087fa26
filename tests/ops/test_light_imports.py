"""What importing the ops costs: neither torch's compiler nor Triton nor diffusers is imported with
them.
"""

import subprocess
import sys

HEAVY = ("torch._dynamo", "triton", "sympy", "diffusers", "transformers", "peft", "scipy")
IMPORT = """
import importlib, pkgutil, sys
import torch
before = set(sys.modules)
import fluxfast, fluxfast.ops
for module in pkgutil.walk_packages(fluxfast.ops.__path__, "fluxfast.ops."):
    importlib.import_module(module.name)
print(*sorted(set(sys.modules) - before))
"""


def test_the_ops_import_nothing_heavy():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    imported = run.stdout.split()
    assert "fluxfast.ops.linear.lora_linear" in imported
    assert [name for name in HEAVY if name in imported] == []
