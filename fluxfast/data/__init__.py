"""From folders of images to batches of latents and embeddings.

Before the first step, `prepare` looks at every image (`survey` at all datasets, `scan` at one: size
in `buckets`, text in `captions`, pixels in `images`), and encodes what the caches lack (`encode`,
`encoders`, `t5`; the caches are `cache` and `cache_index`). It gives a `Prepared`, and a table of
what became of each dataset (`dataset_report`). While training, `sampler` chooses the samples of
each step and `batches` reads them ahead.

`inspection` is what `fluxfast-train data` shows instead of encoding: the same survey, `duplicates`,
`caption_lengths`, and a `contact_sheet` with its `lettering`.
"""
