"""What both roles sign and check: canonical JSON, round plans, roots, rosters, transcripts. Pure."""
