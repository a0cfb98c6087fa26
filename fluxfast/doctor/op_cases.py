"""The fused ops of a step, forward and backward, in every form in which blocks call them.

Each case is a function of an implementation and of named tensors. `op_checks` runs it twice: by the
implementation in the activations' dtype, and by the reference in a wider one on the same values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfast.doctor.checks import Named, Random
from fluxfast.doctor.scope import Scope, Sizes
from fluxfast.ops import (
    gated_residual,
    gelu,
    modulated_layer_norm,
    qk_norm_rope,
    row_quant,
    token_route,
)
from fluxfast.ops.parts import Parts
from fluxfast.ops.row_quant import Quantized, RowOutput


@dataclass(frozen=True)
class OpCase:
    """An op in one of its forms.

    name: of the check.
    op: its name for `dispatch.resolve`.
    inputs: makes the named tensors for so many tokens.
    compute: runs the op on (implementation, inputs).
    plain: the form without codes; only these are checked on instruction sets not in use.
    only_triton: no other implementation is called in this form.
    """

    name: str
    op: str
    inputs: Callable[[Random, Sizes, int], Named]
    compute: Callable[[str, Named], Named]
    plain: bool = True
    only_triton: bool = False


def rows_of(name: str, rows: RowOutput) -> Named:
    """What an op wrote, by name, with codes decoded."""
    found = {} if rows.y is None else {name: rows.y}
    if rows.q is not None and rows.q_scale is not None:
        found[f"{name} codes"] = decoded(Quantized(rows.q, rows.q_scale))
    return found


def decoded(codes: Quantized) -> Tensor:
    """The values of 8-bit codes, in fp32."""
    return codes.q.float() * codes.scale.float()[..., None]


def _present(**tensors: Any) -> Named:
    return {
        name.replace("_", " "): tensor for name, tensor in tensors.items() if tensor is not None
    }


def _norm_inputs(randn: Random, s: Sizes, tokens: int) -> Named:
    wide = (s.batch, tokens, s.dim)
    # each row has an offset of its own, so that leaving out its mean is noticed
    x = randn(*wide) + randn(s.batch, tokens, 1)
    names = ("dy", "past", "branch")
    return {
        "x": x,
        **{name: randn(*wide) for name in names},
        **{name: randn(s.batch, s.dim) for name in ("scale", "shift", "gate")},
        "col_scale": 1 + randn(s.dim, dtype=torch.float32).abs(),
    }


def _layer_norm(form: str, impl: str, t: Named, parts: Parts | None = None) -> Named:
    how: dict[str, Any] = {"parts": parts, "impl": impl}
    rows, saved = modulated_layer_norm.forward(t["x"], t["scale"], t["shift"], out=form, **how)
    dx, dscale, dshift = modulated_layer_norm.backward(
        t["dy"], saved, (True, True, True), add_to=t["past"], **how
    )
    needs = (True, False, False)
    frozen = modulated_layer_norm.backward(t["dy"], saved, needs, add_to=t["past"], **how)[0]
    # as the model's last norm has it, with no gradient to add
    last = modulated_layer_norm.backward(t["dy"], saved, needs, **how)[0]
    return rows_of("y", rows) | _present(
        dx=dx, dscale=dscale, dshift=dshift, dx_alone=frozen, dx_of_the_last=last
    )


def _residual_layer_norm(
    form: str, grad_form: str, impl: str, t: Named, parts: Parts | None = None
) -> Named:
    x, rows, saved = modulated_layer_norm.forward_residual(
        t["x"],
        t["gate"],
        t["branch"],
        t["scale"],
        t["shift"],
        out=form,
        keep_branch=True,
        parts=parts,
        impl=impl,
    )
    found = {"x": x} | rows_of("y", rows)
    col_scale = None if grad_form == "same" else t["col_scale"]
    for name, modulation in (("", True), (" alone", False)):
        dx, dbranch, sums = modulated_layer_norm.backward_residual(
            t["dy"],
            saved,
            add_to=t["past"],
            out=grad_form,
            col_scale=col_scale,
            modulation=modulation,
            parts=parts,
            impl=impl,
        )
        found |= {f"dx{name}": dx} | rows_of(f"dbranch{name}", dbranch)
        found |= _present(**dict(zip(("dscale", "dshift", "dgate"), sums, strict=True)))
    return found


def _gated_residual(grad_form: str, impl: str, t: Named, parts: Parts | None = None) -> Named:
    out, saved = gated_residual.forward(t["x"], t["gate"], t["branch"], parts=parts, impl=impl)
    options: dict[str, Any] = {
        "out": grad_form,
        "col_scale": None if grad_form == "same" else t["col_scale"],
        "parts": parts,
        "impl": impl,
    }
    dy, dgate = gated_residual.backward_rows(t["dy"], saved, needs_gate=True, **options)
    alone, _ = gated_residual.backward_rows(t["dy"], (t["gate"], None), **options)
    return {"out": out} | rows_of("dy", dy) | _present(dgate=dgate) | rows_of("dy alone", alone)


def _gelu_inputs(randn: Random, s: Sizes, tokens: int) -> Named:
    hidden = 4 * s.dim
    # in blocks they are columns of a wider tensor
    wide = randn(s.batch, tokens, s.dim + hidden, scale=2.0)
    return {
        "x": wide[..., s.dim :],
        "prefix": randn(s.batch, tokens, s.dim),
        "past": randn(s.batch, tokens, s.dim),
        "dy": randn(s.batch, tokens, s.dim + hidden)[..., s.dim :],
        "col_scale": 1 + randn(hidden, dtype=torch.float32).abs(),
    }


def _gelu(
    form: str, grad_form: str, prefixed: bool, impl: str, t: Named, parts: Parts | None = None
) -> Named:
    rows, saved = gelu.forward(
        t["x"], prefix=t["prefix"] if prefixed else None, out=form, impl=impl
    )
    width = t["prefix"].shape[-1]
    # in blocks the gradient is written into columns of a wider tensor
    into = t["x"].new_empty(*t["x"].shape[:-1], width + t["x"].shape[-1])[..., width:]
    col_scale = None if grad_form == "same" else t["col_scale"]
    options: dict[str, Any] = {"out": grad_form, "col_scale": col_scale, "into": into}
    dx = gelu.backward_rows(t["dy"], saved, **options, parts=parts, impl=impl)
    found = rows_of("y", rows) | rows_of("dx", dx)
    if prefixed:
        # a single block passes the gradient of all of the output on
        dprefix, dy = torch.empty_like(t["prefix"]), torch.cat([t["past"], t["dy"]], dim=-1)
        options["into"] = torch.empty_like(into)
        dx = gelu.backward_rows(dy, saved, **options, dprefix=dprefix, impl=impl)
        found |= {"dprefix": dprefix} | rows_of("dx behind dprefix", dx)
    return found


def _rope_inputs(
    text: bool, routed: bool, joint: bool, randn: Random, s: Sizes, tokens: int
) -> Named:
    """joint: text and image lie in one tensor, so that v need not be copied."""
    img = tokens - min(s.text, tokens // 2) if text else tokens
    angle = randn(tokens + 5 if routed else tokens, s.head_dim // 2, dtype=torch.float32)
    wide = 3 * s.dim
    t = {
        # a single block's q, k and v are columns of a wider tensor
        "qkv": randn(s.batch, img, wide + 4 * s.dim)[..., :wide],
        "weights": 1 + randn(4 if text else 2, s.head_dim, scale=0.2),
        # the text's, the image's
        "col_scale": 1 + randn(2, wide, dtype=torch.float32).abs(),
        "cos": angle.cos(),
        "sin": angle.sin(),
        **{name: randn(s.batch, tokens, s.heads, s.head_dim) for name in ("dq", "dk", "dv")},
    }
    if joint:
        t["txt_qkv"], t["qkv"] = randn(s.batch, tokens, wide).split([tokens - img, img], dim=1)
    elif text:
        t["txt_qkv"] = randn(s.batch, tokens - img, wide)
    if routed:
        t["index"] = torch.stack([randn.permutation(tokens + 5)[:tokens] for _ in range(s.batch)])
    return t


def _rope(heads: int, grad_form: str, impl: str, t: Named) -> Named:
    txt = t.get("txt_qkv")
    (q, k, v), saved = qk_norm_rope.forward(
        t["qkv"], txt, t["weights"], t["cos"], t["sin"], t.get("index"),
        heads=heads, view_v=True, impl=impl,
    )  # fmt: skip
    s_txt = 0 if txt is None else txt.shape[1]
    batch, tokens, width = t["qkv"].shape
    # a single block wants the gradient in columns of a wider tensor
    into = t["qkv"].new_empty(batch, tokens, 2 * width)[..., :width]
    txt_scale, scale = t["col_scale"]
    dqkv, dtxt, codes = qk_norm_rope.backward_rows(
        (t["dq"], t["dk"], t["dv"]),
        saved,
        s_txt=s_txt,
        out=grad_form,
        col_scale=None if grad_form == "same" else (txt_scale, scale) if s_txt else scale,
        dqkv=into,
        impl=impl,
    )
    found = _present(q=q, k=k, v=v, dqkv=dqkv, dtxt_qkv=None if txt is None else dtxt)
    return found if codes is None else found | {"codes of dqkv": decoded(codes)}


def _row_quant(fmt: str, impl: str, t: Named, parts: Parts | None = None) -> Named:
    plain, folded = (
        row_quant.forward(t["x"], fmt, scale, parts=parts, impl=impl)
        for scale in (None, t["col_scale"])
    )
    return {"codes": decoded(plain), "folded codes": decoded(folded)}


def _route_inputs(randn: Random, s: Sizes, tokens: int) -> Named:
    kept = tokens // 2 + 1
    return {
        "x": randn(s.batch, tokens, s.dim),
        "y": randn(s.batch, kept, s.dim),
        "dout": randn(s.batch, tokens, s.dim),
        "dy": randn(s.batch, kept, s.dim),
        "index": torch.stack([randn.permutation(tokens)[:kept] for _ in range(s.batch)]),
    }


def _token_gather(impl: str, t: Named) -> Named:
    out, saved = token_route.gather_forward(t["x"], t["index"], impl=impl)
    (dx,) = token_route.gather_backward(t["dy"], saved, (True,), tokens=t["x"].shape[1], impl=impl)
    return _present(out=out, dx=dx)


def _token_scatter(impl: str, t: Named) -> Named:
    out, saved = token_route.scatter_forward(t["x"], t["y"], t["index"], impl=impl)
    dbase, dy = token_route.scatter_backward(t["dout"], saved, (True, True), impl=impl)
    return _present(out=out, dbase=dbase, dy=dy)


def _inputs_of_parts(
    inputs: Callable[[Random, Sizes, int], Named], randn: Random, s: Sizes, tokens: int
) -> Named:
    text = min(s.text, tokens // 2)
    of_parts = {"text": inputs(randn, s, text), "image": inputs(randn, s, tokens - text)}
    return {f"{part} {name}": t for part, own in of_parts.items() for name, t in own.items()}


def _with_parts(compute: Callable[..., Named], impl: str, t: Named) -> Named:
    """Text and image by one call of the kernels; by the reference, one after the other."""
    text, image = (
        {name.removeprefix(part): own for name, own in t.items() if name.startswith(part)}
        for part in ("text ", "image ")
    )
    if impl == "triton":
        made = _at_once(compute, text, image)
    else:
        made = compute(impl, text), compute(impl, image)
    return {
        f"{part} {name}": own
        for part, found in zip(("text", "image"), made, strict=True)
        for name, own in found.items()
    }


def _at_once(compute: Callable[..., Named], text: Named, image: Named) -> tuple[Named, Named]:
    """What `compute` makes of text and image at once, of each: rows as [B, S, …]."""
    batch, tokens = text["x"].shape[:2]
    parts = Parts(batch * tokens, batch)
    both: dict[str, Any] = {
        name: torch.cat([own.flatten(0, 1), image[name].flatten(0, 1)])
        if own.ndim == 3
        else (own, image[name])
        for name, own in text.items()
    }
    made: tuple[Named, Named] = {}, {}
    for name, found in compute("triton", both, parts=parts).items():
        halves = found if isinstance(found, tuple) else (found[: parts.rows], found[parts.rows :])
        for own, half, inputs in zip(made, halves, (text, image), strict=True):
            vectors = isinstance(found, tuple)
            own[name] = half if vectors else half.unflatten(0, inputs["x"].shape[:2])
    return made


def forms_of(scope: Scope) -> Iterator[tuple[str, str, str]]:
    """The forms in which ops write the products' inputs.

    Each is (what the check's name says, `out=` of the ops before a product, `out=` of the ops that
    make a product's gradient).
    """
    for compute in scope.computes:
        if compute == "same":
            yield "", "same", "same"
            continue
        if scope.dropout == 0 or scope.exhaustive:
            yield f", {compute} codes", compute, f"both-{compute}"
        if scope.dropout or scope.exhaustive:
            yield f", values and {compute} codes", f"both-{compute}", f"both-{compute}"


def _rope_cases(scope: Scope, form: str, grad: str) -> Iterator[OpCase]:
    for said, text, routed, joint in (
        ("", False, False, False),
        (", text and image", True, False, False),
        (", text and image side by side", True, False, True),
        (", routed", True, True, False),
    ):
        if not routed or scope.routes:
            inputs = functools.partial(_rope_inputs, text, routed, joint)
            compute = functools.partial(_rope, scope.sizes.heads, grad)
            name = f"q and k norm, rope{said}{form}"
            yield OpCase(name, "qk_norm_rope", inputs, compute, grad == "same")


def op_cases(scope: Scope) -> Iterator[OpCase]:
    """The fused ops in the forms that the scope's products ask for."""
    part, norm = functools.partial, "modulated_layer_norm"
    forms = list(forms_of(scope))
    for said, form, grad in forms:
        yield OpCase(
            f"layer norm{said}", norm, _norm_inputs, part(_layer_norm, form), form == "same"
        )
        joined = part(_residual_layer_norm, form, grad)
        yield OpCase(f"residual and layer norm{said}", norm, _norm_inputs, joined, form == "same")
        yield OpCase(
            f"gelu{said}", "gelu", _gelu_inputs, part(_gelu, form, grad, False), form == "same"
        )
        yield OpCase(
            f"gelu behind attention{said}",
            "gelu",
            _gelu_inputs,
            part(_gelu, form, grad, True),
            form == "same",
        )
    for grad, said in {grad: said for said, _, grad in reversed(forms)}.items():
        yield OpCase(
            f"gated residual{said}",
            "gated_residual",
            _norm_inputs,
            part(_gated_residual, grad),
            grad == "same",
        )
        yield from _rope_cases(scope, said, grad)
    yield from _cases_of_parts(forms)
    for fmt in scope.computes:
        if fmt != "same":
            yield OpCase(f"row quantiser, {fmt}", "row_quant", _norm_inputs, part(_row_quant, fmt))
    if scope.routes:
        yield OpCase("tokens gathered", "token_gather", _route_inputs, _token_gather)
        yield OpCase("tokens scattered", "token_scatter", _route_inputs, _token_scatter)


def _cases_of_parts(forms: list[tuple[str, str, str]]) -> Iterator[OpCase]:
    """The forms in which a double block calls an op for text and image at once."""
    part = functools.partial
    for said, form, grad in forms:
        cases: dict[str, tuple[str, Callable[..., Named], Callable[..., Named]]] = {
            "layer norm": ("modulated_layer_norm", _norm_inputs, part(_layer_norm, form)),
            "residual and layer norm": (
                "modulated_layer_norm",
                _norm_inputs,
                part(_residual_layer_norm, form, grad),
            ),
            "gelu": ("gelu", _gelu_inputs, part(_gelu, form, grad, False)),
            "gated residual": ("gated_residual", _norm_inputs, part(_gated_residual, grad)),
        }
        if grad != "same":
            fmt = grad.removeprefix("both-")
            cases["row quantiser"] = ("row_quant", _norm_inputs, part(_row_quant, fmt))
        for name, (op, inputs, compute) in cases.items():
            yield OpCase(
                f"{name}, text and image{said}",
                op,
                part(_inputs_of_parts, inputs),
                part(_with_parts, compute),
                plain=form == "same",
                only_triton=True,
            )
