"""Where units of CPU work run."""
