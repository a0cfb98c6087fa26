"""What `make.py` makes the examples with: their data, the runs, and pictures of the outcome."""
