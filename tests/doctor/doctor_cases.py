"""Tiny scopes for the doctor, and things made wrong on purpose for it to find."""

from dataclasses import replace

from fluxfast.doctor.catalogue import checks_for
from fluxfast.doctor.executor import run_checks
from fluxfast.doctor.scope import INTERPRETED, Scope
from fluxfast.ops import dispatch

TINY = replace(INTERPRETED, timed=8)


def scope(**changes):
    """A plain fp32 run on the CPU, at sizes that take milliseconds."""
    return Scope(device="cpu", dtype="float32", **{"sizes": TINY, "short": True, **changes})


def outcomes(of, *, only="", workers=0):
    """What comes of the scope's checks whose names begin with `only`, by name."""
    checks = [check for check in checks_for(of) if check.name.startswith(only)]
    assert checks
    return {outcome.name: outcome for outcome in run_checks(checks, of, workers)}


def failed(found):
    return {name for name, outcome in found.items() if outcome.status == "fail"}


class WrongNative:
    """The native module, with some functions replaced by wrong ones."""

    def __init__(self, **wrong):
        self._right, self._wrong = dispatch.native, wrong

    def __getattr__(self, name):
        return self._wrong[name] if name in self._wrong else getattr(self._right, name)


def leaving_out_the_last_row(function, rows):
    """A native function that computes a row less than asked.

    `rows` is the position of the number of rows among its arguments.
    """
    return lambda *args: function(*args[:rows], args[rows] - 1, *args[rows + 1 :])


def break_gelu(monkeypatch):
    """The native GELU leaves out a row."""
    wrong = leaving_out_the_last_row(dispatch.native.gelu_fwd, rows=4)
    monkeypatch.setattr(dispatch, "native", WrongNative(gelu_fwd=wrong))
