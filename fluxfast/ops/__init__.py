"""The fused ops: for each its maths in plain torch, kernels, and three ways to call it.

`<op>_ref(…)` is plain, differentiable torch in any dtype: the truth that everything else is tested
against.

`<op>(…, impl)` is the public op. It checks its arguments, chooses an implementation
(`dispatch.resolve`) and is differentiable. torch.compile sees custom ops in it (`registration`),
and no graph break.

The raw interface is for whoever chains ops in an autograd.Function of their own, as the
transformer's blocks do. It has every implementation, no checks and no autograd:

    out, saved = op.forward(*inputs, impl=impl)
    grads = op.backward(dout, saved, needs, impl=impl)

Here op is the module, and impl what `dispatch.resolve` returned, once for all ops ("triton",
"native" or "ref", not "auto"). `saved` is a tuple of tensors and Nones of fixed length, fit for
`ctx.save_for_backward`. `needs` says of each differentiable input whether its gradient is wanted,
in the inputs' order; `grads` answers in that order, None where it is not. `dout` is the gradient of
out. What backward can't read off its tensors is an argument again.

    module                 inputs                                  out         needs and grads
    gated_residual         x, gate, y                              tensor      x, gate, y
    gelu                   x                                       RowOutput   x
    modulated_layer_norm   x, scale, shift                         RowOutput   x, scale, shift
    qk_norm_rope           qkv, txt_qkv, weights, cos, sin, index  (q, k, v)   qkv, txt_qkv
    token_route            gather_forward, …: x, idx               tensor      x
                           scatter_forward, …: base, y, idx        tensor      base, y
    row_quant              x (forward only)                        Quantized

A gradient is written in the form that its reader wants. `gelu.backward_rows`,
`gated_residual.backward_rows` and `modulated_layer_norm.backward_residual` return a RowOutput, as
an 8-bit product reads it, and `qk_norm_rope.backward_rows` the values of both its gradients and the
codes of both in one tensor. `modulated_layer_norm.forward_residual` is a gated residual and the
norm after it in one pass. `linear.group`, which `linear.lora_linear` is made of, and `attention`
have shapes of their own: see there.

Where a function has `into=` (`dqkv=` in `qk_norm_rope`), it writes its values there, which may be a
slice of the columns of a wider buffer. Where it has `parts=`, one call takes the rows of a double
block's text and image (`parts`), and operands of which each has its own are pairs.

A RowOutput has values, codes of a row-quantised form, or both, as `out=` asks; the gradient is that
of the values, written or not. Inside `forward` of an autograd.Function torch records nothing;
elsewhere, call these under `torch.no_grad()`.
"""
