"""Who may import whom, and what may be imported nowhere: read from the sources."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# left never imports right; one entry may import itself and everything before it
LAYERS: list[set[str]] = [
    {"fluxfast_kernels", "fluxfast._C", "fluxfast.files", "fluxfast.text"},
    {"fluxfast.config"},
    {"fluxfast.ops"},
    {"fluxfast.quant"},
    {"fluxfast.checkpoint"},
    {"fluxfast.adapters"},
    {"fluxfast.model"},
    {"fluxfast.memory"},
    {"fluxfast.doctor"},
    {"fluxfast.dropin"},
    {"fluxfast.data"},
    {"fluxfast.train"},
    {"fluxfast.demo"},
    {"fluxfast.cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# the package itself only hands out what the others make
FACADE = "fluxfast"


def modules(folder: Path, package: str) -> list[tuple[str, Path]]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


MODULES = modules(ROOT / "fluxfast", "fluxfast") + modules(
    ROOT / "kernels/fluxfast_kernels", "fluxfast_kernels"
)
every_module = pytest.mark.parametrize(
    ("module", "path"), MODULES, ids=[name for name, _ in MODULES]
)


def imports_in(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Full names of what a module imports, at its top or inside a function; `from a import b` gives
    a.b.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(
                    [*package[: len(package) - node.level + 1], *([base] if base else [])]
                )
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str) -> str | None:
    """The entry of LAYERS that a full name belongs to; None for the façade and for everybody else's
    packages.
    """
    return next((entry for entry in RANK if name == entry or name.startswith(entry + ".")), None)


def test_layers_are_read_correctly():
    source = (
        "import os\nfrom fluxfast.cli import main\ndef f():\n    from . import plan\n    import "
        "fluxfast.train.loop\n"
        "from ..ops.gelu import gelu\n"
    )
    assert imports_in(ast.parse(source), "fluxfast.memory.stream", False) == {
        *(
            "os",
            "fluxfast.cli.main",
            "fluxfast.memory.plan",
            "fluxfast.train.loop",
            "fluxfast.ops.gelu.gelu",
        )
    }
    assert imports_in(ast.parse("from . import gelu"), "fluxfast.ops", True) == {
        "fluxfast.ops.gelu"
    }
    assert layer_of("fluxfast.ops.gelu.gelu") == "fluxfast.ops"
    assert layer_of("fluxfast_kernels") == "fluxfast_kernels"
    assert layer_of("fluxfast.FluxTransformer") is None


@every_module
def test_left_never_imports_right(module, path):
    own = layer_of(module)
    assert own is not None or module == FACADE, (
        f"{module} is in no layer: name its package in LAYERS"
    )
    imported = imports_in(ast.parse(path.read_text()), module, path.name == "__init__.py")
    ours = {n for n in imported if n.split(".")[0] in ("fluxfast", "fluxfast_kernels")} - {
        "fluxfast.__version__"
    }
    if own is None:
        return
    wrong = {name for name in ours if (layer := layer_of(name)) is None or RANK[layer] > RANK[own]}
    # below the façade nobody needs it, and it would import everybody
    assert not wrong, f"{module} is in '{own}' and imports {sorted(wrong)}"


@every_module
def test_no_pickle(module, path):
    tree = ast.parse(path.read_text())
    imported = {name.split(".")[0] for name in imports_in(tree, module, path.name == "__init__.py")}
    assert not imported & {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
    }
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "torch.load" not in calls
    assert "torch.save" not in calls


@every_module
def test_kernels_stand_alone(module, path):
    if not module.startswith("fluxfast_kernels"):
        return
    roots = {
        name.split(".")[0]
        for name in imports_in(ast.parse(path.read_text()), module, path.name == "__init__.py")
    }
    assert roots <= {"torch", "triton", "fluxfast_kernels", *sys.stdlib_module_names}


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_folders_that_are_no_packages(folder):
    """A package named kernels would shadow the one on PyPI that diffusers looks for."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_native_sources_know_nothing_of_torch():
    sources = [
        p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh", ".hpp"}
    ]
    assert sources
    for path in sources:
        for header in re.findall(r'#\s*include\s*[<"]([^">]+)', path.read_text()):
            assert not re.match(r"(torch|ATen|c10|caffe2)/", header), (
                f"{path.name} includes {header}"
            )


def test_every_native_source_is_built():
    listed = set(re.findall(r"csrc/\S+\.cpp", (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp")}


def test_only_train_and_cli_see_the_config():
    """Everything below takes plain arguments."""
    for module, path in MODULES:
        if layer_of(module) in {"fluxfast.train", "fluxfast.cli"}:
            continue
        imported = imports_in(ast.parse(path.read_text()), module, path.name == "__init__.py")
        assert not {name for name in imported if name.startswith("fluxfast.train")}, module
