"""Clipping, rounding, noise, accounting and the rules of the ledger: pure; it knows only `errors`."""
