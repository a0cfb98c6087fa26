"""What a run does before it begins: check what is unknown of the machine, avoid what failed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fluxfast.doctor.catalogue import checks_for
from fluxfast.doctor.checks import Check
from fluxfast.doctor.executor import run_checks, workers_for
from fluxfast.doctor.scope import Scope, sizes_for
from fluxfast.doctor.store import Store, verdicts_of
from fluxfast.ops import verdicts

# an environment variable; with "off" a run checks nothing, but what was found before still counts
SWITCH = "FLUXFAST_DOCTOR"

Say = Callable[[str], object]


def ensure_checked(scope: Scope, say: Say) -> None:
    """Check what this scope needs and nobody has checked here, in the short form.

    Then make `auto` pass over everything that failed, now or before, with a line for each.
    """
    scope = replace(
        scope,
        short=True,
        sizes=sizes_for(scope.torch_device, short=True, interpreted=False),
        interpreted=False,
    )
    store = Store(scope.torch_device)
    missing = store.missing(checks_for(scope), scope)
    if missing and os.environ.get(SWITCH, "").lower() == "off":
        say(f"{len(missing)} checks of this machine are due; {SWITCH}=off leaves them out")
    elif missing:
        _check(scope, store, missing, say)
    failures = store.failures(scope.dtype)
    verdicts.set_failed(verdicts_of(failures))
    for failure in failures:
        if failure.what:
            say(
                f"! passed over: {failure.name}: {failure.cause}. {failure.way_out}. "
                "`fluxfast-train doctor` checks again"
            )


def _check(scope: Scope, store: Store, missing: list[Check], say: Say) -> None:
    workers = workers_for(scope.torch_device)
    start = time.perf_counter()
    if workers:
        count = min(workers, len(missing))
        say(
            f"first run on {store.machine['device']} with this driver and these versions: "
            f"{len(missing)} checks of the kernels that it needs, compiled in {count} processes"
        )
    outcomes = run_checks(missing, scope, workers)
    counts = {
        status: sum(o.status == status for o in outcomes)
        for status in ("pass", "fail", "not checked")
    }
    told = f"{counts['pass']} of {len(outcomes)} checks of {store.machine['device']} passed"
    if counts["not checked"]:
        reasons = sorted({o.cause for o in outcomes if o.status == "not checked"})
        told += f", {counts['not checked']} could not be made ({'; '.join(reasons)})"
    store.add(outcomes, scope)
    try:
        store.save()
    except OSError as error:
        told += f"; they can't be kept, and are made again at the next start ({error})"
    say(f"{told}, in {time.perf_counter() - start:.1f} s")


def recall(device: torch.device, dtype: torch.dtype) -> None:
    """Make `auto` pass over what is known to have failed on this machine; checks nothing."""
    store = Store(device)
    if len(store):
        verdicts.set_failed(verdicts_of(store.failures(str(dtype).removeprefix("torch."))))
