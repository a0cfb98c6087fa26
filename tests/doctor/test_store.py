"""What is kept of a machine's checks, and what a run does with it at its start."""

import json
from dataclasses import replace

import pytest
import torch
from doctor_cases import break_gelu, scope

from fluxfast.doctor import machine, startup
from fluxfast.doctor.catalogue import checks_for
from fluxfast.doctor.checks import Outcome
from fluxfast.doctor.store import Store, folder, verdicts_of
from fluxfast.ops import dispatch, verdicts

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A machine that nobody has checked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(startup.SWITCH, raising=False)
    yield tmp_path
    verdicts.set_failed({})


def ensure_checked(of):
    said = []
    startup.ensure_checked(of, said.append)
    return said


def passed(name="gelu (native)", **changes):
    return Outcome(
        name,
        "pass",
        "gelu",
        "native",
        error=1e-7,
        bound=2e-5,
        why="rounding",
        parts={"y": 1e-7},
        **changes,
    )


def wrong(name="gelu (native)"):
    return Outcome(
        name,
        "fail",
        "gelu",
        "native",
        error=float("nan"),
        parts={"y": float("nan")},
        cause="y is wrong",
    )


def test_outcomes_are_kept_whole(cache):
    store, of = Store(CPU), scope()
    outcomes = [
        passed(rate=1e9, unit="B/s", note="a note"),
        replace(wrong("two"), way_out="update", error=float("inf")),
    ]
    lacking = Outcome("three", "not checked", cause="no kernel")
    unknown = Outcome("four", "not checked", cause="there is not enough free memory", again=True)
    store.add([*outcomes, lacking, unknown, Outcome("copy", "pass", rate=1.0)], of)
    store.save()
    (path,) = folder().iterdir()
    assert path == Store(CPU).path and path.is_relative_to(cache)
    entries = json.loads(
        path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )["outcomes"]
    kept = [Outcome.from_json(entry["outcome"]) for entry in entries]
    # rates are measured again, and so is what could not be checked
    assert kept[0] == outcomes[0] and str(kept[1]) == str(outcomes[1]) and kept[2:] == [lacking]


def test_what_is_missing_depends_on_the_mode():
    store, of = Store(CPU), scope()
    checks = checks_for(of)
    assert store.missing(checks, of) == checks
    store.add([passed(checks[0].name)], of)
    assert store.missing(checks, of) == checks[1:]
    assert store.missing(checks, scope(rank=3)) == checks


def test_a_check_that_passes_takes_back_its_failures():
    store = Store(CPU)
    store.add([wrong()], scope(rank=3))
    assert [outcome.name for outcome in store.failures("float32")] == ["gelu (native)"]
    assert not store.failures("bfloat16")
    store.add([passed("another")], scope())
    assert store.failures("float32")
    store.add([passed()], scope())
    assert not store.failures("float32")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 0, "outcomes": []}',
        '{"version": 1, "outcomes": [{"outcome": {}}]}',
    ],
)
def test_a_file_that_cannot_be_read_is_none(text):
    path = Store(CPU).path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(Store(CPU)) == 0


@pytest.mark.parametrize(
    "fact", ["device", "driver", "torch", "triton", "fluxfast", "native module", "sources"]
)
def test_another_combination_is_another_file(fact):
    facts = machine.facts(CPU)
    assert all(isinstance(value, str) and value for value in facts.values())
    assert machine.key(facts) != machine.key(facts | {fact: "another"})


def test_the_first_run_checks_and_the_second_does_not(monkeypatch):
    (line,) = ensure_checked(scope())
    count = len([check for check in checks_for(scope()) if check.obstacle is None])
    assert line.startswith(f"{count} of {count} checks of ") and "passed" in line
    monkeypatch.setattr(startup, "run_checks", lambda *_: pytest.fail("checked again"))
    assert ensure_checked(scope()) == []


def test_another_mode_is_checked_when_it_comes():
    ensure_checked(scope())
    (line,) = ensure_checked(scope(formats=("nf4",)))
    # only what is new: five products, the decoder and the quantiser
    assert line.startswith("7 of 7 checks")


def test_what_failed_is_passed_over_loudly(monkeypatch):
    with monkeypatch.context() as patch:
        break_gelu(patch)
        first, *lines = ensure_checked(scope())
    checks = len([check for check in checks_for(scope()) if check.obstacle is None])
    assert first.startswith(f"{checks - 2} of {checks} checks of ")
    assert len(lines) == 2 and all(
        line.startswith("! passed over: gelu") and "fluxfast-train doctor" in line for line in lines
    )
    assert "Rebuild the module" in lines[0]
    assert verdicts.failed("gelu", "native") and not verdicts.failed("qk_norm_rope", "native")
    # the next start knows it, and says it again
    verdicts.set_failed({})
    assert ensure_checked(scope()) == lines
    assert verdicts.failed("gelu", "native")


def test_switched_off(monkeypatch):
    monkeypatch.setenv(startup.SWITCH, "off")
    (line,) = ensure_checked(scope())
    assert "FLUXFAST_DOCTOR=off leaves them out" in line and len(Store(CPU)) == 0
    store = Store(CPU)
    store.add([wrong()], scope())
    store.save()
    ensure_checked(scope())
    assert verdicts.failed("gelu", "native")


def test_a_cache_that_cannot_be_written(monkeypatch, cache):
    (cache / "fluxfast").write_text("a file where a folder should be")
    (line,) = ensure_checked(scope())
    assert "they can't be kept, and are made again at the next start" in line


def test_recall_minds_what_is_known_and_checks_nothing():
    verdicts.set_failed({("attention", "flash"): "somebody else's"})
    startup.recall(CPU, torch.float32)
    # nothing is known: nothing changes
    assert verdicts.failed("attention", "flash")
    store = Store(CPU)
    store.add([wrong()], scope())
    store.save()
    startup.recall(CPU, torch.bfloat16)
    assert verdicts.failed("gelu", "native") is None
    startup.recall(CPU, torch.float32)
    assert "y is wrong" in verdicts.failed("gelu", "native")
    assert verdicts_of(store.failures("float32")) == {
        ("gelu", "native"): "gelu (native): y is wrong"
    }
