"""The training run: `trainer.Trainer` is the loop, and `Trainer.train_step` one step of it.

`preflight` looks at everything that can be known first, `build` makes the parts of a run, `choose`
gathers what choices depend on. `objective` and `flow` are the loss, `optim` the optimisers, `state`
and `resume` the checkpoints, `events` what a run writes down, `validation` its images.
"""
