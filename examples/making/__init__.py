"""What `make.py` makes the examples with: their data, the runs, and the pictures of what came out."""
