"""The demo: a toy world, a base that has learnt it, and what a LoRA teaches that base."""
