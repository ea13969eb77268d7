"""One contract for every scheme: what goes in comes out summed, and nothing that does not fit gets through."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src.encryption.integers import Entropy
from src.encryption.keys import KeyShare, ThresholdKey
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.plaintext import PlaintextScheme
from src.encryption.scheme import Layout, LayoutRequest, Scheme, SystemEntropy
from src.errors import BatchError, CiphertextError, ShareError, SlotOverflowError, TooFewSharesError

Values = NDArray[np.int64]
BINDING = b"job, round 3, party-a, plan"


@dataclass(frozen=True)
class Case:
    """A scheme with its shares."""

    scheme: Scheme
    shares: list[KeyShare]
    threshold: int
    entropy: Entropy

    def protect(self, layout: Layout, *blocks: Values) -> bytes:
        return b"".join(self.scheme.protect(layout, blocks, entropy=self.entropy))

    def fold(self, layout: Layout, bodies: list[bytes]) -> bytes:
        return b"".join(self.scheme.fold(layout, [io.BytesIO(body) for body in bodies]))

    def open(self, layout: Layout, aggregate: bytes, holders: tuple[int, ...] = (5, 1, 3)) -> Iterator[bytes]:
        material = b"".join(self.scheme.opening_material(layout, io.BytesIO(aggregate)))
        batches = {}
        for index in holders:
            batches[index] = self.share(layout, material, index)
            self.scheme.verify_share(layout, material, batches[index], index=index, binding=BINDING)
        return self.scheme.combine(layout, material, batches)

    def share(self, layout: Layout, material: bytes, index: int, *, binding: bytes = BINDING) -> bytes:
        share = self.shares[index - 1]
        return self.scheme.open_share(layout, share, [material], binding=binding, entropy=self.entropy)

    def sum(self, layout: Layout, vectors: list[Values]) -> Values:
        aggregate = self.fold(layout, [self.protect(layout, vector) for vector in vectors])
        opened = self.open(layout, aggregate)
        return np.concatenate(list(self.scheme.decode(layout, opened, contributions=len(vectors))))


@pytest.fixture(scope="module", params=["paillier", "plaintext"])
def case(request: pytest.FixtureRequest, key: ThresholdKey, shares: list[KeyShare], entropy: Entropy) -> Case:
    if request.param == "plaintext":
        plain = PlaintextScheme(3, 5)
        return Case(plain, plain.deal(), 3, entropy)
    return Case(PaillierScheme(key.public, key), shares, key.threshold, entropy)


def plan(case: Case, parameter_count: int = 60, *, bound: int = 1000, contributions: int = 4) -> Layout:
    return case.scheme.plan(
        LayoutRequest(
            parameter_count=parameter_count, value_bound=bound, noise_bound=bound // 10, contributions=contributions
        )
    )


@settings(deadline=None, max_examples=25)
@given(data=st.data(), bound=st.integers(1, 2**45), parties=st.integers(1, 6), parameter_count=st.integers(1, 90))
def test_the_decoded_sum_is_the_exact_sum_of_the_weighted_updates_and_noise(
    case: Case, data: st.DataObject, bound: int, parties: int, parameter_count: int
) -> None:
    weights = data.draw(st.lists(st.integers(1, 5), min_size=parties, max_size=parties))
    noise_bound = data.draw(st.integers(0, bound))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    request = LayoutRequest(
        parameter_count=parameter_count,
        value_bound=bound * max(weights),
        noise_bound=noise_bound,
        contributions=parties + 1,
    )
    layout = case.scheme.plan(request)
    vectors = [
        weight * rng.integers(-bound, bound + 1, parameter_count)
        + rng.integers(-noise_bound, noise_bound + 1, parameter_count)
        for weight in weights
    ]
    vectors.append(rng.integers(-noise_bound, noise_bound + 1, parameter_count))
    expected = [sum(int(vector[j]) for vector in vectors) for j in range(parameter_count)]
    assert case.sum(layout, vectors).tolist() == expected


def test_no_sum_inside_the_planned_bounds_overflows(case: Case) -> None:
    layout = plan(case, contributions=4)
    for signs in ((1, 1, 1, 1), (-1, -1, -1, -1), (1, -1, 1, -1), (1,)):
        vectors = [np.full(60, sign * layout.offset) for sign in signs]
        assert set(case.sum(layout, vectors).tolist()) == {sum(signs) * layout.offset}


def test_a_sum_of_more_contributions_than_are_said_is_detected(case: Case) -> None:
    layout = plan(case)
    values = np.zeros(60, dtype=np.int64)
    values[17] = layout.offset
    opened = list(case.open(layout, case.fold(layout, [case.protect(layout, values)] * 2)))
    with pytest.raises(SlotOverflowError) as caught:
        list(case.scheme.decode(layout, opened, contributions=1))
    assert caught.value.metadata["index"] == "17"


def test_an_update_beyond_its_bound_is_refused_with_its_position(case: Case) -> None:
    layout = plan(case, 3000)
    for index in (0, 59, 2999):
        for beyond in (layout.offset + 1, -layout.offset - 1, -(2**63)):
            values = np.zeros(3000, dtype=np.int64)
            values[index] = beyond
            with pytest.raises(SlotOverflowError) as caught:
                case.protect(layout, values)
            assert caught.value.metadata["index"] == str(index)


def test_any_threshold_of_shares_open_the_same_and_fewer_open_nothing(case: Case) -> None:
    layout = plan(case)
    values = np.arange(-30, 30, dtype=np.int64)
    aggregate = case.protect(layout, values)
    for group in combinations(range(1, 6), case.threshold):
        opened = case.open(layout, aggregate, group)
        assert np.concatenate(list(case.scheme.decode(layout, opened, contributions=1))).tolist() == values.tolist()
    for group in combinations(range(1, 6), case.threshold - 1):
        with pytest.raises(TooFewSharesError):
            list(case.open(layout, aggregate, group))


def test_a_wrong_share_is_named(case: Case) -> None:
    layout = plan(case)
    material = case.protect(layout, np.zeros(60, dtype=np.int64))
    good = case.share(layout, material, 2)
    for position in (0, 5, len(good) // 2, len(good) - 1):
        bad = good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :]
        with pytest.raises(ShareError) as caught:
            case.scheme.verify_share(layout, material, bad, index=2, binding=BINDING)
        assert caught.value.metadata["index"] == "2"
    for bad in (b"", good[:-1], good + b"\x00"):
        with pytest.raises(ShareError):
            case.scheme.verify_share(layout, material, bad, index=2, binding=BINDING)


BINDINGS: list[tuple[str, bytes]] = [
    ("another job", b"job2, round 3, party-a, plan"),
    ("another round", b"job, round 4, party-a, plan"),
    ("another party", b"job, round 3, party-b, plan"),
    ("another plan", b"job, round 3, party-a, another plan"),
    ("nothing", b""),
]


@pytest.mark.parametrize("binding", [row[1] for row in BINDINGS], ids=[row[0] for row in BINDINGS])
def test_a_share_is_bound_to_its_round(case: Case, binding: bytes) -> None:
    layout = plan(case)
    material = case.protect(layout, np.zeros(60, dtype=np.int64))
    share = case.share(layout, material, 1)
    with pytest.raises(ShareError):
        case.scheme.verify_share(layout, material, share, index=1, binding=binding)


def test_a_share_is_bound_to_its_holder_and_material(case: Case) -> None:
    layout = plan(case)
    material = case.protect(layout, np.zeros(60, dtype=np.int64))
    other = case.protect(layout, np.ones(60, dtype=np.int64))
    share = case.share(layout, material, 1)
    for index, at in ((2, material), (1, other), (0, material), (6, material)):
        with pytest.raises(ShareError):
            case.scheme.verify_share(layout, at, share, index=index, binding=BINDING)


def test_how_values_are_cut_into_blocks_does_not_matter(case: Case) -> None:
    layout = plan(case, 500)
    values = np.arange(-250, 250, dtype=np.int64)
    for cuts in ([1], [250], [0, 3, 3, 499], list(range(1, 500, 7))):
        body = case.protect(layout, *np.split(values, cuts))
        assert len(body) == layout.body_bytes
        decoded = case.scheme.decode(layout, case.open(layout, body), contributions=1)
        assert np.concatenate(list(decoded)).tolist() == values.tolist()


def test_parts_of_a_layout_make_the_whole(case: Case) -> None:
    """What workers protect and fold side by side is the batch of one."""
    layout = plan(case, 500)
    values = np.arange(-250, 250, dtype=np.int64)
    half = layout.ciphertext_count // 2
    first, second = layout.part(0, half), layout.part(half, layout.ciphertext_count - half)
    assert first.parameter_count + second.parameter_count == 500
    cut = first.parameter_count
    body = case.protect(first, values[:cut]) + case.protect(second, values[cut:])
    at = first.body_bytes
    aggregate = case.fold(first, [body[:at]] * 2) + case.fold(second, [body[at:]] * 2)
    assert aggregate == case.fold(layout, [body, body])
    decoded = case.scheme.decode(layout, case.open(layout, aggregate), contributions=2)
    assert np.concatenate(list(decoded)).tolist() == (2 * values).tolist()


@pytest.mark.parametrize("count", [59, 61, 0])
def test_a_wrong_number_of_values_is_refused(case: Case, count: int) -> None:
    with pytest.raises(BatchError) as caught:
        case.protect(plan(case), np.zeros(count, dtype=np.int64))
    assert caught.value.metadata["field"] == "parameter_count"


def several_blocks(case: Case) -> tuple[Layout, list[bytes]]:
    """A batch of zeros that fills two blocks and a half."""
    small = plan(case)
    layout = plan(case, small.block_ciphertexts * small.slots_per_ciphertext * 5 // 2)
    zeros = np.zeros(layout.parameter_count, dtype=np.int64)
    return layout, list(case.scheme.protect(layout, [zeros], entropy=case.entropy))


def test_checking_passes_the_blocks_through_unchanged(case: Case) -> None:
    layout, blocks = several_blocks(case)
    assert len(blocks) == 3
    assert list(case.scheme.check(layout, blocks)) == blocks


def test_what_is_no_ciphertext_is_refused_with_its_position_in_the_batch(case: Case) -> None:
    layout, blocks = several_blocks(case)
    width = layout.ciphertext_bytes
    wrong = b"\xff" * width
    blocks[1] = blocks[1][: 6 * width] + wrong + blocks[1][7 * width :]
    checked = case.scheme.check(layout, blocks)
    assert next(checked) == blocks[0]
    with pytest.raises(CiphertextError) as caught:
        next(checked)
    assert caught.value.metadata["index"] == str(layout.block_ciphertexts + 6)


@pytest.mark.parametrize(
    "change",
    [lambda body: body[:-1], lambda body: body[:-8], lambda body: body + b"\x00", lambda body: body * 2, lambda _: b""],
    ids=["a byte short", "8 bytes short", "a byte long", "twice", "empty"],
)
def test_bodies_of_another_length_are_refused_everywhere(case: Case, change: Callable[[bytes], bytes]) -> None:
    layout = plan(case)
    good = case.protect(layout, np.zeros(60, dtype=np.int64))
    bad = change(good)
    scheme = case.scheme
    uses: list[Callable[[], object]] = [
        lambda: list(scheme.check(layout, [bad])),
        lambda: case.fold(layout, [bad]),
        lambda: list(scheme.opening_material(layout, io.BytesIO(bad))),
        lambda: case.share(layout, bad, 1),
        lambda: list(scheme.decode(layout, [bad], contributions=1)),
    ]
    for use in uses:
        with pytest.raises(BatchError):
            use()
    with pytest.raises(BatchError) as caught:
        case.fold(layout, [good, bad])
    assert caught.value.metadata["body"] == "1"


def test_as_many_contributions_as_planned_are_summed_and_no_more(case: Case) -> None:
    layout = plan(case, contributions=3)
    body = case.protect(layout, np.zeros(60, dtype=np.int64))
    for count in (0, 4):
        with pytest.raises(BatchError) as caught:
            case.fold(layout, [body] * count)
        assert caught.value.metadata["field"] == "contributions"
        with pytest.raises(BatchError):
            list(case.scheme.decode(layout, case.open(layout, body), contributions=count))


class Watched(io.BytesIO):
    """Counts what is read, and the largest read."""

    total = 0
    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.total += len(data)
        self.largest = max(self.largest, len(data))
        return data


def test_folding_reads_block_by_block(case: Case) -> None:
    """After the first block of the aggregate no body has been read further than a block."""
    layout, blocks = several_blocks(case)
    body = b"".join(blocks)
    streams = [Watched(body) for _ in range(3)]
    folded = case.scheme.fold(layout, streams)
    block = len(next(folded))
    assert block == len(blocks[0]) < len(body) / 2
    assert [stream.total for stream in streams] == [block] * 3
    rest = list(folded)
    assert block + sum(map(len, rest)) == len(body)
    assert {stream.largest for stream in streams} == {block}


LAYOUT_CHANGES: list[tuple[str, dict[str, object]]] = [
    ("scheme", {"scheme": "masked"}),
    ("key_id", {"key_id": "f" * 32}),
    ("modulus_bits", {"modulus_bits": 1024}),
    ("ciphertext_bytes", {"ciphertext_bytes": 100}),
]


@pytest.mark.parametrize(("field", "change"), LAYOUT_CHANGES, ids=[row[0] for row in LAYOUT_CHANGES])
def test_a_layout_of_another_scheme_or_key_is_refused_everywhere(
    case: Case, field: str, change: dict[str, object]
) -> None:
    layout = plan(case)
    body = case.protect(layout, np.zeros(60, dtype=np.int64))
    other = replace(layout, **change)  # type: ignore[arg-type]
    share = case.share(layout, body, 1)
    scheme = case.scheme
    uses: list[Callable[[], object]] = [
        lambda: case.protect(other, np.zeros(60, dtype=np.int64)),
        lambda: list(scheme.check(other, [body])),
        lambda: case.fold(other, [body]),
        lambda: list(scheme.opening_material(other, io.BytesIO(body))),
        lambda: case.share(other, body, 1),
        lambda: scheme.verify_share(other, body, share, index=1, binding=BINDING),
        lambda: list(scheme.combine(other, body, dict.fromkeys((1, 2, 3), share))),
        lambda: list(scheme.decode(other, [body], contributions=1)),
    ]
    for use in uses:
        with pytest.raises(BatchError) as caught:
            use()
        assert caught.value.metadata["field"] == field


def test_a_layout_too_wide_for_a_slot_is_refused_at_planning(case: Case) -> None:
    with pytest.raises(SlotOverflowError):
        plan(case, bound=2**60)


def test_the_operating_system_is_a_source_of_entropy(case: Case) -> None:
    layout = plan(case)
    source = SystemEntropy()
    assert len(source.token(33)) == 33
    assert source.token(16) != source.token(16)
    assert len(b"".join(case.scheme.protect(layout, [np.zeros(60, dtype=np.int64)], entropy=source))) > 0
