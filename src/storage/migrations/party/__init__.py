"""Revisions of a party's database."""
