"""What a database must contain before a role works with it: by its migrations, or straight from table definitions."""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import Connection, MetaData, inspect

from ..errors import StorageError


class Schema(Protocol):
    """How a database is made, upgraded and checked. Both methods run inside a transaction of the caller."""

    def prepare(self, connection: Connection) -> None:
        """Makes the tables of an empty database, or brings those of an older version up to date.

        Raises:
            StorageError: the database is of something else, or of a version that this software does not know.
        """

    def check(self, connection: Connection) -> None:
        """Changes nothing.

        Raises:
            StorageError: the database is not what `prepare` would leave.
        """


class FromMetadata:
    """The tables of `metadata` as they are, without a history: for a database that no later version will open."""

    def __init__(self, metadata: MetaData) -> None:
        self._metadata = metadata

    def prepare(self, connection: Connection) -> None:
        """As `Schema` says; one that has tables, but not all of these, is of something else."""
        if inspect(connection).get_table_names():
            self.check(connection)
        else:
            self._metadata.create_all(connection)

    def check(self, connection: Connection) -> None:
        """As `Schema` says."""
        if not set(self._metadata.tables) <= set(inspect(connection).get_table_names()):
            raise something_else()


def something_else() -> StorageError:
    """The refusal of a database that Sotto did not make."""
    return StorageError("this is a database of something else: its tables are not those that were expected")
