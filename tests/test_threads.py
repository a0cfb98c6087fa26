"""How threads wait: our commands have them sleep soon, unless the user says otherwise."""

import os
import re
import subprocess
import sys

import pytest

from fluxfast.threads import SPINS, share_cores

# prints what is in the environment at the moment that PyTorch is imported
AT_IMPORT = """
import os, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("spins", os.environ.get("GOMP_SPINCOUNT"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Watch())
from {module} import main
main({words!r})
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [("fluxfast.cli.main", ["doctor", "--help"]), ("fluxfast_bench.main", ["ops", "--help"])],
)
@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_commands_say_it_before_pytorch_is_imported(module, words, said, expected):
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run(
        [sys.executable, "-c", AT_IMPORT.format(module=module, words=words)],
        env=env | said,
        capture_output=True,
        text=True,
    )
    assert re.findall(r"spins (\w+)", found.stdout) == [expected], found.stderr


def test_importing_the_package_changes_nothing():
    code = """
import os
before = dict(os.environ)
import fluxfast.ops.linear.group, fluxfast.threads
assert before == dict(os.environ)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_said_once(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    share_cores()
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
