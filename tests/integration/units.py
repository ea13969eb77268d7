"""A round of a federation without processes: both roles' units of work, as a worker runs them, one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from src.aggregator.planning import Model
from src.encryption.dealer import deal
from src.encryption.keys import PrivateKey
from src.jobs.executors.units import WorkContext
from src.jobs.spec import FederatedTrainingSpec
from src.learning.flatten import flatten, from_safetensors, to_safetensors
from src.privacy.entropy import DeterministicEntropy
from src.protocol.canonical import canonical_bytes
from src.protocol.keyring import Keyring
from src.protocol.plan import RoundPlan
from src.protocol.roster import Member, Roster
from src.storage.blobs import Blobs

P: Final = 0xE3B9FF6586D70C163EC926DDEAD91F6B011B351FBF8CDA056459F50D3E9BA993
Q: Final = 0xFAAA49171DF29F6E64818C4F9C0526B6962FD595EF4A54FC599214270537BE5B
KEY: Final = deal(P, Q, threshold=2, holders=3, entropy=DeterministicEntropy(bytes(32), purpose="tests of units"))[0]
"""512 bits: protects nothing, and is long enough for every code path."""


class UnitsOfWork:
    """The aggregator has the key: what it opens needs no shares."""

    def __init__(self, directory: Path, spec: Mapping[str, Any], *, parties: Sequence[str]) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        (directory / "private.json").write_text(json.dumps(PrivateKey(P, Q, KEY.public).to_json()))
        self.context = WorkContext(Blobs(directory / "blobs"), directory)
        self.keyring = Keyring(KEY.public, None)
        self.spec = FederatedTrainingSpec.from_json(spec)
        self.roster = Roster(
            federation="demo",
            key_id=KEY.public.key_id,
            custody="aggregator",
            threshold=0,
            colluders=0,
            aggregator_verify_key=bytes(32),
            members=tuple(Member(name, bytes(32), 0) for name in parties),
            created_at="2026-01-01T00:00:00+00:00",
        )

    def store(self, tensors: Mapping[str, NDArray[Any]]) -> Model:
        """A model to begin with."""
        blob = self.context.blobs.write(to_safetensors(tensors))
        return Model(blob.sha256, blob.size, flatten(tensors)[1].size)

    def params(self, plan: RoundPlan) -> dict[str, Any]:
        """What every unit of a round is given."""
        text = canonical_bytes(plan.to_statement())
        return {
            "plan": text.decode(),
            "plan_digest": hashlib.sha256(text).hexdigest(),
            "public": json.dumps(self.keyring.to_json()),
        }

    def opening(
        self, aggregate: Mapping[str, Any], *, contributions: int, updates: Sequence[str], state: str = ""
    ) -> dict[str, Any]:
        """What `open_aggregate` is given besides."""
        optimizer = self.spec.server_optimizer
        return {
            "aggregate": aggregate["sha256"],
            "aggregate_root": aggregate["root"],
            "contributions": contributions,
            "updates": list(updates),
            "shares": [],
            "private_key": str(self.directory / "private.json"),
            "optimizer": {"kind": optimizer.name, "learning_rate": optimizer.learning_rate},
            "state_sha256": state,
        }

    def parameters(self, sha256: str) -> NDArray[Any]:
        """Of a stored model: float32."""
        return flatten(from_safetensors(self.context.blobs.read(sha256)))[0]
