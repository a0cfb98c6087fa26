"""What pytest-benchmark runs for `fluxfast-bench ops`: one test a timing.

`timings.run_pytest` starts it, with the Session as a plugin.
"""

from __future__ import annotations

from typing import Any

from fluxfast_bench.ops.session import Session, Timing


def test_op(benchmark: Any, timing: Timing, session: Session) -> None:
    session.began(str(timing))
    session.check(timing)
    run, calls = session.prepare(timing)
    benchmark(run)
    session.record(timing, [second / calls for second in benchmark.stats.stats.data])
