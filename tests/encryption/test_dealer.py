"""The dealer: shares of the right secret, and the rule that keeps two groups from opening two sums."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest

from src.encryption.dealer import check_threshold, deal, default_threshold, make_key_pair
from src.encryption.integers import Entropy, invert
from src.encryption.keys import KeyShare, ThresholdKey, check_kit
from src.errors import KeyMaterialError


def interpolate(points: dict[int, int], modulus: int) -> int:
    """The value at 0 of the polynomial through `points`, modulo `modulus`."""
    total = 0
    for i, value in points.items():
        for j in points:
            if j != i:
                value = value * j * invert(j - i, modulus) % modulus
        total += value
    return total % modulus


def test_any_threshold_of_shares_hold_d_and_fewer_do_not(
    key: ThresholdKey, shares: list[KeyShare], primes: tuple[int, int]
) -> None:
    """d ≡ 1 (mod n) and d ≡ 0 (mod p'q'), by interpolation with the primes at hand."""
    n, order = key.public.n, (primes[0] // 2) * (primes[1] // 2)
    for group in combinations(shares, key.threshold):
        secret = interpolate({share.index: share.value for share in group}, n * order)
        assert secret % n == 1
        assert secret % order == 0
    fewer = {interpolate({s.index: s.value for s in group}, n * order) for group in combinations(shares, 2)}
    assert len(fewer) == 10
    assert all(value % n != 1 and value % order != 0 for value in fewer)


@pytest.mark.parametrize(("threshold", "holders"), [(2, 2), (2, 3), (7, 7), (6, 11)])
def test_every_share_of_a_deal_matches_its_verification_key(
    threshold: int, holders: int, primes: tuple[int, int], seeded: Callable[[bytes], Entropy]
) -> None:
    key, shares = deal(*primes, threshold=threshold, holders=holders, entropy=seeded(b"kit"))
    assert [share.index for share in shares] == list(range(1, holders + 1))
    for share in shares:
        check_kit(key, share)


@pytest.mark.parametrize(
    ("threshold", "holders", "field"),
    [(1, 3, "threshold"), (0, 3, "threshold"), (4, 3, "threshold"), (2, 1, "holders")],
)
def test_deals_that_are_refused(
    threshold: int, holders: int, field: str, primes: tuple[int, int], entropy: Entropy
) -> None:
    with pytest.raises(KeyMaterialError) as caught:
        deal(*primes, threshold=threshold, holders=holders, entropy=entropy)
    assert caught.value.metadata["field"] == field


def test_primes_that_are_refused(primes: tuple[int, int], entropy: Entropy) -> None:
    p, q = primes
    for wrong in ((p, p), (p, q + 2), (p, 2**255 + 95), (p, 7), (p * q, q)):
        with pytest.raises(KeyMaterialError):
            deal(*wrong, threshold=2, holders=3, entropy=entropy)


def test_default_thresholds() -> None:
    assert [default_threshold(n) for n in (2, 3, 4, 5, 10, 20)] == [2, 2, 3, 3, 6, 11]


def test_the_rule_is_that_any_two_groups_share_an_honest_holder() -> None:
    """2·threshold > holders + colluders, against a search over all pairs of groups and all sets of colluders."""
    for holders in range(2, 6):
        for threshold in range(2, holders + 1):
            for colluders in range(holders):
                groups = [set(group) for group in combinations(range(holders), threshold)]
                corrupt_sets = [set(corrupt) for corrupt in combinations(range(holders), colluders)]
                sound = threshold > colluders and all(
                    (one & other) - corrupt for one in groups for other in groups for corrupt in corrupt_sets
                )
                quorum, parties = holders - 1, holders
                try:
                    check_threshold(threshold, holders, colluders=colluders, quorum=quorum, parties=parties)
                    accepted = True
                except KeyMaterialError:
                    accepted = False
                assert accepted == sound


@pytest.mark.parametrize(
    ("threshold", "holders", "colluders", "quorum", "parties"),
    [(2, 3, 0, 2, 3), (2, 3, 1, 3, 3), (3, 3, 1, 2, 3), (2, 4, 0, 4, 4), (6, 10, 1, 5, 10)],
)
def test_thresholds_that_are_accepted(threshold: int, holders: int, colluders: int, quorum: int, parties: int) -> None:
    check_threshold(threshold, holders, colluders=colluders, quorum=quorum, parties=parties)


@pytest.mark.parametrize(
    ("threshold", "holders", "colluders", "quorum", "parties", "said"),
    [
        (1, 1, 0, 1, 1, "between 2 and"),
        (1, 3, 0, 3, 3, "one holder"),
        (2, 4, 0, 3, 4, "2·threshold > holders"),
        (2, 3, 1, 2, 3, "2·threshold > holders"),
        (2, 3, 2, 3, 3, "hold alone"),
        (2, 3, -1, 2, 3, "colluders"),
        (2, 3, 3, 2, 3, "colluders"),
        (2, 3, 0, 0, 3, "quorum"),
        (2, 3, 0, 4, 3, "quorum"),
    ],
)
def test_thresholds_that_are_refused(
    threshold: int, holders: int, colluders: int, quorum: int, parties: int, said: str
) -> None:
    with pytest.raises(KeyMaterialError, match=said):
        check_threshold(threshold, holders, colluders=colluders, quorum=quorum, parties=parties)


def test_a_key_pair_is_made_at_the_length_asked_for_and_short_ones_only_on_request(entropy: Entropy) -> None:
    private = make_key_pair(512, entropy=entropy, insecure_small=True)
    assert private.public.modulus_bits == 512
    with pytest.raises(KeyMaterialError, match="too short"):
        make_key_pair(512, entropy=entropy)
