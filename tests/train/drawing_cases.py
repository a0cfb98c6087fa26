"""The keys of a config that draws one small image at the ends of its run."""

DRAWS = {
    "validation_disable": False,
    "validation_step_interval": 0,
    "validation_prompt": "a red cup",
    "validation_resolution": "64x48",
    "validation_num_inference_steps": 1,
}
# and none with the base model
DRAWS_TRAINED = DRAWS | {"disable_benchmark": True}
