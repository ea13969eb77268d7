"""Schemes by short name: the only way a name from a job or the wire becomes code."""

from __future__ import annotations

from typing import Final

from ..errors import ConfigError, KeyMaterialError
from .keys import PublicKey, ThresholdKey
from .paillier import MEMORY_LIMIT_MB
from .paillier_scheme import PaillierScheme
from .plaintext import PlaintextScheme
from .scheme import Scheme

SCHEME_NAMES: Final = (PaillierScheme.name, PlaintextScheme.name)


def scheme_for(
    name: str,
    public: PublicKey | None = None,
    *,
    threshold_key: ThresholdKey | None = None,
    expected_ciphertexts: int | None = None,
    memory_limit_mb: int = MEMORY_LIMIT_MB,
    processes: int = 1,
) -> Scheme:
    """The scheme called `name`.

    Args:
        name: one of `SCHEME_NAMES`.
        public: the public key, for schemes that have one; may be left out when `threshold_key` is given.
        threshold_key: the public values of the deal; None in custody `aggregator`. `plaintext` takes its counts.
        expected_ciphertexts, memory_limit_mb, processes: see `PaillierScheme`.

    Raises:
        ConfigError: no scheme of that name.
        KeyMaterialError: a key is missing, or two do not belong together.
    """
    if name == PlaintextScheme.name:
        if threshold_key is None:
            return PlaintextScheme()
        return PlaintextScheme(threshold_key.threshold, threshold_key.holders)
    if name != PaillierScheme.name:
        problem = f"scheme: {name!r} is not one of {', '.join(SCHEME_NAMES)}"
        raise ConfigError(problem, problems=(problem,))
    if public is None:
        if threshold_key is None:
            raise KeyMaterialError("public: this scheme needs a key", field="public")
        public = threshold_key.public
    return PaillierScheme(
        public,
        threshold_key,
        expected_ciphertexts=expected_ciphertexts,
        memory_limit_mb=memory_limit_mb,
        processes=processes,
    )
