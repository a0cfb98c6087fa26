"""What a step takes and how it fits: choices, the plan, and blocks that stream from host memory.

`choices.choose` makes every choice about how a run computes. `plan` adds up bytes and seconds,
`block_memory` measures a block without memory, `block_work` counts what it launches; from that and
from what a GPU sustains (`gpus`, `rates`), `step_time` predicts. `stream` moves blocks through a
ring on the device; `schedule` says what is copied when, `engine` copies.
"""
