"""Where the database of a role's configuration is."""

from __future__ import annotations

from .config import AggregatorConfig, PartyConfig
from .storage.location import Location, database_location


def located(config: AggregatorConfig | PartyConfig) -> Location:
    """What `storage.database.Database` takes. Raises ConfigError as `database_location`."""
    section = config.database
    return database_location(
        config.database_path,
        section.url,
        section.password_file,
        insecure_transport=section.insecure_transport,
    )
