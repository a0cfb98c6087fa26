"""The wheel: what is in it, and that it works from another folder, with the native module and
without.

Builds happen in a copy of the checkout, so that they neither use nor leave anything in it.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "bench",
    "csrc",
    "fluxfast",
    "kernels",
    "pyproject.toml",
    "setup.py",
]

PIP_WHEEL = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def copy_sources(destination: Path) -> Path:
    destination.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                destination / name,
                ignore=shutil.ignore_patterns("*.so", "__pycache__"),
            )
        else:
            shutil.copy(ROOT / name, destination / name)
    return destination


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with what `command` says; the result holds both streams in stdout."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLUXFAST_", "PYTHON", "CXX"))
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )


def build_wheel(folder: Path, **env: str) -> Path:
    """The wheel of a copy of the checkout, built below `folder` by the first test worker that asks
    for it.
    """
    folder.mkdir(exist_ok=True)
    source, out = folder / "source", folder / "out"
    with FileLock(folder / "lock"):
        if not source.exists():
            result = run(*PIP_WHEEL, out, copy_sources(source), cwd=source, **env)
            assert result.returncode == 0, result.stdout
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A temporary folder of this test run, the same for all its workers."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def run_installed(wheel: Path, folder: Path, script: str) -> str:
    """Installs the wheel alone into `folder`, and runs a script there on it and the environment's
    other packages.
    """
    target = folder / "installed"
    result = run("-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=folder)
    assert result.returncode == 0, result.stdout
    # an editable install of the checkout would answer for what the wheel lacks
    prelude = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', "
        "'').startswith('__editable__')]\n"
        f"import fluxfast; assert fluxfast.__file__.startswith({str(target)!r}), "
        "fluxfast.__file__\n"
    )
    result = run("-c", prelude + script, cwd=folder, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stdout
    return result.stdout


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def native_wheel(shared_folder) -> Path:
    return build_wheel(shared_folder / "native_wheel", FLUXFAST_REQUIRE_EXT="1")


@pytest.fixture(scope="session")
def pure_wheel(shared_folder) -> Path:
    (shared_folder / "no_tools").mkdir(exist_ok=True)
    return build_wheel(shared_folder / "pure_wheel", PATH=str(shared_folder / "no_tools"))


def python_files(folder: Path, package: str) -> set[str]:
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


@needs_compiler
def test_native_wheel_holds_everything(native_wheel):
    names = names_in(native_wheel)
    extensions = {name for name in names if name.endswith((".so", ".pyd"))}
    assert len(extensions) == 1
    assert extensions.pop().startswith("fluxfast/_C.")
    assert names >= python_files(ROOT / "fluxfast", "fluxfast")
    assert names >= python_files(ROOT / "kernels/fluxfast_kernels", "fluxfast_kernels")
    assert names >= python_files(ROOT / "bench/fluxfast_bench", "fluxfast_bench")
    assert names >= {"fluxfast/py.typed", "fluxfast/_C.pyi", "fluxfast/config/options.tsv"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"fluxfast", "fluxfast_bench", "fluxfast_kernels"}


@needs_compiler
def test_native_wheel_works_elsewhere(native_wheel, tmp_path):
    script = (
        "import torch, fluxfast_kernels, fluxfast._C\n"
        "from fluxfast.ops.gelu import gelu, gelu_ref\n"
        "x = torch.linspace(-3, 3, 100)\n"
        "torch.testing.assert_close(gelu(x, impl='native'), gelu_ref(x))\n"
        "print(fluxfast._C.__file__)\n"
    )
    assert (
        run_installed(native_wheel, tmp_path, script)
        .strip()
        .startswith(str(tmp_path / "installed"))
    )


def test_without_tools_the_wheel_is_pure(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = names_in(pure_wheel)
    assert not any(name.endswith((".so", ".pyd")) for name in names)
    assert names >= python_files(ROOT / "fluxfast", "fluxfast")


def test_pure_wheel_works_elsewhere(pure_wheel, tmp_path):
    script = (
        "import logging, torch\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from fluxfast.ops.gelu import gelu, gelu_ref\n"
        "x = torch.linspace(-3, 3, 100)\n"
        "assert torch.equal(gelu(x), gelu_ref(x))\n"
        "try:\n"
        "    gelu(x, impl='native')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    out = run_installed(pure_wheel, tmp_path, script)
    assert "gelu runs on 'ref': the native module fluxfast._C was not built" in out
    assert "impl='native' can't do this call: the native module fluxfast._C was not built" in out


@needs_compiler
def test_a_source_that_does_not_compile_is_an_error(tmp_path):
    source = copy_sources(tmp_path / "source")
    (source / "csrc/bindings.cpp").write_text("#error broken on purpose\n")
    result = run(*PIP_WHEEL, tmp_path / "out", source, cwd=source)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout


@pytest.mark.parametrize(
    ("env", "returncode", "message"),
    [
        ({"PATH": ""}, 0, "building without the native module fluxfast._C (no "),
        (
            {"FLUXFAST_SKIP_EXT": "1"},
            0,
            "building without the native module fluxfast._C (FLUXFAST_SKIP_EXT=1)",
        ),
        (
            {"PATH": "", "FLUXFAST_REQUIRE_EXT": "1"},
            1,
            "FLUXFAST_REQUIRE_EXT=1, but the native module can't be built: no ",
        ),
        ({"FLUXFAST_SKIP_EXT": "1", "FLUXFAST_REQUIRE_EXT": "1"}, 1, "contradict each other"),
    ],
)
def test_the_build_says_what_it_leaves_out(env, returncode, message):
    result = run("setup.py", "--name", cwd=ROOT, **env)
    assert result.returncode == returncode, result.stdout
    assert (
        len(
            [
                line
                for line in result.stdout.splitlines()
                if line.startswith("fluxfast: ") and message in line
            ]
        )
        == 1
    )
