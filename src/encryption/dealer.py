"""The dealer: makes keys, hands out shares, keeps nothing (Damgård & Jurik 2001, section 4.1; Shoup 2000)."""

from __future__ import annotations

from ..errors import KeyMaterialError
from .integers import Entropy, invert, is_prime, mpz, powmod_sec, random_below, random_unit
from .keys import (
    DEFAULT_MODULUS_BITS,
    KeyShare,
    PrivateKey,
    PublicKey,
    ThresholdKey,
    check_counts,
    check_modulus_bits,
    check_primes,
    invalid,
)
from .primes import generate_primes


def default_threshold(holders: int) -> int:
    """max(2, ⌊holders/2⌋ + 1): two disjoint groups can never both open."""
    return max(2, holders // 2 + 1)


def check_threshold(threshold: int, holders: int, *, colluders: int, quorum: int, parties: int) -> None:
    """Refuse a threshold under which two disjoint groups could open two sums that differ by one party.

    Args:
        threshold: shares that an opening needs.
        holders: key shares that were dealt.
        colluders: corrupt holders that are tolerated, besides the aggregator; at least 0.
        quorum: updates that a round needs.
        parties: enrolled parties.

    Raises:
        KeyMaterialError: unless 2·threshold > holders + colluders or quorum = parties; a threshold of 1, or one that
            the colluders reach alone.
    """
    check_counts(threshold, holders)
    if not 0 <= colluders < holders:
        raise invalid("colluders", f"{colluders} is not between 0 and {holders - 1}")
    if not 1 <= quorum <= parties:
        raise invalid("quorum", f"{quorum} is not between 1 and the {parties} parties")
    if threshold <= colluders:
        raise invalid("threshold", f"{threshold} shares are what {colluders} colluders hold alone")
    if 2 * threshold <= holders + colluders and quorum != parties:
        rule = (
            f"2·threshold > holders + colluders or quorum = all parties is required: 2·{threshold} is not more than"
            f" {holders} + {colluders}, and the quorum is {quorum} of {parties}"
        )
        raise KeyMaterialError(rule, violations={"threshold": rule}, field="threshold")


def djn_base(n: int, *, entropy: Entropy) -> int:
    """A fresh h = (-x² mod n)^n mod n², x a random unit (Damgård, Jurik & Nielsen 2010, section 4.2)."""
    n = mpz(n)
    base = -(random_unit(entropy, n) ** 2) % n
    return powmod_sec(base, n, n * n)


def make_public_key(p: int, q: int, *, entropy: Entropy) -> PublicKey:
    """The public key of two primes, with a fresh h.

    Raises:
        KeyMaterialError: primes that DJN does not work with.
    """
    p, q = mpz(p), mpz(q)
    n = p * q
    modulus_bits = n.bit_length()
    check_primes(p, q, modulus_bits)
    return PublicKey(n, djn_base(n, entropy=entropy), modulus_bits)


def make_key_pair(
    modulus_bits: int = DEFAULT_MODULUS_BITS, *, entropy: Entropy, insecure_small: bool = False
) -> PrivateKey:
    """A fresh key pair for custody `aggregator`.

    Raises:
        KeyMaterialError: a modulus that `check_modulus_bits` refuses.
    """
    check_modulus_bits(modulus_bits, insecure_small=insecure_small)
    p, q = generate_primes(modulus_bits, entropy=entropy)
    return PrivateKey(p, q, make_public_key(p, q, entropy=entropy))


def deal(p: int, q: int, *, threshold: int, holders: int, entropy: Entropy) -> tuple[ThresholdKey, list[KeyShare]]:
    """Deal the decryption exponent of n = p·q to `holders` holders, any `threshold` of whom can open.

    With p = 2p' + 1, q = 2q' + 1 and m = p'·q': d ≡ 0 (mod m), d ≡ 1 (mod n); the shares are f(1) … f(holders) for a
    random polynomial f of degree threshold − 1 with f(0) = d, all modulo n·m; v is a random square, and
    v_i = v^(Δ·f(i)). Nothing is written anywhere: forget p and q.

    Args:
        p, q: distinct safe primes of the same length.
        threshold: 2 … holders; see `check_threshold` for what a federation needs besides.
        holders: number of shares.
        entropy: the source of h, the coefficients and v.

    Returns:
        the public values, and the shares in the order of their index (1 first). Every call is a new deal with a new
        key id, with the same primes too.

    Raises:
        KeyMaterialError: not safe primes, or counts that cannot be.
    """
    check_counts(threshold, holders)
    p, q = mpz(p), mpz(q)
    for name, prime in (("p", p), ("q", q)):
        if not is_prime(prime // 2):
            raise invalid(name, "not a safe prime")
    public = make_public_key(p, q, entropy=entropy)
    n, order = public.n, (p // 2) * (q // 2)
    modulus = n * order
    secret = order * invert(order, n)
    coefficients = [secret, *(random_below(entropy, modulus) for _ in range(threshold - 1))]
    shares = [KeyShare(i, _evaluate(coefficients, i, modulus), public.key_id) for i in range(1, holders + 1)]
    key = _commit(public, threshold, shares, entropy=entropy)
    return key, shares


def _evaluate(coefficients: list[int], at: int, modulus: int) -> int:
    value = mpz(0)
    for coefficient in reversed(coefficients):
        value = (value * at + coefficient) % modulus
    return value


def _commit(public: PublicKey, threshold: int, shares: list[KeyShare], *, entropy: Entropy) -> ThresholdKey:
    v = random_unit(entropy, public.n_squared) ** 2 % public.n_squared
    base = v
    for factor in range(2, len(shares) + 1):
        base = powmod_sec(base, factor, public.n_squared)  # v^Δ, Δ = holders!
    verification = tuple(powmod_sec(base, share.value, public.n_squared) for share in shares)
    return ThresholdKey(public, threshold, len(shares), v, verification)
