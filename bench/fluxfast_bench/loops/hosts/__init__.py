"""One module a trainer: how its script is run on a tiny model. `CASES` has what can be trained."""
