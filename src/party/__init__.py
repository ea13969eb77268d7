"""The party: a data owner's node. Outbound connections only; its own policy, ledger and memory of opened rounds."""
