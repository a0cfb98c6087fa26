"""The command `fluxfast-train`: `main` chooses a command, each of which is a module of its own."""
