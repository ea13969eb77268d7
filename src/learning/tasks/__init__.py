"""Tasks that come with Sotto."""
