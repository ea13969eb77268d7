"""What ends a party's node, and what it waits out.

Nothing that comes from outside ends it by itself. An error that the aggregator raised is its word: whatever the reason,
the aggregator counts as away. When it says something about this party, the party looks at itself: at the files of its
kit, its certificate, the chain of its ledger. What it finds there is lasting, and ends the node. So does an aggregator
that does not fit a kit which no aggregator ever accepted: the two do not belong together. Once the kit was accepted, a
misfit is the aggregator's, and the party waits for the right one.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy import Connection

from ..communication.generated import federation_pb2
from ..errors import (
    PASSING,
    ConfigError,
    ConflictError,
    DeadlineError,
    InvalidInput,
    KeyMaterialError,
    LedgerError,
    PolicyError,
    SignatureError,
    SottoError,
    StorageError,
    StorageFullError,
    TwinError,
    UnavailableError,
    VersionError,
    WorkerError,
    meaning,
)
from ..files import write_over
from ..storage.heads import Head
from .accounts import PartyAccounts
from .home import Home

LOG = logging.getLogger("sotto.party")

FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 10.0
LASTED_S: Final = 3.0
"""After a session of so long the next pause is a first one again: who comes and goes is not asked faster and faster."""
QUIET_S: Final = 1.0
"""An aggregator that is back within it, as after a restart, is not worth a line."""

TROUBLED: Final = (*PASSING, DeadlineError, StorageError, LedgerError, WorkerError)
"""What an aggregator raises that says only how the aggregator is. So does an error without a reason that is known."""

WAITED_OUT: Final = (*PASSING, TwinError)
"""What says nothing against this party, its kit or its ledger, and is not worth a line in the first moment: an
aggregator that is away, or has not yet noticed that the process before this one is gone."""

MISFITS: Final = (KeyMaterialError, PolicyError, SignatureError, VersionError)
"""What `Home.accept` finds: the aggregator is another one than this party's kit is for, or of another version."""

LASTING: Final = (ConfigError, ConflictError, LedgerError)
"""Found by the party itself, about itself: a kit or certificate that cannot be used, a database that another process
has taken, a ledger that is broken or was put back."""


class Ends(Exception):
    """Why a node ends: `error` is what the party found out itself."""

    def __init__(self, error: SottoError) -> None:
        super().__init__(str(error))
        self.error = error


def is_trouble(error: BaseException) -> bool:
    """Whether an error is the aggregator's own, so that the same is to be tried again: its disk, its workers, its being
    away. What the party found out itself never is."""
    return isinstance(error, SottoError) and error.remote and (isinstance(error, TROUBLED) or type(error) is SottoError)


def passes(error: BaseException) -> bool:
    """Whether the same is to be tried again: trouble of the aggregator's, or for a moment of this party's own disk or
    database, which is full or locked."""
    return is_trouble(error) or isinstance(error, StorageFullError | UnavailableError)


class Patience:
    """Growing pauses, never in step with those of others."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """All is well: the next trouble is a first one again."""
        self._pause_s = FIRST_PAUSE_S
        self._pauses = 0

    @property
    def first(self) -> bool:
        """Whether this is the first pause."""
        return self._pauses == 1

    def next_s(self) -> float:
        """How long to wait now: between half of a pause and one and a half, which doubles up to `LONGEST_PAUSE_S`."""
        pause_s = self._pause_s
        self._pauses += 1
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s * (0.5 + secrets.randbelow(1000) / 1000)


class Away:
    """An aggregator that cannot be worked with now: since when and why, each reason said once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._said: tuple[str, ...] | None = None
        self._found: SottoError | None = None

    def note(self, error: BaseException) -> bool:
        """Note why a session ended; whether that is another reason than before."""
        now = self._clock()
        if self._since is None:
            self._since = now
        key = _key(error)
        if self._said == key:
            return False
        if isinstance(error, WAITED_OUT) and self._said is None and now - self._since < QUIET_S:
            LOG.debug("waiting for the aggregator: %s", error)
            return False
        self._said = key
        LOG.log(_level(error), "%s", _words(error), exc_info=None if isinstance(error, SottoError) else error)
        return True

    def over(self) -> None:
        """It is there and takes this party."""
        if self._said is not None and self._since is not None:
            LOG.info("the aggregator is back after %.0f s", self._clock() - self._since)
        self._since = self._said = self._found = None

    @property
    def suspected(self) -> bool:
        """Whether the party found something about itself when it last looked."""
        return self._found is not None

    def lasts(self, error: SottoError | None) -> bool:
        """Whether what the party finds about itself now is lasting: found for the second time running. A file that is
        being replaced is wrong for a moment; a ledger never is."""
        before, self._found = self._found, error
        if error is None:
            return False
        return isinstance(error, LedgerError | ConflictError) or (before is not None and str(before) == str(error))


def _key(error: BaseException) -> tuple[str, ...]:
    """What makes it another reason: of an absence, not the words, which name ports and system errors."""
    reason = meaning(error).reason if isinstance(error, SottoError) else type(error).__name__
    return (reason,) if isinstance(error, WAITED_OUT) else (reason, str(error))


def _level(error: BaseException) -> int:
    if isinstance(error, StorageError) and not error.remote:
        return logging.ERROR
    if isinstance(error, PASSING):
        return logging.INFO
    mild = isinstance(error, TwinError) or (is_trouble(error) and not isinstance(error, LedgerError))
    return logging.WARNING if mild else logging.ERROR


def _words(error: BaseException) -> str:
    if not isinstance(error, SottoError):
        return f"the session with the aggregator failed ({type(error).__name__}); it is tried again"
    reason = meaning(error).reason
    if isinstance(error, TwinError):
        return f"no work is done by this process as long as {error.message} [{reason}]"
    if isinstance(error, LedgerError):
        return f"no work is done as long as the aggregator says so: {error.message} [{reason}]"
    if isinstance(error, StorageError) and not error.remote:
        return f"this party stays away as long as it cannot write: {error.message} [{reason}]"
    if isinstance(error, PASSING):
        return f"waiting for the aggregator: {error.message}"
    if is_trouble(error):
        return f"waiting for the aggregator, which is in trouble: {error.message} [{reason}]"
    if error.remote:
        return f"the aggregator does not take this party, which asks it again: {error.message} [{reason}]"
    if isinstance(error, (*MISFITS, InvalidInput)):
        return f"this aggregator cannot be worked with; it is asked again: {error.message} [{reason}]"
    return f"this party cannot work now, and tries again: {error.message} [{reason}]"


class Acceptance:
    """Whether this party, as it is, was ever accepted by an aggregator that fitted: kept in its state directory."""

    FILE: Final = "accepted.json"

    def __init__(self, home: Home) -> None:
        self._home = home
        self._path = home.config.state_dir / self.FILE

    @property
    def known(self) -> bool:
        """With this kit, these keys and this version of the protocol."""
        try:
            return bool(json.loads(self._path.read_text()) == self._home.fingerprint())
        except (OSError, ValueError):
            return False

    def note(self) -> None:
        """It was."""
        if self.known:
            return
        try:
            text = json.dumps(self._home.fingerprint(), indent=1, sort_keys=True) + "\n"
            write_over(self._path, text.encode(), secret=True)
        except OSError as error:  # then it is noted the next time
            LOG.warning("that this party was accepted cannot be noted: %s", error.strerror)

    def misfit(self, error: SottoError) -> SottoError | None:
        """What ends a node that was never accepted: a misfit that the party found itself in an answer, or in what a
        refusal says of the aggregator. None: it is waited out."""
        if self.known or not isinstance(error, MISFITS):
            return None
        if not error.remote:
            return error
        said = error.metadata
        mine = self._home.fingerprint()
        compared = ("protocol", "key_id", "roster_digest", "verify_key")
        another = any(mine[name] and said.get(name, mine[name]) != mine[name] for name in compared)
        return type(error)(error.message) if another else None


def check_told(
    connection: Connection, accounts: PartyAccounts, *, told: Sequence[Head], signed: Sequence[Head]
) -> None:
    """Fail unless this party's ledger had the heads that the aggregator remembers of it.

    Args:
        told: by the aggregator.
        signed: of these, what this party's own signed roots say.

    Raises:
        LedgerError: it lacks one. `remote` unless the party's own signature says that it had one which is gone: then
            it is the aggregator's word, for which no node ends, and on which no work is done either.
    """
    try:
        accounts.check_heads(connection, told)
    except LedgerError as error:
        try:
            accounts.check_heads(connection, signed)
        except LedgerError:
            raise error from None
        error.remote = True
        raise


def heartbeat_of(answer: federation_pb2.JoinResponse) -> float:
    """How often the aggregator shows that it is there, in seconds.

    Raises:
        InvalidInput: it is no interval that a stream could be watched by.
    """
    interval_s = float(answer.heartbeat_interval_s)
    if not LEAST_HEARTBEAT_S <= interval_s <= LONGEST_HEARTBEAT_S:  # a NaN is not either
        raise InvalidInput(f"a heartbeat every {interval_s:g} s is none")
    return interval_s


LEAST_HEARTBEAT_S: Final = 0.01
LONGEST_HEARTBEAT_S: Final = 300.0
"""As the aggregator's configuration allows (`server.heartbeat_interval_s`)."""
