"""Builds the native module fluxfast._C with CMake. CMakeLists.txt says what it is made of,
pyproject.toml says the rest.

A machine without a compiler gets the package without the module. Environment: FLUXFAST_SKIP_EXT=1
leaves the module out on purpose; FLUXFAST_REQUIRE_EXT=1 makes its absence an error. A module that
doesn't compile is always an error.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# where CMake looks for a compiler that nobody named
COMPILERS = ("c++", "g++", "clang++", "icpx", "cl")


def find_tool(name: str) -> str | None:
    # an environment that isn't activated has its tools beside its Python, not on the PATH
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def missing_tools() -> list[str]:
    missing = []
    if find_tool("cmake") is None:
        missing.append("cmake")
    if find_tool("ninja") is None and find_tool("make") is None:
        missing.append("ninja or make")
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        missing.append("a C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's headers (python3-dev)")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return missing


def native_extensions() -> list[Extension]:
    skip, require = (os.environ.get(f"FLUXFAST_{name}_EXT") == "1" for name in ("SKIP", "REQUIRE"))
    if skip and require:
        raise SystemExit(
            "fluxfast: FLUXFAST_SKIP_EXT=1 and FLUXFAST_REQUIRE_EXT=1 contradict each other; "
            "set one"
        )
    missing = missing_tools()
    if missing and require:
        raise SystemExit(
            "fluxfast: FLUXFAST_REQUIRE_EXT=1, but the native module can't be built: no "
            f"{', no '.join(missing)}"
        )
    if skip or missing:
        why = "FLUXFAST_SKIP_EXT=1" if skip else f"no {', no '.join(missing)}"
        print(
            f"fluxfast: building without the native module fluxfast._C ({why}); ops run on "
            "plain torch",
            file=sys.stderr,
        )
        return []
    return [Extension("fluxfast._C", sources=[])]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        build_dir = Path(self.build_temp).resolve() / ("cmake-ninja" if ninja else "cmake-make")
        install_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # named in full: an isolated build finds each tool somewhere else, and CMake would remember
        # the last place
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *(
                ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
                if ninja
                else ("-G", "Unix Makefiles")
            ),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(
            [cmake, "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)], check=True
        )
        subprocess.run(
            [cmake, "--install", str(build_dir), "--prefix", str(install_dir)], check=True
        )


setup(ext_modules=native_extensions(), cmdclass={"build_ext": CMakeBuild})
