"""What each way to train makes of a LoRA: the same task in every mode, over several seeds."""
