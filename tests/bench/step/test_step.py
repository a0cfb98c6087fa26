"""`fluxfast-bench step`: what is measured, stored and refused, and contestants that fail."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from fluxfast.model.graphs import StepGraphs
from fluxfast.ops import gelu
from fluxfast_bench.counted.floor import Route, floor_seconds, step_work
from fluxfast_bench.main import main
from fluxfast_bench.report import results
from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.step import runner as runners
from fluxfast_bench.step import worker
from fluxfast_bench.step.comparison import Comparison, Outcome, record_of
from fluxfast_bench.step.contestants import Contestant, Setup
from fluxfast_bench.step.runner import Runner, WrongResult, verify
from fluxfast_bench.step.worker import CONTESTANTS, Entry, Plan, entry_of
from graph_emulator import Pool, capture, see_every_op

CPU = torch.device("cpu")
TINY = Setup((SHAPES["tiny"],), "none", 4, "torch-adamw", CPU)
PLAN = Plan(("tiny",), "cpu", 4, "torch-adamw", rounds=2, seconds=0.0)
PEERS_IN_CI = ["diffusers", "quanto-int8", "quanto-int4", "quanto-int2", "bnb-nf4"]


def test_a_run_is_measured_and_stored(tmp_path, monkeypatch, capsys):
    fake = {"copy": 1e10, "float": 1e11, "attention_forward": 1e11, "attention_backward": 1e11}
    monkeypatch.setattr("fluxfast_bench.ops.ceilings.measure", lambda shape, device: fake)
    arguments = [
        "--contestants",
        "diffusers,fluxfast,sdnq-int8",
        "--rounds",
        "2",
        "--seconds",
        "0.01",
        "--one-process",
    ]
    trace = tmp_path / "trace"
    paths = ["--results", str(tmp_path), "--torch-profile", str(trace)]
    assert main(["step", "--device", "cpu", "--shapes", "tiny", *arguments, *paths]) == 0
    (stored,) = results.read_all(tmp_path)
    assert stored.kind == "step" and stored.data["ceilings"] == {"tiny": fake}
    found = stored.data["conditions"]
    assert (
        found["command"].startswith("fluxfast-bench step --device cpu")
        and found["versions"]["torch"]
    )
    peer, ours, absent = stored.records
    assert (
        peer["seconds"] > 0
        and peer["low"] <= peer["seconds"] <= peer["high"]
        and peer["count"] >= 4
    )
    assert "ratios" not in peer and list(ours["ratios"]) == ["diffusers:none"]
    assert 0 < ours["relative_error"] < 1e-4 and ours["storage"] == "fp32"
    floor = floor_seconds(step_work(SHAPES["tiny"], "none", itemsize=4), fake, "float")
    assert ours["floor_share"] == pytest.approx(floor / ours["seconds"], rel=1e-2, abs=1e-4)
    assert absent["reason"] in ("needs a GPU", "not installed: sdnq") and "seconds" not in absent
    assert sorted(path.name for path in trace.iterdir()) == [
        "tiny-diffusers-none.json.gz",
        "tiny-fluxfast-none.json.gz",
    ]
    shown = capsys.readouterr().out
    assert "fluxfast:none" in shown and str(stored.path) in shown


@pytest.mark.usefixtures("eager_peers")
@pytest.mark.parametrize("name", [*PEERS_IN_CI, "fluxfast", "fluxfast-int8", "fluxfast-nf4"])
def test_contestants_are_built_alike_and_train(name):
    contestant = CONTESTANTS[name]
    runner, reference = Runner(contestant, TINY), Runner(CONTESTANTS["diffusers"], TINY)
    # the tiny model's 1 + 1 blocks: 12 and 5 linears, two factors each, and the last proj_out,
    # which `all+ffs` names too
    assert len(runner.parameters) == len(reference.parameters) == 2 * (12 + 5 + 1)
    assert [p.shape for p in runner.parameters] == [p.shape for p in reference.parameters]
    assert sum(p.requires_grad for p in runner.model.parameters()) == len(runner.parameters)
    first, *_ = (float(runner.step()) for _ in range(8))
    # each step has a noise level of its own: the first one's again
    runner.number = 0
    assert float(runner.step()) < first
    assert all(p.grad is None for p in runner.parameters)
    assert 0 <= verify(contestant, TINY) <= contestant.error


def test_compiled_contestants_compute_the_same():
    contestant = CONTESTANTS["fluxfast+compile"]
    torch._dynamo.reset()
    counters.clear()
    assert 0 <= verify(contestant, TINY) <= contestant.error
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_weights_are_the_same_for_all():
    ours, peer = (
        Runner(CONTESTANTS[name], TINY).model.state_dict() for name in ("fluxfast", "diffusers")
    )
    names = [name for name in ours if "lora" not in name]
    assert len(names) > 50
    assert all(torch.equal(ours[name], peer[name]) for name in names)


def test_a_kernel_made_wrong_stops_its_case(tmp_path, monkeypatch, capsys):
    right = gelu.forward

    def wrong(x, *args, **kwargs):
        output, saved = right(x, *args, **kwargs)
        output.y.mul_(1.001)
        return output, saved

    monkeypatch.setattr(gelu, "forward", wrong)
    with pytest.raises(WrongResult, match="wrong: relative error"):
        verify(CONTESTANTS["fluxfast"], TINY)
    monkeypatch.setattr("fluxfast_bench.ops.ceilings.measure", lambda shape, device: {})
    arguments = [
        "--contestants",
        "diffusers,fluxfast",
        "--rounds",
        "1",
        "--seconds",
        "0",
        "--one-process",
    ]
    assert (
        main(
            ["step", "--device", "cpu", "--shapes", "tiny", *arguments, "--results", str(tmp_path)]
        )
        == 1
    )
    peer, ours = results.read_all(tmp_path)[0].records
    assert "seconds" in peer
    assert (
        ours["reason"].startswith("wrong: relative error")
        and "seconds" not in ours
        and "ratios" not in ours
    )
    assert "wrong: relative error" in capsys.readouterr().out


def test_a_quantised_contestant_that_quantises_nothing_is_refused():
    idle = dataclasses.replace(CONTESTANTS["quanto-int8"], quantize=lambda module: None)
    with pytest.raises(WrongResult, match="nothing was quantised"):
        verify(idle, TINY)


def test_graphs_are_checked_once_they_are_replayed(monkeypatch):
    see_every_op(monkeypatch)
    replayed = classmethod(
        lambda cls, model, **options: cls(model, partial(capture, pool=Pool()), **options)
    )
    monkeypatch.setattr(StepGraphs, "on_gpu", replayed)
    contestant = CONTESTANTS["fluxfast-int8+int8+graphs"]
    assert 0 < verify(contestant, TINY) <= contestant.error
    monkeypatch.setattr(runners, "STEPS_BEFORE_REPLAY", 1)
    with pytest.raises(WrongResult, match="its steps are not replayed"):
        verify(contestant, TINY)


def faulty(name, quantize):
    return dataclasses.replace(CONTESTANTS["diffusers"], name=name, quantize=quantize)


def test_what_a_peer_raises_is_its_reason(monkeypatch):
    def refuse(module):
        raise TypeError("no such\n  layer")

    monkeypatch.setitem(CONTESTANTS, "faulty", faulty("faulty", refuse))
    entries = [entry_of(name, "none") for name in ("faulty", "diffusers", "fluxfast")]
    first, peer, ours = Comparison(PLAN, entries, apart=False, limit=60).measure()
    assert first.reason == "TypeError: no such layer"
    # the next one is the anchor in its place
    assert len(ours.on["tiny"].rounds) == len(ours.on["tiny"].anchor) == 2
    # its own, then one beside ours when that came, then the second round's
    assert len(peer.on["tiny"].rounds) == 3 and ours.on["tiny"].anchor == peer.on["tiny"].rounds[1:]
    assert peer.on["tiny"].slowness == 1


class Script:
    """A worker that plays what a test wrote: for each process, the events of each key."""

    def __init__(self, monkeypatch, *processes):
        self.processes, self.asked = list(processes), []
        monkeypatch.setattr(worker, "run_apart", self)

    def __call__(self, job, keys, plan, *, limit):
        self.asked.append(keys)
        return iter(self.processes.pop(0))


def times(key, *rounds):
    return [("round", key, "tiny", [float(second)] * 3) for second in rounds]


def beside(anchor, key, *turns):
    return [event for one, other in turns for event in (*times(anchor, one), *times(key, other))]


def case_of(*names):
    return Comparison(PLAN,
    [Entry(dataclasses.replace(CONTESTANTS["diffusers"], name=name), "none") for name in names],
                apart=True, limit=1)  # fmt: skip


def ready(*keys):
    return [
        event
        for key in keys
        for event in (("start", key), ("ready", key, {"tiny": {"relative_error": 0.0}}))
    ]


def test_a_crash_costs_one_contestant(monkeypatch):
    script = Script(
        monkeypatch,
        [*ready("a:none"), ("start", "b:none"), ("died", "its process died with exit code -11")],
        [*ready("a:none", "c:none"), *beside("a:none", "c:none", (2, 1), (4, 1)), ("done",)],
    )
    a, b, c = case_of("a", "b", "c").measure()
    assert script.asked == [["a:none", "b:none", "c:none"], ["a:none", "c:none"]]
    assert b.reason == "its process died with exit code -11" and not b.measured
    assert a.reason is None and c.reason is None
    # turn against turn: 1/2 and 1/4
    assert c.on["tiny"].slowness == pytest.approx(0.375)


def test_a_failure_that_breaks_the_gpu_is_blamed_on_nobody_else(monkeypatch):
    script = Script(
        monkeypatch,
        [
            *ready("a:none"),
            ("start", "b:none"),
            ("failed", "b:none", "illegal access"),
            ("died", "its process died"),
        ],
        [*ready("a:none", "c:none"), *times("a:none", 1), *times("c:none", 1), ("done",)],
    )
    a, b, c = case_of("a", "b", "c").measure()
    assert script.asked[1] == ["a:none", "c:none"]
    assert (a.reason, b.reason, c.reason) == (None, "illegal access", None)


def test_a_first_turn_that_crashes(monkeypatch):
    script = Script(
        monkeypatch,
        [*ready("a:none", "b:none"), *times("a:none", 1), ("died", "its process died")],
        [*ready("a:none"), *times("a:none", 1), ("done",)],
    )
    a, b = case_of("a", "b").measure()
    assert (a.reason, b.reason) == (None, "its process died")
    assert a.measured and len(script.asked) == 1


def test_what_does_not_fit_is_measured_beside_the_anchor_then_alone(monkeypatch):
    no_room = [("start", "c:none"), ("later", "c:none"), *times("a:none", 2)]
    script = Script(
        monkeypatch,
        [*ready("a:none", "b:none"), *no_room, *times("b:none", 1), ("done",)],
        [*ready("a:none"), *no_room, ("done",)],
        *([*ready(key), *times(key, second), ("done",)] for key,
        second in [("a:none", 2), ("c:none", 6)] * 2),
    )  # fmt: skip
    _, b, c = case_of("a", "b", "c").measure()
    assert script.asked == [
        ["a:none", "b:none", "c:none"],
        ["a:none", "c:none"],
        ["a:none"],
        ["c:none"],
        ["a:none"],
        ["c:none"],
    ]
    assert (b.on["tiny"].slowness, c.on["tiny"].slowness) == (0.5, 3.0)
    ours = Outcome(ours_entry(), ["tiny"])
    ours.ready({"tiny": {"relative_error": 0.0}})
    ours.on["tiny"].rounds, ours.on["tiny"].anchor = [[1.0]], [[2.0]]
    record = record_of(ours, [b, c], PLAN, "tiny", {})
    assert record["ratios"] == {"b:none": 1.0, "c:none": 6.0}


def ours_entry():
    return Entry(CONTESTANTS["fluxfast"], "none")


def test_each_contestant_is_timed_beside_the_anchor_as_soon_as_it_is_there(monkeypatch):
    monkeypatch.setitem(
        SHAPES, "tinier", dataclasses.replace(SHAPES["tiny"], name="tinier", side=3)
    )
    plan = dataclasses.replace(PLAN, shapes=("tiny", "tinier"), steps=1)
    events = list(worker.run("measure", ["diffusers:none", "fluxfast:none"], plan))
    told = [(kind, *(x for x in rest if isinstance(x, str))) for kind, *rest in events]
    peer, ours = "diffusers:none", "fluxfast:none"
    own = [(("ready", peer), ("round", peer, shape)) for shape in ("tiny", "tinier")]
    pair = [
        (("ready", ours), ("round", peer, shape), ("round", ours, shape))
        for shape in ("tiny", "tinier")
    ]
    second = [("round", key, shape) for shape in ("tiny", "tinier") for key in (peer, ours)]
    assert told == [
        ("start", peer),
        *own[0],
        *own[1],
        ("start", ours),
        *pair[0],
        *pair[1],
        *second,
        ("done",),
    ]
    assert all(len(event[3]) == 1 for event in events if event[0] == "round")


def test_what_fails_on_a_second_shape_keeps_the_first(monkeypatch):
    Script(
        monkeypatch,
        [
            *ready("a:none"), *times("a:none", 2), *ready("b:none"), *beside("a:none", "b:none",
            (2, 1)),
            ("failed", "b:none", "wrong: relative error"), ("done",),
        ],
    )  # fmt: skip
    case = Comparison(
        dataclasses.replace(PLAN, shapes=("tiny", "1024px-b1")),
        case_of("a", "b").entries,
        apart=True,
        limit=1,
    )
    a, b = case.measure()
    assert "seconds" in record_of(b, [a, b], case.plan, "tiny", {})
    assert record_of(b, [a, b], case.plan, "1024px-b1", {})["reason"] == "wrong: relative error"


def test_an_anchor_that_fails_leaves_its_place_to_the_next(monkeypatch):
    script = Script(
        monkeypatch,
        [("start", "a:none"), ("died", "no answer for 1 s")],
        [*ready("b:none", "c:none"), *times("b:none", 1), *times("c:none", 2), ("done",)],
    )
    a, _, c = case_of("a", "b", "c").measure()
    assert script.asked[1] == ["b:none", "c:none"]
    assert a.reason == "no answer for 1 s" and c.on["tiny"].slowness == 2


def test_a_process_that_ends_by_itself_and_one_that_hangs(tmp_path):
    (crash,) = worker.run_apart("no such job", limit=60)
    assert crash == ("died", "its process died with exit code 1")
    (hang,) = worker.run_apart("measure", ["fluxfast:none"], PLAN, limit=0.01)
    assert hang == ("died", "no answer for 0.01 s")


def test_floors_are_the_models_arithmetic():
    totals = {}
    for name in ("512px-b1", "1024px-b1"):
        for recompute in ("none", "full"):
            work = step_work(SHAPES[name], recompute)
            totals[name, recompute] = (
                work.linear + work.attention_forward + work.attention_backward
            ) / 1e12
    # 19 + 38 blocks of dim 3072, 512 text tokens: FLOPs counted from the modules' shapes
    assert totals["512px-b1", "none"] == pytest.approx(45.4, abs=0.1)
    assert totals["512px-b1", "full"] == pytest.approx(66.9, abs=0.1)
    assert totals["1024px-b1", "none"] == pytest.approx(171.0, abs=0.1)
    assert totals["1024px-b1", "full"] == pytest.approx(245.4, abs=0.1)
    routed = step_work(SHAPES["1024px-b1"], "full", route=Route(0.5))
    assert (
        routed.linear + routed.attention_forward + routed.attention_backward
    ) / 1e12 == pytest.approx(128.6, abs=0.1)
    assert step_work(SHAPES["1024px-b1"], "full").bytes / 1e9 == pytest.approx(84.5, abs=0.1)
    # twice the batch is twice the work
    one, two = (
        step_work(SHAPES["512px-b1"], "selective"),
        step_work(SHAPES["512px-b2"], "selective"),
    )
    assert dataclasses.astuple(two) == pytest.approx([2 * x for x in dataclasses.astuple(one)])


def test_the_floor_takes_each_product_at_its_own_rate():
    work = step_work(SHAPES["1024px-b1"], "full", codes=True)
    rates = {
        "copy": 4e12,
        "float": 8e14,
        "int8": 16e14,
        "attention_forward": 6e14,
        "attention_backward": 5e14,
    }
    gained = floor_seconds(work, rates, "float") - floor_seconds(work, rates, "int8")
    assert gained == pytest.approx(work.linear / 16e14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contestants", "nobody"], "got 'nobody'"),
        (
            ["--contestants", "fluxfast:sometimes"],
            "expected one of none, selective, full; got 'sometimes'",
        ),
        (["--rounds", "0"], "--rounds: expected 1 or more"),
        (["--steps", "0"], "--steps: expected 1 or more"),
        (["--shapes", "huge"], "got 'huge'"),
        (["--device", "cuda:7"], "--device cuda:7: this PyTorch"),
        (["--device", "abacus"], "expected cpu, cuda or cuda:N, got 'abacus'"),
    ],
)
def test_requests_that_can_not_be_met(arguments, message, capsys):
    assert main(["step", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_results_that_are_none(tmp_path):
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "x.json").write_text(json.dumps({"kind": "guess"}))
    with pytest.raises(ValueError, match=r"x\.json: not a result"):
        results.read_all(tmp_path)


def test_every_contestant_has_a_name_and_a_title_of_its_own():
    assert len({c.title for c in CONTESTANTS.values()}) == len(CONTESTANTS)
    assert all(name == contestant.name for name, contestant in CONTESTANTS.items())
    assert isinstance(CONTESTANTS["fluxfast-int8+int8+tread"], Contestant)
