"""Runs of `fluxfast-bench step` as they are stored, made up."""

from fluxfast_bench.report import results
from fluxfast_bench.step.worker import CONTESTANTS

H200 = {
    "device": "NVIDIA H200",
    "cuda": "13.0",
    "gpu": {"driver_version": "580", "clocks.sm": "1980", "clocks.max.sm": "1980"},
}


def record(contestant, seconds, **more):
    name, policy = contestant.split(":")
    known = CONTESTANTS[name]
    return {
        "case": "1024px-b1", "contestant": contestant, "title": known.title, "ours": known.ours,
        "storage": known.storage,
        "recompute": policy, "batch": 1, "tokens": 4608, "rank": 16, "optimizer": "adamw8bit",
        "seconds": seconds,
        "low": seconds, "high": seconds, "count": 9, "relative_error": 0.01, "floor_share": 0.8,
        "peak_gib": 15.0,
        **({"ratios": {}} if known.ours else {}), **more,
    }  # fmt: skip


def run_of(*records, day=1, kind="step", device=None):
    found = {
        "date": f"2026-11-{day:02}T00:00:00Z", "commit": "abc", "command": "fluxfast-bench step",
        "versions": {"torch": "2.13"},
        **(H200 if device is None else {"device": device}),
    }  # fmt: skip
    return {"kind": kind, "conditions": found, "records": list(records)}


def store(root, *runs):
    for run in runs:
        results.write(root, run)
    return results.read_all(root)
