"""Keys to and from python-paillier (`phe`), which is imported only here, and only when a key is converted.

Ciphertexts need no conversion: both sides hold them as integers in [1, n²). What one encrypted the other adds and
decrypts; `phe` draws r^n where DJN draws h^r, and neither shows in a decryption.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from .dealer import djn_base
from .integers import Entropy
from .keys import PrivateKey, PublicKey, check_modulus

if TYPE_CHECKING:
    from phe import PaillierPrivateKey, PaillierPublicKey


@overload
def to_phe(key: PublicKey) -> PaillierPublicKey: ...
@overload
def to_phe(key: PrivateKey) -> PaillierPrivateKey: ...
def to_phe(key: PublicKey | PrivateKey) -> PaillierPublicKey | PaillierPrivateKey:
    """The same modulus, or the same primes, as python-paillier holds them; h is left behind."""
    from phe import PaillierPrivateKey, PaillierPublicKey

    if isinstance(key, PublicKey):
        return PaillierPublicKey(int(key.n))
    return PaillierPrivateKey(PaillierPublicKey(int(key.public.n)), int(key.p), int(key.q))


def public_from_phe(key: PaillierPublicKey, *, entropy: Entropy) -> PublicKey:
    """The same modulus with a fresh h, and therefore with a new key id at each call.

    That n is a product of two primes that are 3 modulo 4, as DJN needs, only the owner of the primes can check.

    Raises:
        KeyMaterialError: a modulus that no such primes can have, or whose length is not whole 64-bit words.
    """
    n = key.n
    check_modulus(n, n.bit_length())
    return PublicKey(n, djn_base(n, entropy=entropy), n.bit_length())


def private_from_phe(key: PaillierPrivateKey, *, entropy: Entropy) -> PrivateKey:
    """The same primes, with a fresh h.

    Raises:
        KeyMaterialError: primes that DJN does not work with. `phe` draws any two primes: one pair in five is 3 modulo 4
            with gcd(p−1, q−1) = 2. A key meant for both is therefore made here and taken there by `to_phe`.
    """
    return PrivateKey(key.p, key.q, public_from_phe(key.public_key, entropy=entropy))
