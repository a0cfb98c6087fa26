"""Other trainers' own models and adapters, plain and accelerated: `fluxfast-bench trainers`."""
