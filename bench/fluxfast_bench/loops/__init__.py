"""Other trainers' own scripts on tiny models, plain and accelerated: `fluxfast-bench loops`."""
