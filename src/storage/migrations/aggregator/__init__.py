"""Revisions of the aggregator's database."""
