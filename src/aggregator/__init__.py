"""The aggregator: the coordinator of a federation. It sees ciphertexts, and what `threshold` parties open."""
