"""Blinding factors: the same whoever computes them, in order, once, in one process alone."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from src.encryption import blinding, parallel
from src.encryption.blinding import Blinding
from src.encryption.integers import Entropy
from src.encryption.keys import KeyShare, PublicKey, ThresholdKey
from src.encryption.paillier import Encryptor
from src.encryption.paillier_scheme import PREPARING_PAYS, PaillierScheme
from src.encryption.scheme import Layout, LayoutRequest
from src.errors import StateError, WorkerError

COUNT = 200
VALUES = np.arange(COUNT * 39, dtype=np.int64) % 1000

Seeded = Callable[[bytes], Entropy]


@pytest.fixture(scope="module")
def encryptor(public: PublicKey) -> Encryptor:
    return Encryptor(public, expected_count=COUNT)


@pytest.fixture
def any_work_is_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SMALLEST_PART_PRODUCTS", 1)


def layout_of(scheme: PaillierScheme) -> Layout:
    request = LayoutRequest(parameter_count=VALUES.size, value_bound=900, noise_bound=100, contributions=3)
    layout = scheme.plan(request)
    assert layout.ciphertext_count == COUNT
    return layout


def protected(scheme: PaillierScheme, entropy: Entropy, *, prepare: bool = False) -> bytes:
    layout = layout_of(scheme)
    prepared = scheme.prepare(layout, entropy=entropy) if prepare else None
    return b"".join(scheme.protect(layout, [VALUES], entropy=entropy, prepared=prepared))


@pytest.mark.usefixtures("any_work_is_worth_a_process")
@pytest.mark.parametrize("window", [COUNT, 130, 64, 7])
def test_the_same_entropy_gives_the_same_batch_whoever_computes_it_and_when(
    public: PublicKey, seeded: Seeded, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, in three, ahead of time, and ahead of time but for what memory does not hold."""
    expected = protected(PaillierScheme(public), seeded(b"batch"))
    monkeypatch.setattr(blinding, "WINDOW", window)
    monkeypatch.setattr(blinding, "PREPARED_BYTES", window * public.ciphertext_bytes)
    assert protected(PaillierScheme(public, processes=3), seeded(b"batch")) == expected
    assert protected(PaillierScheme(public, processes=2), seeded(b"batch"), prepare=True) == expected
    assert protected(PaillierScheme(public), seeded(b"batch"), prepare=True) == expected
    assert psutil.Process().children() == []


def test_a_factor_is_h_to_its_exponent(encryptor: Encryptor, seeded: Seeded) -> None:
    n = encryptor.public.n
    with Blinding(encryptor, 3, entropy=seeded(b"few")) as factors:
        for low, high, exponent in factors.take(0, 3):
            power = pow(int(encryptor.public.h), int.from_bytes(exponent, "little"), int(n * n))
            assert low + high * n == power


def test_prepared_randomness_needs_no_more_entropy(public: PublicKey, entropy: Entropy) -> None:
    class Counting:
        drawn = 0

        def token(self, size: int) -> bytes:
            self.drawn += 1
            return entropy.token(size)

    scheme, source = PaillierScheme(public, processes=2), Counting()
    assert COUNT >= PREPARING_PAYS
    with scheme.prepare(layout_of(scheme), entropy=source) as prepared:
        assert source.drawn == COUNT
        list(scheme.protect(layout_of(scheme), [VALUES], entropy=source, prepared=prepared))
        assert source.drawn == COUNT


def asked_twice(factors: Blinding) -> object:
    factors.take(0, 10)
    return factors.take(5, 10)


def closed(factors: Blinding) -> object:
    factors.close()
    return factors.take(0, 1)


REFUSED: list[tuple[str, Callable[[Blinding], object], int]] = [
    ("asked for twice", asked_twice, 5),
    ("asked for twice at the end", lambda f: (f.take(0, COUNT), f.take(COUNT - 1, 1)), COUNT - 1),
    ("one is skipped", lambda f: f.take(1, 1), 1),
    ("more than there are", lambda f: f.take(0, COUNT + 1), COUNT),
    ("after the end", lambda f: (f.take(0, COUNT), f.take(COUNT, 1)), COUNT),
    ("after it was closed", closed, 0),
]


@pytest.mark.parametrize("ahead", [False, True], ids=["now", "ahead"])
@pytest.mark.parametrize(("use", "index"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_factor_is_refused_with_its_number(
    encryptor: Encryptor, entropy: Entropy, ahead: bool, use: Callable[[Blinding], object], index: int
) -> None:
    make = Blinding.ahead if ahead else Blinding
    with make(encryptor, COUNT, entropy=entropy, processes=2) as factors, pytest.raises(StateError) as caught:
        use(factors)
    assert caught.value.metadata["index"] == str(index)


def test_one_preparation_serves_one_batch(public: PublicKey, entropy: Entropy) -> None:
    for processes in (1, 2):
        scheme = PaillierScheme(public, processes=processes)
        layout = layout_of(scheme)
        with scheme.prepare(layout, entropy=entropy) as prepared:
            list(scheme.protect(layout, [VALUES], entropy=entropy, prepared=prepared))
            with pytest.raises(StateError, match="handed out already") as caught:
                list(scheme.protect(layout, [VALUES], entropy=entropy, prepared=prepared))
            assert caught.value.metadata["index"] == "0"


def test_a_preparation_for_another_key_is_refused(
    public: PublicKey, dealt_again: tuple[ThresholdKey, list[KeyShare]], entropy: Entropy
) -> None:
    scheme, other = PaillierScheme(public), PaillierScheme(dealt_again[0].public)
    with other.prepare(layout_of(other), entropy=entropy) as prepared, pytest.raises(StateError, match="another"):
        list(scheme.protect(layout_of(scheme), [VALUES], entropy=entropy, prepared=prepared))


def test_a_fork_does_not_inherit_factors(encryptor: Encryptor, entropy: Entropy) -> None:
    with Blinding.ahead(encryptor, COUNT, entropy=entropy, processes=2) as factors:
        pid = os.fork()
        if pid == 0:
            try:
                factors.take(0, 1)
            except StateError:
                factors.close()
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert len(factors.take(0, COUNT)) == COUNT


def test_factors_cannot_be_copied(encryptor: Encryptor, entropy: Entropy) -> None:
    with Blinding(encryptor, 1, entropy=entropy) as factors:
        for copier in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="used once"):
                copier(factors)


def test_a_preparation_that_dies_fails_its_batch_and_leaves_nothing(
    public: PublicKey, entropy: Entropy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encryptor, "factors", lambda _, __: signal.pause())
    scheme = PaillierScheme(public, processes=2)
    layout = layout_of(scheme)
    with scheme.prepare(layout, entropy=entropy) as prepared:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match="died"):
            list(scheme.protect(layout, [VALUES], entropy=entropy, prepared=prepared))
    assert psutil.Process().children() == []


def test_a_preparation_that_nobody_uses_leaves_nothing(public: PublicKey, entropy: Entropy) -> None:
    scheme = PaillierScheme(public, processes=2)
    before = psutil.Process().num_fds()
    with scheme.prepare(layout_of(scheme), entropy=entropy):
        assert len(psutil.Process().children()) == 2
    assert psutil.Process().children() == []
    assert psutil.Process().num_fds() == before


def test_a_batch_that_is_abandoned_leaves_nothing(
    public: PublicKey, entropy: Entropy, any_work_is_worth_a_process: None
) -> None:
    scheme = PaillierScheme(public, processes=2)
    blocks = scheme.protect(layout_of(scheme), [VALUES], entropy=entropy)
    next(blocks)
    assert len(psutil.Process().children()) == 2
    del blocks
    assert psutil.Process().children() == []


def test_a_small_batch_starts_no_process(public: PublicKey, entropy: Entropy) -> None:
    scheme = PaillierScheme(public, processes=2)
    request = LayoutRequest(parameter_count=39, value_bound=900, noise_bound=100, contributions=3)
    with scheme.prepare(scheme.plan(request), entropy=entropy):
        assert psutil.Process().children() == []
