"""How many modular operations everything costs: the structure cannot silently get slower.

Seconds depend on the machine; products do not. Every number here becomes one that counts: a product, a reduction, an
exponentiation (by kind and exponent length), an inversion. What is converted, packed or hashed costs none.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np
import pytest

from src.encryption import integers, keys, paillier, paillier_scheme, threshold
from src.encryption.integers import Entropy
from src.encryption.keys import KeyShare, PrivateKey, PublicKey, ThresholdKey
from src.encryption.paillier import Comb, Encryptor, plan_comb
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.parallel import pieces
from src.encryption.scheme import Layout, LayoutRequest

SMALL = 1 << 64
"""Numbers below it are machine words: what is done to them is not what takes long."""
COUNT = 40
EXPONENT_BITS = 256
"""Half of the 512 bits of the test key."""


class Operations(Counter[str]):
    """By kind: `product`, `reduction`, `division` (with quotient), `power`, `secret power`, `bits` and `secret bits` of
    the exponents, `inversion`."""

    def taken(self, work: Callable[[], object]) -> Counter[str]:
        self.clear()
        work()
        return Counter(self)


OPERATIONS = Operations()


class Counted(int):
    """An integer whose arithmetic is counted, and gives integers that are counted again."""

    def __mul__(self, other: int) -> Counted:
        if abs(self) >= SMALL and abs(other) >= SMALL:
            OPERATIONS["product"] += 1
        return Counted(int(self) * int(other))

    __rmul__ = __mul__

    def __mod__(self, modulus: int) -> Counted:
        OPERATIONS["reduction"] += int(self) >= modulus
        return Counted(int(self) % int(modulus))

    def __rmod__(self, value: int) -> Counted:
        return Counted(value) % self

    def __add__(self, other: int) -> Counted:
        return Counted(int(self) + int(other))

    __radd__ = __add__

    def __sub__(self, other: int) -> Counted:
        return Counted(int(self) - int(other))

    def __floordiv__(self, other: int) -> Counted:
        OPERATIONS["division"] += 1
        return Counted(int(self) // int(other))

    def __pow__(self, exponent: int, modulus: int | None = None) -> Counted:  # type: ignore[override]
        return Counted(pow(int(self), int(exponent), modulus))


def counted_divmod(value: int, by: int) -> tuple[int, int]:
    OPERATIONS["division"] += 1
    quotient, rest = divmod(int(value), int(by))
    return Counted(quotient), Counted(rest)


def counted_power(base: int, exponent: int, modulus: int) -> int:
    OPERATIONS["power"] += 1
    OPERATIONS["bits"] += int(exponent).bit_length()
    return Counted(pow(int(base), int(exponent), int(modulus)))


def counted_secret_power(base: int, exponent: int, modulus: int) -> int:
    OPERATIONS["secret power"] += 1
    OPERATIONS["secret bits"] += int(exponent).bit_length()
    return Counted(pow(int(base), int(exponent), int(modulus)))


def counted_inversion(value: int, modulus: int) -> int:
    OPERATIONS["inversion"] += 1
    return Counted(pow(int(value), -1, int(modulus)))


def counted_split(block: bytes, width: int) -> list[int]:
    return [Counted(int.from_bytes(block[at : at + width], "big")) for at in range(0, len(block), width)]


def counted_join(values: Iterable[int], width: int) -> bytes:
    return b"".join(int(value).to_bytes(width, "big") for value in values)


COUNTING: dict[str, object] = {
    "mpz": Counted,
    "from_bytes": lambda data: Counted(int.from_bytes(data, "big")),
    "divmod_floor": counted_divmod,
    "powmod": counted_power,
    "powmod_sec": counted_secret_power,
    "invert": counted_inversion,
    "split": counted_split,
    "join": counted_join,
}
"""Every arithmetic name that the room takes from `integers`, the only module that knows gmpy2."""


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: tuple[ModuleType, ...] = (integers, keys, paillier, paillier_scheme, threshold)
    for module in modules:
        for name, replacement in COUNTING.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr(paillier, "_latest", [])
    OPERATIONS.clear()


@pytest.fixture
def key(dealt: tuple[ThresholdKey, list[KeyShare]]) -> ThresholdKey:
    """The session's key, made of numbers that count."""
    real = dealt[0]
    public = PublicKey(int(real.public.n), int(real.public.h), real.public.modulus_bits)
    return ThresholdKey(public, real.threshold, real.holders, int(real.v), tuple(map(int, real.verification)))


@pytest.fixture
def public(key: ThresholdKey) -> PublicKey:
    return key.public


@pytest.fixture
def share(shares: list[KeyShare]) -> KeyShare:
    return KeyShare(shares[0].index, int(shares[0].value), shares[0].key_id)


@pytest.fixture
def scheme(key: ThresholdKey) -> PaillierScheme:
    return PaillierScheme(key.public, key)


@pytest.fixture
def layout(scheme: PaillierScheme) -> Layout:
    layout = scheme.plan(LayoutRequest(parameter_count=COUNT * 39, value_bound=900, noise_bound=100, contributions=3))
    assert layout.ciphertext_count == COUNT
    return layout


@pytest.fixture
def body(scheme: PaillierScheme, layout: Layout, entropy: Entropy) -> bytes:
    return b"".join(scheme.protect(layout, [np.zeros(COUNT * 39, dtype=np.int64)], entropy=entropy))


def test_nothing_is_computed_that_is_not_counted(public: PublicKey) -> None:
    """The instrument itself: key and tables consist of numbers that count."""
    assert isinstance(public.n, Counted)
    assert isinstance(public.n_squared, Counted)
    taken = OPERATIONS.taken(lambda: public.h * public.n % public.n_squared)
    assert taken == {"product": 1, "reduction": 1}


@pytest.mark.parametrize("expected_count", [1, 40, 10_000])
def test_an_encryption_costs_what_its_comb_says_and_one_product_more(
    public: PublicKey, entropy: Entropy, expected_count: int
) -> None:
    """A product of pairs is 3 half-length products and 2 divisions, a squaring 2 and 2, both by n: never by n²."""
    encryptor = Encryptor(public, expected_count=expected_count, memory_limit_mb=2)
    comb = encryptor.comb
    plaintext = Counted(public.n - 5)
    squarings, products = comb.columns - 1, comb.tables * comb.columns
    taken = OPERATIONS.taken(lambda: encryptor.encrypt([plaintext] * 3, entropy=entropy))
    assert taken["product"] <= 3 * (3 * products + 2 * squarings + 2)
    assert taken["division"] + taken["reduction"] <= 3 * (2 * products + 2 * squarings + 1)
    assert taken["power"] == taken["secret power"] == taken["inversion"] == 0


@pytest.mark.parametrize(
    ("modulus_bits", "expected_count", "most"),
    [(2048, 9804, 86), (2048, 98_040, 86), (3072, 6579, 134), (3072, 65_790, 133), (2048, 10, 194)],
)
def test_products_of_an_encryption_for_a_model_of_a_million_and_of_ten(
    modulus_bits: int, expected_count: int, most: int
) -> None:
    """Fixed windows of eight bits take 128 at 2048 bits and 192 at 3072; square-and-multiply 1536 and 2304."""
    comb = plan_comb(
        modulus_bits // 2,
        expected_count=expected_count,
        entry_bytes=modulus_bits // 4 + paillier.ENTRY_OVERHEAD_BYTES,
        memory_limit_mb=paillier.MEMORY_LIMIT_MB,
    )
    assert comb.row_bits + comb.columns - 2 <= most


def test_tables_cost_a_squaring_a_bit_and_a_product_an_entry(public: PublicKey) -> None:
    made: list[Comb] = []
    taken = OPERATIONS.taken(lambda: made.append(Encryptor(public, expected_count=1000, memory_limit_mb=1).comb))
    (comb,) = made
    assert taken["product"] <= 3 * (EXPONENT_BITS + comb.entries)
    assert taken["power"] == taken["secret power"] == 0


def test_prepared_randomness_leaves_one_product_to_do(public: PublicKey, entropy: Entropy) -> None:
    encryptor = Encryptor(public, expected_count=10)
    factors = encryptor.factors(encryptor.draw(5, entropy=entropy))
    plaintexts = [Counted(public.n - 7)] * 5
    taken = OPERATIONS.taken(lambda: encryptor.blind(plaintexts, factors))
    assert taken["product"] == 5 * 2  # low · m, and n · (…), which is the same as a shift
    assert taken["reduction"] + taken["division"] == 5


@pytest.mark.parametrize("bodies", [1, 2, 3])
def test_a_fold_is_one_product_and_one_reduction_for_each_further_body(
    scheme: PaillierScheme, layout: Layout, body: bytes, bodies: int
) -> None:
    taken = OPERATIONS.taken(lambda: list(scheme.fold(layout, [io.BytesIO(body) for _ in range(bodies)])))
    assert taken == Counter({"product": COUNT * (bodies - 1), "reduction": COUNT * (bodies - 1)}) - Counter()


def test_a_check_is_one_product_for_a_ciphertext(scheme: PaillierScheme, layout: Layout, body: bytes) -> None:
    taken = OPERATIONS.taken(lambda: list(scheme.check(layout, [body])))
    assert taken["product"] <= COUNT
    assert taken["reduction"] <= COUNT
    assert taken["power"] == taken["inversion"] == 0


def test_the_key_owner_opens_with_two_powers_of_half_the_length(
    scheme: PaillierScheme, layout: Layout, body: bytes, primes: tuple[int, int], public: PublicKey
) -> None:
    private = PrivateKey(*primes, public)
    taken = OPERATIONS.taken(lambda: list(scheme.open_with_key(layout, private, [body])))
    assert taken["secret power"] == 2 * COUNT
    assert taken["secret bits"] <= 2 * COUNT * EXPONENT_BITS
    assert taken["power"] == taken["inversion"] == 0


def test_a_share_is_one_power_for_a_ciphertext_and_its_proof_a_few_for_the_batch(
    scheme: PaillierScheme, layout: Layout, body: bytes, key: ThresholdKey, share: KeyShare, entropy: Entropy
) -> None:
    taken = OPERATIONS.taken(lambda: scheme.open_share(layout, share, [body], binding=b"", entropy=entropy))
    assert taken["secret power"] == COUNT + 2
    exponent = (2 * key.delta * share.value).bit_length()
    assert taken["secret bits"] <= COUNT * exponent + 2 * (1024 + key.delta.bit_length() + 256 + 128 + 1)
    assert taken["inversion"] == 0
    # Weighing: for each ciphertext and each value, buckets instead of a power of 128 bits (some 150 products).
    assert taken["product"] <= COUNT * 2 * 45 + 2 * COUNT


def test_a_proof_costs_less_for_each_ciphertext_the_more_there_are(public: PublicKey) -> None:
    """Some 16–25 products a base with 128-bit weights."""

    def products(count: int) -> float:
        bases = [Counted(public.n + 2 * position) for position in range(count)]
        weights = [Counted(SMALL * SMALL // 3 + position) for position in range(count)]
        taken = OPERATIONS.taken(lambda: integers.multi_power(bases, weights, public.n_squared, exponent_bits=128))
        return (taken["product"] + taken["bits"]) / count

    few, many = products(50), products(2000)
    assert few <= 45
    assert many <= 25


def test_a_share_is_verified_with_a_handful_of_powers_however_many_ciphertexts_it_has(
    scheme: PaillierScheme, layout: Layout, body: bytes, share: KeyShare, entropy: Entropy
) -> None:
    batch = scheme.open_share(layout, share, [body], binding=b"", entropy=entropy)
    taken = OPERATIONS.taken(lambda: scheme.verify_share(layout, body, batch, index=1, binding=b""))
    windows = 2 * 128  # at most one shift a bit in each of the two products of powers
    assert taken["power"] <= 6 + windows
    assert taken["secret power"] == 0
    assert taken["inversion"] == 2
    assert taken["product"] <= COUNT * 2 * 45 + 2 * COUNT


def test_a_combination_is_one_short_power_for_a_share_and_one_inversion(
    scheme: PaillierScheme, layout: Layout, body: bytes, key: ThresholdKey, shares: list[KeyShare], entropy: Entropy
) -> None:
    batches = {
        share.index: scheme.open_share(
            layout, KeyShare(share.index, int(share.value), share.key_id), [body], binding=b"", entropy=entropy
        )
        for share in shares
    }
    taken = OPERATIONS.taken(lambda: list(scheme.combine(layout, body, batches)))
    assert taken["power"] == key.threshold * COUNT
    assert taken["bits"] <= key.threshold * COUNT * (2 * key.delta * 10).bit_length()
    assert taken["inversion"] == COUNT + len(pieces(COUNT, 1))
    assert taken["secret power"] == 0
