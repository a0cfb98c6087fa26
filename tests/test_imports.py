"""Who may import whom, and what may be imported nowhere: read from the sources."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# left never imports right; one entry may import itself and everything before it
LAYERS: list[set[str]] = [
    {
        *("fluxfast_kernels", "fluxfast._C", "fluxfast.files", "fluxfast.hooks"),
        *("fluxfast.progress", "fluxfast.text", "fluxfast.threads"),
    },
    {"fluxfast.config"},
    {"fluxfast.ops"},
    {"fluxfast.quant"},
    {"fluxfast.checkpoint"},
    {"fluxfast.adapters"},
    {"fluxfast.foreign"},
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
BENCH = modules(ROOT / "bench/fluxfast_bench", "fluxfast_bench")
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


def import_graph(found: list[tuple[str, Path]]) -> dict[str, set[str]]:
    """By module, the modules among these that it imports, wherever in its text it does so.

    The façade is left out: it imports everybody, inside a function, and nobody imports it but for
    its version and the compiled module.
    """
    names = {name for name, _ in found} - {FACADE}

    def module_of(imported: str) -> str:
        while imported and imported not in names:
            imported = imported.rpartition(".")[0]
        return imported

    graph = {}
    for name, path in found:
        tree = ast.parse(path.read_text())
        imported = imports_in(tree, name, path.name == "__init__.py")
        graph[name] = {module_of(each) for each in imported} - {"", name}
    return {name: graph[name] for name in names}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every module's shortest way back to itself, if there is one; each circle once."""
    found = {}
    for start in sorted(graph):
        ways = [[start]]
        seen: set[str] = set()
        while ways:
            way = ways.pop(0)
            if start in graph[way[-1]]:
                found.setdefault(frozenset(way), [*way, start])
                break
            nexts = sorted(graph[way[-1]] - seen)
            seen.update(nexts)
            ways += [[*way, module] for module in nexts]
    return list(found.values())


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


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"d2"}, "d2": {"d"}, "e": {"a"}}
    assert circles(graph) == [["a", "b", "c", "a"], ["d", "d2", "d"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_graph_sees_every_import(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.b import thing\n"
    )
    (tmp_path / "b.py").write_text("def f():\n    from pack import c\n")
    (tmp_path / "c.py").write_text("import pack.a\n")
    graph = import_graph(modules(tmp_path, "pack"))
    assert circles(graph) == [["pack.a", "pack.b", "pack.c", "pack.a"]]


def test_no_circle_of_imports():
    """Not even through an import inside a function or one for a type checker alone."""
    found = circles(import_graph([*MODULES, *BENCH]))
    assert not found, "\n".join(" imports ".join(circle) for circle in found)


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


def test_only_train_and_cli_see_the_runs_config():
    """Everything below takes plain arguments, but for the function that makes a run's choices."""
    of_a_run = ("run", "run_fields", "derived", "rules", "run_file", "simpletuner", "switches")
    modules_of_it = {f"fluxfast.config.{name}" for name in of_a_run}
    assert modules_of_it <= {name for name, _ in MODULES}
    for module, imported in import_graph(MODULES).items():
        readers = ("fluxfast.config", "fluxfast.train", "fluxfast.demo", "fluxfast.cli")
        if layer_of(module) not in readers and module != "fluxfast.memory.wishes":
            assert not imported & modules_of_it, f"{module} reads the run's config"
