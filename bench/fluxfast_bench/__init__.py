"""What `fluxfast-bench` measures; nothing that trains imports it."""
