"""Whole training steps: times beside the peers, start-up, profile."""
