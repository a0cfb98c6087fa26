"""What a user can say: the run's config and the dataloader's, in SimpleTuner's format.

`run_fields` and `dataset_fields` have the options, `rules` what values do to each other,
`simpletuner` and `switches` what is known of SimpleTuner's other options. `flavours`, `optimizers`
and `adapters` are tables of what an option may name. torch is imported only when a dtype is asked
for, so that a mistake in a config is told at once.
"""
