"""Programs that change one thing for a trainer's script, such as its sizes, and then run it."""
