"""What Sotto costs, measured: see bench.py."""
