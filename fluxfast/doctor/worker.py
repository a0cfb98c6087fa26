"""A process that checks for the one that started it: `python -m fluxfast.doctor.worker`.

Both write lines of JSON. The process reads a scope and says that it is ready. Then it reads one
request after the other, {"name", "comparing", "timing"}, and answers each with the outcome. It adds
"broken" to the answer if the device is of no use to this process any more.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from fluxfast.doctor.catalogue import checks_for
from fluxfast.doctor.examine import examine
from fluxfast.doctor.scope import Scope


def main() -> int:
    # libraries may print to stdout: send that to stderr, and keep stdout for the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    scope = Scope.from_json(json.loads(sys.stdin.readline()))
    checks = {check.name: check for check in checks_for(scope)}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        outcome = examine(
            checks[request["name"]], comparing=request["comparing"], timing=request["timing"]
        )
        answer = outcome.as_json() | ({"broken": True} if _broken(scope.torch_device) else {})
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _broken(device: torch.device) -> bool:
    """Whether the device answers no more, as after a kernel that wrote to a wrong address."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.empty_cache()
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
