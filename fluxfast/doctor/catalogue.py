"""All checks of a scope, in the order in which they are reported."""

from __future__ import annotations

from fluxfast.doctor.attention_checks import attention_checks
from fluxfast.doctor.checks import Check
from fluxfast.doctor.format_checks import format_checks, gemv_checks
from fluxfast.doctor.linear_checks import linear_checks
from fluxfast.doctor.op_checks import op_checks
from fluxfast.doctor.rates import rate_checks
from fluxfast.doctor.scope import Scope
from fluxfast.doctor.update_checks import update_checks
from fluxfast.ops import verdicts

NO_GPU = (
    "there is no GPU to run them; TRITON_INTERPRET=1 in the environment runs them in Triton's "
    "interpreter"
)


def checks_for(scope: Scope) -> list[Check]:
    """The checks that the scope asks for; of a short scope, those of the short form."""
    with verdicts.ignored():
        checks = [
            *op_checks(scope),
            *linear_checks(scope),
            *format_checks(scope),
            *attention_checks(scope),
        ]
        checks += [*update_checks(scope), *gemv_checks(scope)]
        if not scope.short:
            # diffusers and PEFT take seconds to import
            from fluxfast.doctor.model_checks import model_checks

            checks += [*model_checks(scope), *rate_checks(scope)]
        if scope.device == "cpu" and not scope.interpreted:
            checks.append(Check(name="Triton's kernels", obstacle=NO_GPU))
    if scope.short:
        checks = [check for check in checks if check.short]
    names = [check.name for check in checks]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return checks
