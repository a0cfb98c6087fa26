"""Processes that check: their answers, and what happens if one ends, hangs or can't start."""

import sys
from dataclasses import replace

import pytest
from doctor_cases import scope

from fluxfast.doctor import executor
from fluxfast.doctor.catalogue import checks_for
from fluxfast.doctor.checks import Check, Finding, Outcome, Part, Tolerance
from fluxfast.doctor.executor import Pool, Request, run_checks
from fluxfast.doctor.scope import Scope

# a process that speaks as `fluxfast.doctor.worker` does, and does what the check's name says
STAND_IN = """
import json, os, sys, time
assert json.loads(sys.stdin.readline())["device"] == "cpu"
if "{start}" == "fails":
    sys.exit("ImportError: no such library")
print(json.dumps({{"ready": True}}), flush=True)
for line in sys.stdin:
    name = json.loads(line)["name"]
    if name == "ends":
        os.kill(os.getpid(), 11)
    if name == "is killed":
        os.kill(os.getpid(), 9)
    if name == "exits":
        sys.exit("the driver has left")
    if name == "hangs":
        time.sleep(60)
    answer = {{"name": name, "status": "pass", "note": str(os.getpid())}}
    print(json.dumps(answer | ({{"broken": True}} if name == "breaks" else {{}})), flush=True)
"""


@pytest.fixture
def stand_in(monkeypatch):
    def use(start="works", limit=30.0):
        monkeypatch.setattr(
            executor, "COMMAND", [sys.executable, "-c", STAND_IN.format(start=start)]
        )
        monkeypatch.setattr(executor, "LIMIT", limit)

    return use


def ask(*names, workers=1):
    requests = [
        Request(Check(name, what="gelu", way="triton", way_out="update"), True, False)
        for name in names
    ]
    found = {}
    with Pool(scope(), workers) as pool:
        pool.run(requests, workers, lambda outcome: found.setdefault(outcome.name, outcome))
    return found


def test_the_scope_survives_its_way_to_a_process():
    of = scope(formats=("plain", "nf4"), computes=("same", "int8"), rank=3, dropout=0.1)
    assert Scope.from_json(of.as_json()) == of
    assert [check.name for check in checks_for(Scope.from_json(of.as_json()))] == [
        check.name for check in checks_for(of)
    ]


def test_a_process_answers_one_check_after_the_other(stand_in):
    stand_in()
    found = ask("one", "two")
    assert {outcome.status for outcome in found.values()} == {"pass"}
    assert found["one"].note == found["two"].note


def test_several_processes_share_the_work(stand_in):
    stand_in()
    found = ask(*(f"check {i}" for i in range(12)), workers=2)
    assert len(found) == 12 and len({outcome.note for outcome in found.values()}) <= 2


@pytest.mark.parametrize(
    ("name", "status", "cause"),
    [
        ("ends", "fail", "its process ended with SIGSEGV"),
        ("exits", "fail", "its process ended with exit status 1; it said: the driver has left"),
        ("is killed", "not checked", "its process was killed from outside"),
    ],
)
def test_a_check_that_ends_its_process(stand_in, name, status, cause):
    stand_in()
    found = ask("one", name, "two")
    assert (found[name].status, found[name].what, found[name].way) == (status, "gelu", "triton")
    assert found[name].cause.startswith(cause) and found[name].way_out == "update"
    # the next check gets a new process
    assert found["two"].status == "pass" and found["two"].note != found["one"].note


def test_a_check_that_hangs_is_ended(stand_in):
    stand_in(limit=0.5)
    found = ask("hangs", "two")
    assert (found["hangs"].status, found["hangs"].cause) == (
        "fail",
        "it did not end within 0 seconds",
    )
    assert found["two"].status == "pass"


def test_a_process_without_a_device_is_left(stand_in):
    stand_in()
    found = ask("breaks", "two")
    assert found["breaks"].status == "pass" and found["two"].note != found["breaks"].note


def test_the_next_requests_find_the_process_still_there(stand_in):
    stand_in()
    found = []
    with Pool(scope(), 2) as pool:
        for count in (2, 1, 1):
            requests = [Request(Check(f"{len(found)}-{i}"), True, False) for i in range(4)]
            pool.run(requests, count, found.append)
    assert len(found) == 12 and len({outcome.note for outcome in found[4:]}) == 1


def test_a_process_that_cannot_start_is_no_failure_of_what_it_would_have_checked(stand_in):
    stand_in(start="fails")
    found = ask("one", "two")
    assert {outcome.status for outcome in found.values()} == {"not checked"}
    assert all(
        "could be started" in outcome.cause and "no such library" in outcome.cause
        for outcome in found.values()
    )


def test_what_passed_is_timed_and_what_lacked_memory_is_tried_again(monkeypatch):
    """There is too little memory beside the others, and enough alone."""
    asked = []
    fine = Outcome("a", "pass", error=0.1, bound=0.2, parts={"y": 0.1}, seconds=1.0)

    def answer(pool, requests, workers, done):
        for request in requests:
            asked.append((request.check.name, request.comparing, request.timing, workers))
            name = request.check.name
            if name == "small" and workers > 1:
                outcome = Outcome(
                    name, "not checked", again=True, cause="there is not enough free memory: 2 GiB"
                )
            elif request.comparing:
                outcome = replace(fine, name=name, status="fail" if name == "wrong" else "pass")
            else:
                outcome = Outcome(name, "pass", rate=5.0, unit="B/s", seconds=0.5)
            done(outcome)

    monkeypatch.setattr(Pool, "run", answer)
    run, time = (lambda: None), (lambda: None)
    checks = [
        Check("timed", run=run, time=time),
        Check("plain", run=run),
        Check("wrong", run=run, time=time),
        Check("small", run=run, time=time),
        Check("rate", time=time),
        Check("impossible", run=run, obstacle="there is no GPU"),
    ]
    told = []
    found = run_checks(checks, scope(), 4, lambda outcome: told.append(outcome.name))
    assert [outcome.name for outcome in found] == [check.name for check in checks]
    assert sorted(told) == sorted(check.name for check in checks)
    assert {
        name: (comparing, timing) for name, comparing, timing, workers in asked if workers == 1
    } == {
        "timed": (False, True),
        "small": (True, True),
        "rate": (False, True),
    }
    timed, plain, wrong, small, rate, impossible = found
    assert (timed.error, timed.rate, timed.seconds) == (0.1, 5.0, 1.5)
    assert (plain.rate, wrong.status, small.status, rate.rate) == (None, "fail", "pass", 5.0)
    assert (impossible.status, impossible.cause) == ("not checked", "there is no GPU")


def test_a_real_process(one_thread):
    """Its answers have the same numbers as in this process, whatever libraries print."""
    of = scope()
    checks = [check for check in checks_for(of) if check.name.startswith(("gelu", "attention"))]
    here, there = run_checks(checks, of, 0), run_checks(checks, of, 1)
    assert len(here) > 2 and [outcome.name for outcome in here] == [
        outcome.name for outcome in there
    ]
    for one, other in zip(here, there, strict=True):
        assert (one.status, one.parts.keys(), one.bound) == (
            other.status,
            other.parts.keys(),
            other.bound,
        )
        assert other.rate > 0 and other.error == pytest.approx(one.error, rel=1e-3)


def test_the_worst_part_is_the_one_that_is_most_beyond_its_bound():
    def worst(*parts):
        return Finding(
            tuple(Part(name, error, Tolerance(bound, "")) for name, error, bound in parts)
        ).worst.name

    assert worst(("a", 0.1, 1.0), ("b", 0.01, 0.02)) == "b"
    assert worst(("a", 0.1, 0.01), ("b", float("nan"), 1.0)) == "b"
    assert worst(("a", 0.0, 0.0), ("b", 0.1, 1.0)) == "b"
    assert worst(("a", 1e-9, 0.0), ("b", 0.1, 1.0)) == "a"
