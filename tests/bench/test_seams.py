"""The bench uses the engine by its public names, and patches nothing: read from its sources."""

import ast
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "fluxfast_bench"
ENGINE = ("fluxfast", "fluxfast_kernels")
# private by their spelling, but not the engine's: NamedTuple's methods, a storage's address and an
# op's schema in torch, a compiled kernel in Triton
FOREIGN = {"_asdict", "_replace", "_cdata", "_schema", "_init_handles"}
# whatever is reached through these belongs to them
FOREIGN_ROOTS = {"os", "torch"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def root_of(node: ast.expr) -> str | None:
    """The name at the beginning of `name.a[0].b().c`."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return None
    return node.id


def of_engine(module: str) -> bool:
    return module.split(".")[0] in ENGINE


def faults_in(source: str) -> list[str]:
    """Every use of `unittest.mock`, of a private name, and every change of the engine's attributes.

    No reader of sources can tell whose object a variable holds. So a private attribute is a fault
    on everything but `self`, `cls` and the few foreign names above.
    """
    tree, faults, engines = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            engines |= {a.asname or a.name.split(".")[0] for a in node.names if of_engine(a.name)}
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            engines |= {a.asname or a.name for a in node.names if of_engine(str(node.module))}
        else:
            continue
        faults += [name for name in imported if name.startswith("unittest.mock")]
        faults += [
            name for name in imported if of_engine(name) and any(map(is_private, name.split(".")))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = root_of(node.value)
            if isinstance(node.ctx, ast.Store | ast.Del) and root in engines:
                faults.append(f"{ast.unparse(node)} = …")
            mine = isinstance(node.value, ast.Name) and root in ("self", "cls")
            foreign = node.attr in FOREIGN or root in FOREIGN_ROOTS
            if is_private(node.attr) and not mine and not foreign:
                faults.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and root_of(node.func) in ("getattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                faults.append(ast.unparse(node))
            if root_of(node.func) != "getattr" and root_of(node.args[0]) in engines:
                faults.append(ast.unparse(node))
    return faults


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=lambda p: p.stem)
def test_no_private_name_and_no_patch(path):
    assert faults_in(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from unittest import mock", "unittest.mock"),
        ("import unittest.mock as m", "unittest.mock"),
        ("from fluxfast_kernels import _launch", "fluxfast_kernels._launch"),
        ("from fluxfast_kernels._launch import launch", "fluxfast_kernels._launch.launch"),
        ("ring = model.blocks[0].residency._stream", "model.blocks[0].residency._stream"),
        ("made()._hidden", "made()._hidden"),
        ("self.model._hidden", "self.model._hidden"),
        ("getattr(model, '_hidden')", "getattr(model, '_hidden')"),
        (
            "from fluxfast.memory.host import HostMemory as H\nH.allocate = f",
            "H.allocate = …",
        ),
        ("from fluxfast import ops\nsetattr(ops, 'x', 1)", "setattr(ops, 'x', 1)"),
    ],
)
def test_what_is_a_fault(source, fault):
    assert faults_in(source) == [fault]


@pytest.mark.parametrize(
    "source",
    [
        "self._mine = torch._C._thing()",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from fluxfast import __version__",
        "from fluxfast_kernels.gelu import gelu_fwd",
        "timing._replace(op='gelu')",
        "torch.nn.functional.rms_norm = one_kernel",
    ],
)
def test_what_is_none(source):
    assert faults_in(source) == []
