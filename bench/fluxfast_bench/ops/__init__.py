"""Single ops: times, errors, ceilings, tiles."""
