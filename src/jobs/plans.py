"""What a round's plan is, once a job's specification and the noise are given: the one rule that both roles follow.

The aggregator finds the noise and plans (`aggregator.planning`); a party plans the same round again, from the
specification that a scientist signed, and compares (`party.orders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..encryption.dealer import check_threshold
from ..encryption.scheme import Scheme
from ..errors import InvalidInput, KeyMaterialError, PlanError
from ..privacy.clipping import PARTIES_PER_DEVIATION, AdaptiveClipping
from ..privacy.rounding import least_resolution_bits
from ..protocol.canonical import real
from ..protocol.derive import Derived, derive, derive_gradient_sum, example_multiplier
from ..protocol.plan import FEDSGD, GradientSum, LocalPlan, NormAdaptation, RoundPlan
from ..protocol.roster import Roster
from .spec import FederatedTrainingSpec

MIN_COHORT: Final = 2
"""A sum over one party is that party's update."""


@dataclass(frozen=True, slots=True)
class Model:
    """A global model in the blob store.

    Attributes:
        sha256, size: of its safetensors bytes.
        dimension: trainable parameters.
        not_trained: digest of all else that it has (`learning.model_file`); empty: nothing, or not known.
    """

    sha256: str
    size: int
    dimension: int
    not_trained: str = ""


def invited(spec: FederatedTrainingSpec, roster: Roster) -> tuple[tuple[str, ...], int]:
    """The cohort of a job, in the roster's order, and the updates that its rounds need.

    Raises:
        InvalidInput: a party that is not enrolled, or fewer than two.
        PlanError: a quorum under which a sum hides nobody, or two sums could be opened that differ by one party.
    """
    unknown = sorted(set(spec.parties) - set(roster.names))
    if unknown:
        raise InvalidInput(
            f"not enrolled in federation {roster.federation}: {', '.join(unknown)} (enrolled: "
            f"{', '.join(roster.names) or 'nobody yet'})",
            violations={"federated_training.parties": f"not enrolled: {', '.join(unknown)}"},
        )
    cohort = tuple(name for name in roster.names if not spec.parties or name in spec.parties)
    if len(cohort) < MIN_COHORT:
        raise InvalidInput(
            f"a federation needs at least {MIN_COHORT} parties; invited: {', '.join(cohort) or 'nobody'}"
        )
    quorum = spec.quorum or len(cohort)
    least = MIN_COHORT + roster.colluders
    if not least <= quorum <= len(cohort):
        raise PlanError(
            f"a quorum of {quorum} does not fit {len(cohort)} invited parties: at least {least}, so that a sum holds "
            f"{MIN_COHORT} honest updates beside those of {roster.colluders} colluders"
        )
    if roster.custody == "threshold":
        try:
            check_threshold(
                roster.threshold,
                len(roster.holders),
                colluders=roster.colluders,
                quorum=quorum,
                parties=len(cohort),
            )
        except KeyMaterialError as error:
            raise PlanError(f"this federation's keys do not allow a quorum of {quorum}: {error.message}") from error
    return cohort, quorum


@dataclass(frozen=True, slots=True)
class _Settings:
    """Of a round plan, what its strategy decides."""

    derived: Derived
    steps: int
    noise_multiplier: float
    clipping_norm: float
    resolution_bits: int
    gradient_sum: GradientSum | None = None
    adaptive_clipping: NormAdaptation | None = None


def round_plan(
    spec: FederatedTrainingSpec,
    *,
    job_id: str,
    number: int,
    model: Model,
    roster: Roster,
    scheme: Scheme,
    noise: float,
    declared_rows: Mapping[str, int],
    clipping_norm: float | None = None,
    order: str = "",
) -> RoundPlan:
    """Everything that a round fixes.

    Args:
        noise: the noise multiplier of DP-SGD (fedavg), or of the sum over what one example can change (fedsgd).
        declared_rows: of each party of the cohort; not read under fedavg.
        clipping_norm: under adaptive clipping what the last release left it at; by default the job's.
        order: digest of the order that the job rests on; empty: nobody signed for it.

    Raises:
        InvalidInput, PlanError: when no such round can be run; says why.
    """
    if scheme.name != spec.encryption.scheme:
        raise PlanError(f"the job asks for scheme {spec.encryption.scheme}, not for {scheme.name}", field="scheme")
    cohort, quorum = invited(spec, roster)
    if spec.strategy == FEDSGD:
        settings = _gradient_sum(spec, model, roster, scheme=scheme, noise=noise, declared_rows=declared_rows)
    else:
        settings = _update(spec, model, roster, scheme=scheme, noise=noise, clipping_norm=clipping_norm)
    return RoundPlan(
        federation=roster.federation,
        job_id=job_id,
        round=number,
        priced_rounds=spec.priced_rounds,
        spec_digest=spec.digest,
        task=spec.task,
        task_options=spec.task_options_text,
        seed=spec.seed,
        model_sha256=model.sha256,
        model_bytes=model.size,
        dimension=model.dimension,
        not_trained=model.not_trained,
        local=_local_plan(spec, settings),
        clipping_norm=real(settings.clipping_norm),
        resolution_bits=settings.resolution_bits,
        rounded_bound=settings.derived.rounded_bound,
        scheme=scheme.name,
        key_id=roster.key_id,
        layout=settings.derived.layout.to_json(),
        noise=settings.derived.noise,
        roster_digest=roster.digest,
        cohort=cohort,
        quorum=quorum,
        colluders=roster.colluders,
        threshold=roster.threshold,
        custody=roster.custody,
        gradient_sum=settings.gradient_sum,
        adaptive_clipping=settings.adaptive_clipping,
        order=order,
    )


def _local_plan(spec: FederatedTrainingSpec, settings: _Settings) -> LocalPlan:
    """What a party does with its rows: as the job asks, but for the steps and the noise."""
    local = spec.local_training
    return LocalPlan(
        steps=settings.steps,
        sampling_rate=real(local.sampling_rate),
        learning_rate=real(local.learning_rate),
        max_grad_norm=real(local.max_grad_norm),
        noise_multiplier=real(settings.noise_multiplier),
        delta=real(local.delta),
    )


def _update(
    spec: FederatedTrainingSpec,
    model: Model,
    roster: Roster,
    *,
    scheme: Scheme,
    noise: float,
    clipping_norm: float | None,
) -> _Settings:
    """fedavg: each party protects its rows itself, and the sum's noise protects the party."""
    privacy = spec.party_privacy
    cohort, quorum = invited(spec, roster)
    norm = clipping_norm or privacy.clipping_norm
    adaptive = _adaptation(spec, quorum)
    derived = derive(
        scheme,
        dimension=model.dimension,
        clipping_norm=norm,
        resolution_bits=spec.encryption.resolution_bits,
        noise_by=privacy.noise_by,
        noise_multiplier=privacy.noise_multiplier,
        delta=privacy.delta,
        cohort=len(cohort),
        quorum=quorum,
        colluders=roster.colluders,
        priced_rounds=spec.priced_rounds,
        adaptive=adaptive,
    )
    return _Settings(
        derived,
        steps=spec.local_training.steps,
        noise_multiplier=noise,
        clipping_norm=norm,
        resolution_bits=spec.encryption.resolution_bits,
        adaptive_clipping=_as_planned(adaptive, derived.bit_unit) if adaptive else None,
    )


def _adaptation(spec: FederatedTrainingSpec, quorum: int) -> AdaptiveClipping | None:
    given = spec.party_privacy.adaptive_clipping
    if given is None:
        return None
    smallest, largest = spec.party_privacy.norm_bounds
    return AdaptiveClipping(
        quantile=given.quantile,
        learning_rate=given.learning_rate,
        bit_deviation=quorum / PARTIES_PER_DEVIATION if given.bit_deviation is None else given.bit_deviation,
        smallest=smallest,
        largest=largest,
    )


def _as_planned(adaptive: AdaptiveClipping, bit_unit: int) -> NormAdaptation:
    return NormAdaptation(
        quantile=real(adaptive.quantile),
        learning_rate=real(adaptive.learning_rate),
        bit_deviation=real(adaptive.bit_deviation),
        smallest=real(adaptive.smallest),
        largest=real(adaptive.largest),
        bit_unit=bit_unit,
    )


def declared_of(spec: FederatedTrainingSpec, roster: Roster, declared_rows: Mapping[str, int]) -> dict[str, int]:
    """What each party of a fedsgd cohort declares; PlanError where one has not."""
    cohort, _ = invited(spec, roster)
    missing = [name for name in cohort if name not in declared_rows]
    if missing:
        raise PlanError(f"fedsgd needs the number of rows that each party declares: {', '.join(missing)} has not yet")
    return {name: declared_rows[name] for name in cohort}


def grid_of(spec: FederatedTrainingSpec, dimension: int) -> int:
    """f of fedsgd's resolution 2^-f: as fine as the job asks, or finer."""
    least = least_resolution_bits(spec.local_training.max_grad_norm, dimension=dimension)
    return max(spec.encryption.resolution_bits, least)


def _gradient_sum(
    spec: FederatedTrainingSpec,
    model: Model,
    roster: Roster,
    *,
    scheme: Scheme,
    noise: float,
    declared_rows: Mapping[str, int],
) -> _Settings:
    """fedsgd: the noise of one DP-SGD step, once for all parties."""
    local, privacy = spec.local_training, spec.party_privacy
    rows, resolution_bits = declared_of(spec, roster, declared_rows), grid_of(spec, model.dimension)
    derived = derive_gradient_sum(
        scheme,
        dimension=model.dimension,
        max_grad_norm=local.max_grad_norm,
        sampling_rate=local.sampling_rate,
        resolution_bits=resolution_bits,
        noise_by=privacy.noise_by,
        noise_multiplier=noise,
        delta=privacy.delta,
        declared_rows=rows,
        trusted_aggregator=spec.trusted_aggregator,
        quorum=invited(spec, roster)[1],
        colluders=roster.colluders,
        priced_rounds=spec.priced_rounds,
    )
    return _Settings(
        derived,
        steps=1,
        noise_multiplier=example_multiplier(derived.noise_plan),
        clipping_norm=derived.contribution_norm,
        resolution_bits=resolution_bits,
        gradient_sum=GradientSum(derived.cap, rows, spec.trusted_aggregator),
    )
