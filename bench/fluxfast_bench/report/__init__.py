"""Results: how they are stored, compared with the targets, and shown."""
