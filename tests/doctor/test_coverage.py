"""Nothing that a step launches on a GPU goes unchecked.

Step and checks run on meta tensors of full width, which launch nothing, and are compared.
"""

from types import SimpleNamespace

import pytest
import torch

from fluxfast.doctor import (
    attention_checks,
    format_checks,
    op_cases,
    op_checks,
    product_cases,
)
from fluxfast.doctor.checks import Random
from fluxfast.doctor.scope import SHORT_GPU, Scope
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops import dispatch
from fluxfast.quant import FORMATS
from fluxfast.quant.format import Format
from fluxfast_bench.counted.meta_step import as_on_gpu, fluxfast_model, forward_backward, inputs_of
from fluxfast_bench.shapes import SHAPES

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
META = torch.device("meta")


class MetaRandom(Random):
    def __init__(self, device, dtype, seed=0):
        self.device, self.dtype = META, dtype

    def __call__(self, *shape, dtype=None, scale=1.0):
        return torch.empty(shape, dtype=dtype or self.dtype, device=META)

    def permutation(self, count):
        return torch.empty(count, dtype=torch.int64, device=META)


def launches(run):
    """The kernels that `run` launches, with each argument's dtype or whether it is None."""
    seen = set()

    def on_launch(kernel, args, numbers):
        seen.add(
            (
                kernel.__name__,
                tuple(str(a.dtype) if isinstance(a, torch.Tensor) else a is None for a in args),
            )
        )

    with as_on_gpu(on_launch):
        run()
    return seen


def checked(scope):
    """What the short form's comparisons launch."""
    with torch.no_grad():
        for case in op_cases.op_cases(scope):
            case.compute(
                "triton",
                case.inputs(
                    MetaRandom(META, scope.torch_dtype), scope.sizes, scope.sizes.tokens[0]
                ),
            )
        groups = [
            (product_cases.make_group(scope, fmt, cols, outs), cols, sum(outs), compute)
            for fmt in scope.formats
            for compute in scope.computes
            for cols, outs in product_cases.shapes_of(scope).values()
        ]
        groups += [
            (linears, cols, rows, "same")
            for _, linears, cols, rows in product_cases.embedders(scope)
        ]
        for linears, cols, rows, compute in groups:
            for tokens in scope.sizes.products:
                x, dy = (
                    torch.empty(tokens, n, dtype=scope.torch_dtype, device=META)
                    for n in (cols, rows)
                )
                options = {"compute": compute}
                product_cases.products(linears, x, dy, "triton", **options)
                roomy = product_cases.with_room(linears)
                product_cases.products(roomy, x, dy, "triton", room=True, **options)
                if compute in scope.computes and tokens > 1:
                    text = min(scope.sizes.text, tokens // 2)
                    product_cases.products_of_parts(linears, linears, x, dy, text, **options)
                    product_cases.products_of_parts(roomy, roomy, x, dy, text, room=True, **options)


@pytest.mark.parametrize(
    ("format", "compute"), [(None, "same"), ("int8", "int8"), ("nf4", "int8"), ("fp8_e4m3", "e4m3")]
)
def test_every_launch_of_a_step_is_among_the_short_forms(monkeypatch, format, compute):
    for module in (op_checks, product_cases, format_checks, attention_checks):
        monkeypatch.setattr(module, "Random", MetaRandom)
    monkeypatch.setattr(
        Format, "quantize", lambda self, weight, **_: self.empty(tuple(weight.shape), META)
    )
    assert format is None or format in FORMATS
    scope = Scope(
        device="meta",
        dtype="bfloat16",
        formats=(format or "plain",),
        computes=(compute,),
        adapter_dtype="bfloat16",
        sizes=SHORT_GPU,
        short=True,
    )
    # a block of each kind; its base may have linears that are not quantised
    plain = Scope(
        device="meta", dtype="bfloat16", adapter_dtype="bfloat16", sizes=SHORT_GPU, short=True
    )
    shape = SHAPES["1024px-b1"]
    shallow = SimpleNamespace(config=shape.config | {"num_layers": 1, "num_single_layers": 1})

    def step():
        for recompute in ("full", "none"):
            model = fluxfast_model(
                shallow,
                adapters=torch.bfloat16,
                format=format,
                compute=compute,
                recompute=recompute,
            )
            assert isinstance(model, FluxTransformer)
            forward_backward(model, inputs_of(shape))

    of_step, of_checks = launches(step), launches(lambda: (checked(scope), checked(plain)))
    missing = of_step - of_checks
    assert len(of_step) > 10 and not missing
