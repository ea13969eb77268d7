"""The sources of randomness: uniform, repeatable only where that is asked for, fresh after a fork, never shared."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from src.errors import InvalidInput
from src.privacy import entropy as module
from src.privacy.entropy import DeterministicEntropy, Entropy, SystemEntropy
from src.privacy.noise import discrete_gaussian
from src.privacy.sampling import poisson_sample

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(32))


@pytest.mark.parametrize("source", [SystemEntropy(), DeterministicEntropy(KEY, purpose="test")])
def test_token_and_words_have_the_size_asked_for(source: Entropy) -> None:
    assert source.token(0) == b""
    assert len(source.token(33)) == 33
    words = source.words(5)
    assert words.shape == (5,)
    assert words.dtype == np.uint64
    assert source.words(0).shape == (0,)
    with pytest.raises(InvalidInput):
        source.token(-1)
    with pytest.raises(InvalidInput):
        source.words(-1)


def test_a_deterministic_stream_repeats_and_differs_in_every_argument() -> None:
    def draw(**arguments: object) -> bytes:
        fields: dict[str, object] = {"purpose": "noise", "job": "j", "round_number": 1, "party": "a", **arguments}
        return DeterministicEntropy(KEY, **fields).words(4).tobytes()  # type: ignore[arg-type]

    streams = [draw(), draw(purpose="rounding"), draw(job="k"), draw(round_number=2), draw(party="b")]
    streams.append(draw(job="j1", round_number=1))
    assert draw() == streams[0]
    assert len(set(streams)) == len(streams)
    assert DeterministicEntropy(b"other", purpose="noise", job="j", round_number=1, party="a").words(
        4
    ).tobytes() not in (streams)
    with pytest.raises(InvalidInput):
        DeterministicEntropy(b"", purpose="noise")


def test_a_deterministic_stream_is_the_same_on_every_machine() -> None:
    """Known answer: HKDF-SHA256 and AES-256-CTR, words little-endian."""
    stream = DeterministicEntropy(KEY, purpose="noise", job="job-1", round_number=3, party="alice")
    assert stream.words(2).tolist() == [0xC32B9BE3A23A5D25, 0x158BFE4357901296]


def test_words_of_the_system_source_are_balanced_in_every_bit() -> None:
    bits = np.unpackbits(SystemEntropy().words(40_000).view(np.uint8)).reshape(-1, 64)
    # 64 bits, 40 000 draws each, standard deviation 0.0025: 7 of them fails once in 10^10 runs.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 7 * 0.0025


def test_two_sources_and_two_draws_differ() -> None:
    first, second = SystemEntropy(), SystemEntropy()
    draws = {source.words(4).tobytes() for source in (first, first, second)}
    assert len(draws) == 3


def test_every_thread_has_a_stream_of_its_own() -> None:
    source = SystemEntropy()
    seen: list[bytes] = [source.words(4).tobytes()]
    threads = [threading.Thread(target=lambda: seen.append(source.words(4).tobytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 5


def test_a_fork_takes_a_new_key() -> None:
    """Parent and child go on from the same state and must not draw the same words."""
    source = SystemEntropy()
    source.words(1)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the runner may have threads; the child execs nothing
        child = os.fork()
    if child == 0:
        os.write(writer, source.words(4).tobytes())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert len(theirs) == 32
    assert theirs != source.words(4).tobytes()


def in_a_fork(source: SystemEntropy, draw: str) -> bytes:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the runner may have threads; the child execs nothing
        child = os.fork()
    if child == 0:
        try:
            os.write(writer, drawn(source, draw))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    return theirs


def drawn(source: SystemEntropy, what: str) -> bytes:
    """Noise, or a Poisson sample, from `source`: 64 values are the same by chance with probability far below 2^-128."""
    if what == "noise":
        return discrete_gaussian(10**10, 64, entropy=source).tobytes()
    return np.resize(poisson_sample(4096, sampling_rate=0.5, entropy=source), 512).tobytes()


@pytest.mark.parametrize("what", ["noise", "samples"])
def test_workers_of_one_process_never_share_a_stream(what: str) -> None:
    """Four workers forked one after another from the same state, the parent before and after: all different."""
    source = SystemEntropy()
    source.words(1)
    seen = [in_a_fork(source, what) for _ in range(2)]
    seen.append(drawn(source, what))
    seen += [in_a_fork(source, what) for _ in range(2)]
    assert all(len(each) >= 512 for each in seen)
    assert len(set(seen)) == 5


def test_a_fork_of_a_fork_takes_a_new_key_too() -> None:
    source = SystemEntropy()
    source.words(1)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            os.write(writer, drawn(source, "noise"))
            if grandchild:
                os.waitpid(grandchild, 0)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert len(theirs) == 1024
    assert len({theirs[:512], theirs[512:], drawn(source, "noise")}) == 3


def test_a_restart_draws_other_noise_and_other_samples() -> None:
    """Three processes that do the same from the start, seeds set alike, agree in nothing that protects somebody."""
    code = (
        "import random, numpy as np; random.seed(1); np.random.seed(1)\n"
        "from src.privacy.entropy import SystemEntropy\n"
        "from src.privacy.noise import discrete_gaussian\n"
        "from src.privacy.sampling import poisson_sample\n"
        "source = SystemEntropy()\n"
        "print(discrete_gaussian(10**10, 8, entropy=source).tolist())\n"
        "print(poisson_sample(400, sampling_rate=0.5, entropy=source).tolist())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        for _ in range(3)
    ]
    for lines in zip(*runs, strict=True):
        assert len(set(lines)) == 3


def test_a_key_is_given_up_after_its_share_of_keystream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REKEY_BYTES", 64)
    asked: list[int] = []
    real = os.urandom

    def counting(size: int) -> bytes:
        asked.append(size)
        return real(size)

    monkeypatch.setattr(os, "urandom", counting)
    source = SystemEntropy()
    for _ in range(5):
        source.words(4)  # two fit into 64 bytes
    assert asked == [32, 32, 32]


def test_poisson_sampling_takes_each_row_with_its_rate() -> None:
    entropy = DeterministicEntropy(KEY, purpose="sampling")
    sizes = np.array([poisson_sample(2_000, sampling_rate=0.05, entropy=entropy).size for _ in range(400)])
    assert abs(sizes.mean() - 100) < 4 * np.sqrt(95 / 400)
    assert 0.7 < sizes.var() / 95 < 1.3
    rows = poisson_sample(2_000, sampling_rate=0.05, entropy=entropy)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert poisson_sample(7, sampling_rate=1.0, entropy=entropy).tolist() == list(range(7))
    assert poisson_sample(7, sampling_rate=0.0, entropy=entropy).size == 0
    assert poisson_sample(0, sampling_rate=0.5, entropy=entropy).size == 0


@pytest.mark.parametrize(("population", "rate"), [(-1, 0.5), (3, -0.1), (3, 1.1), (3, float("nan"))])
def test_poisson_sampling_refuses(population: int, rate: float) -> None:
    with pytest.raises(InvalidInput):
        poisson_sample(population, sampling_rate=rate, entropy=SystemEntropy())
