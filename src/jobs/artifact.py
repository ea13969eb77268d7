"""A job's files on the scientist's disk: whole or not at all, and verified against what the aggregator signed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import DigestError, InvalidInput, SignatureError, SottoError, StorageError

if TYPE_CHECKING:
    from ..communication.generated.jobs_pb2 import ArtifactFile
    from ..protocol.roster import Roster

MANIFEST_FILE: Final = "manifest.json"
UNSIGNED: Final = "nobody signed"
"""In place of the order that a job rests on."""
EVALUATED: Final = "evaluated"
"""What only the manifest of an evaluation has: its job is about a model, and need not hand it out."""
OF_ROUND: Final = "of_round"
"""What only the manifest of a training has whose model is not the last of a job that came to its end."""
NOT_YET: Final = (
    "only a SUCCEEDED job has a result of its own; the model of a released round is had by its number, or last"
)
PART_SUFFIX: Final = ".part"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_READ_BYTES: Final = 1 << 20


class Partial:
    """One file on its way in. Until `keep` it lies under its name and ".part".

    Attributes:
        name: of the file; target: where it will lie.
        total: bytes of the whole.
        size: bytes that are there.
        resumed: whether some of them are from an earlier attempt.
    """

    def __init__(self, folder: Path, file: ArtifactFile) -> None:
        """Looks at what is on disk already.

        Raises:
            InvalidInput: the name is no plain file name: whoever sends it may not choose where it lands.
            StorageError: the directory cannot be used.
        """
        if not _NAME.fullmatch(file.name) or file.name.endswith(PART_SUFFIX):
            raise InvalidInput(f"an artifact's file has a name that is not a plain one: {file.name!r}")
        self.name = file.name
        self.target = folder / file.name
        self.total = file.bytes
        self._sha256 = bytes(file.sha256)
        self._part = folder / (file.name + PART_SUFFIX)
        with _storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            whole = self.target.is_file() and _hash(self.target).digest() == self._sha256
            self.path = self.target if whole else self._part
            if not whole:
                self._append(b"")
            self._hash = _hash(self.path)
            self.size = self.path.stat().st_size
        self.resumed = self.path is self._part and self.size > 0

    @property
    def complete(self) -> bool:
        """Whether nothing is missing (it may still be wrong: `verify`)."""
        return self.size >= self.total

    def write(self, data: bytes, *, offset: int) -> None:
        """Append a chunk.

        Raises:
            DigestError: it does not begin where the last one ended, or goes beyond the announced size.
        """
        if offset != self.size or self.size + len(data) > self.total:
            raise DigestError(f"{self.name}: {len(data)} bytes at {offset} do not follow {self.size} of {self.total}")
        with _storing(self._part):
            self._append(data)
        self._hash.update(data)
        self.size += len(data)

    def verify(self) -> None:
        """Raises DigestError when the bytes are not those announced; they are removed then."""
        if self.size != self.total or self._hash.digest() != self._sha256:
            self.discard()
            raise DigestError(f"{self.name} does not have the announced SHA-256", file=self.name)

    def restart(self) -> None:
        """Forget what is there."""
        self.discard()
        with _storing(self._part):
            self._append(b"")
        self._hash, self.size, self.resumed = hashlib.sha256(), 0, False

    def _append(self, data: bytes) -> None:
        """The directory may be anybody's: a link that lies where the part is to be is not followed."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self._part, flags, 0o666), "wb") as file:
            file.write(data)

    def discard(self) -> None:
        """Remove the part, never a file that was whole before."""
        with _storing(self._part):
            self._part.unlink(missing_ok=True)

    def keep(self) -> None:
        """Give the verified file its name."""
        if self.path is self._part:
            with _storing(self.target):
                with self._part.open("rb") as file:
                    os.fsync(file.fileno())
                self._part.replace(self.target)
            self.path = self.target


def keep(partials: Sequence[Partial], *, roster: Roster | None, job_id: str, number: int = 0) -> None:
    """Give complete files their names; with a roster only once the manifest vouches for the job and for each of them.

    Args:
        number: of the round that is meant; 0 where none is.

    Raises:
        InvalidInput, SignatureError, DigestError: as `verify_manifest`; the parts are removed then.
    """
    files = {partial.name: partial.path for partial in partials}
    try:
        if roster is not None:
            if MANIFEST_FILE not in files:
                raise SignatureError(f"job {job_id} has no manifest: nothing vouches for its files")
            statement = verify_manifest(files[MANIFEST_FILE], roster, files=files, job_id=job_id)
            if number and (said := statement.get(OF_ROUND, {}).get("round", number)) != number:
                raise SignatureError(f"the manifest is of round {said} of job {job_id}, not of {number}")
    except SottoError:
        for partial in partials:
            partial.discard()
        raise
    for partial in partials:
        partial.keep()


def verify_manifest(
    path: Path, roster: Roster, *, files: dict[str, Path] | None = None, job_id: str = ""
) -> dict[str, Any]:
    """What the aggregator of a federation signed about a job: a training, an export or an evaluation.

    Args:
        path: manifest.json: {"manifest": the signed statement, "readable": the same for the eye}.
        roster: pinned; its key of the aggregator is the one that counts.
        files: where the job's files lie, by name: the manifest has to vouch for all of them; by default the model that
            it names is looked for beside it.
        job_id: the job it has to be about, where that is known.

    Raises:
        InvalidInput: the file is not a manifest.
        SignatureError: it was not signed by this aggregator, is about another job, or its readable half says something
            else than the signed one; or the order in it is not its owner's.
        DigestError: the model is not there (that of an evaluation need not be), or a file is not the one that the
            manifest is about.
    """
    statement = _open_manifest(path, roster)
    if job_id and statement.get("job_id") != job_id:
        raise SignatureError(f"the manifest is of job {statement.get('job_id')}, not of {job_id}")
    _check_order(statement, roster)
    model = statement.get("model")
    model = model if isinstance(model, dict) else {}
    name, sha256 = str(model.get("file")), model.get("sha256")
    beside = path.parent / Path(name).name
    given = ({name: beside} if beside.is_file() else {}) if files is None else files
    for other in sorted(set(given) - {name, MANIFEST_FILE}):
        raise DigestError(f"the manifest does not vouch for {other}", file=other)
    if name in given:
        if _hash(given[name]).hexdigest() != sha256:
            raise DigestError(f"{name} is not the model that the manifest is about", file=name)
    elif EVALUATED not in statement:
        raise DigestError(f"the manifest is about {name}, which is not there")
    return statement


def _open_manifest(path: Path, roster: Roster) -> dict[str, Any]:
    """The statement in the file, once it is known to be the aggregator's."""
    from ..protocol.plan import MANIFEST_KIND
    from ..protocol.roster import AGGREGATOR
    from ..protocol.signing import Signed, open_signed

    try:
        content = json.loads(path.read_bytes())
        signed = Signed.from_json(content["manifest"])
        extra = set(content) - {"manifest", "readable"}
    except (OSError, ValueError, KeyError, TypeError, InvalidInput) as error:
        raise InvalidInput(f"{path.name} is not a manifest") from error
    if signed.signer != AGGREGATOR:
        raise SignatureError(f"the manifest is signed by {signed.signer!r}, not by the aggregator")
    statement = open_signed(signed, MANIFEST_KIND, verify_key=roster.aggregator_verify_key)
    if extra or content.get("readable", statement) != statement:
        raise SignatureError("the manifest's readable half is not what the aggregator signed")
    return statement


def _check_order(statement: dict[str, Any], roster: Roster) -> None:
    """That its owner asked for the job is the aggregator's word alone, where nobody signed. (Manifests had no order
    before there were any.)"""
    from ..protocol.order import open_order
    from ..protocol.roster import OPERATOR
    from ..protocol.signing import Signed
    from .orders import spec_of_order

    said = statement.get("order", UNSIGNED)
    if said == UNSIGNED:
        return
    order, _ = open_order(Signed.from_json(said), roster)
    if spec_of_order(order).digest != statement.get("spec_digest"):
        raise SignatureError(f"the manifest has an order of {order.scientist} for another job")
    role = OPERATOR if order.scientist == OPERATOR else "scientist"
    if (owner := statement.get("owner")) != f"{role}/{order.scientist}":
        raise SignatureError(f"the manifest has an order of {order.scientist}, and is of {owner}'s job")


def _hash(path: Path) -> Any:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
