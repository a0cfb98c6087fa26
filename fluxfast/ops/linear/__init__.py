"""Matrix products with frozen weights and the adapters on them.

`group.LinearGroup` is the maths of linears that read the same input, forward and backward;
`weights` gets their weights ready, `products_torch`, `products_triton` and `products_native`
compute the products, `adapters` says what an adapter is, and `lora_linear` is the public,
differentiable op.
"""
