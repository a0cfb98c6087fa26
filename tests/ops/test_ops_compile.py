"""The ops under torch.compile: one graph, the values of eager, and no recompilation for another
number of tokens.
"""

import torch
from op_cases import every_case, make
from op_checks import outputs_and_grads


@every_case
def test_compiled_equals_eager(case, impl):
    torch._dynamo.reset()
    compiled = None
    for tokens in (3, 5, 7):
        op, inputs = make(case, tokens, impl)
        compiled = compiled or torch.compile(op, fullgraph=True, backend="aot_eager")
        # the first two compile; whatever comes after that has nothing new in it
        with torch.compiler.set_stance("default" if tokens < 7 else "fail_on_recompile"):
            outs, grads = outputs_and_grads(compiled, inputs)
        expected_outs, expected_grads = outputs_and_grads(op, inputs)
        for actual, expected in zip(outs + grads, expected_outs + expected_grads, strict=True):
            # the native qk_norm_rope keeps other tensors when compiled, and so rounds elsewhere
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
