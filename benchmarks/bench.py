"""`make bench`: what Sotto's pieces cost, side by side with a peer in the same run, written to build/bench.json.

Times are medians of CPU time on one core. Absolute figures differ from machine to machine; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.encryption.dealer import deal
from src.encryption.primes import generate_safe_primes
from src.encryption.scheme import LayoutRequest, SystemEntropy
from src.privacy.entropy import SystemEntropy as NoiseEntropy
from src.privacy.noise import discrete_gaussian
from src.protocol.keyring import Keyring

Figures = dict[str, float]

PARAMETERS = 50_000
"""Enough ciphertexts for a steady median (some 490 of 2048 bits), few enough for a short run."""
VALUE_BOUND = 2**15
PARTIES = 16
PHE_SLICE = 20
REPEATS = 3


def seconds(work: Callable[[], object], *, repeats: int = REPEATS) -> float:
    """Median CPU time of `work`."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def encryption(bits: int) -> Figures:
    """Protect, add, open by shares: per parameter, beside python-paillier on a slice."""
    entropy = SystemEntropy()
    primes = generate_safe_primes(bits, entropy=entropy)
    key, shares = deal(*primes, threshold=2, holders=3, entropy=entropy)
    scheme = Keyring(key.public, key).scheme("paillier", expected_ciphertexts=10_000)
    request = LayoutRequest(
        parameter_count=PARAMETERS, value_bound=VALUE_BOUND - 1, noise_bound=0, contributions=PARTIES
    )
    layout = scheme.plan(request)
    values = np.random.default_rng(0).integers(-VALUE_BOUND + 1, VALUE_BOUND, PARAMETERS)
    body = b"".join(scheme.protect(layout, [values], entropy=entropy))  # makes the tables
    protect = seconds(lambda: b"".join(scheme.protect(layout, [values], entropy=entropy)))
    fold = seconds(lambda: b"".join(scheme.fold(layout, [BytesIO(body), BytesIO(body)])))
    aggregate = b"".join(scheme.fold(layout, [BytesIO(body), BytesIO(body)]))
    part = layout.part(0, 50)
    material = aggregate[: part.body_bytes]
    share = seconds(
        lambda: scheme.open_share(part, shares[0], [material], binding=b"bench", entropy=entropy), repeats=1
    )
    batches = {s.index: scheme.open_share(part, s, [material], binding=b"bench", entropy=entropy) for s in shares[:2]}
    combine = seconds(lambda: b"".join(scheme.combine(part, material, batches)))
    figures = {
        f"encrypt_{bits}_us": protect / PARAMETERS * 1e6,
        f"add_{bits}_us": fold / PARAMETERS * 1e6,
        f"share_{bits}_us": share / part.parameter_count * 1e6,
        f"combine_{bits}_us": combine / part.parameter_count * 1e6,
        f"slot_bits_{bits}": layout.slot_bits,
        f"bytes_per_parameter_{bits}": layout.body_bytes / PARAMETERS,
    }
    return figures | against_phe(bits, primes, figures)


def against_phe(bits: int, primes: tuple[int, int], figures: Figures) -> Figures:
    """The same with python-paillier, a ciphertext a parameter, measured on a slice."""
    try:
        from phe import paillier
    except ImportError:
        print("phe is not installed: skipped", file=sys.stderr)
        return {}
    p, q = (int(prime) for prime in primes)
    public = paillier.PaillierPublicKey(p * q)
    encrypt = seconds(lambda: [public.raw_encrypt(7) for _ in range(PHE_SLICE)]) / PHE_SLICE * 1e6
    one, two = public.encrypt(3), public.encrypt(4)
    add = seconds(lambda: [(one + two).ciphertext(be_secure=False) for _ in range(1000)]) / 1000 * 1e6
    return {
        f"phe_encrypt_{bits}_us": encrypt,
        f"phe_add_{bits}_us": add,
        f"encrypt_{bits}_vs_phe": encrypt / figures[f"encrypt_{bits}_us"],
        f"add_{bits}_vs_phe": add / figures[f"add_{bits}_us"],
        f"phe_bytes_per_parameter_{bits}": bits / 4,
    }


def run_encryption() -> Figures:
    """Both key sizes."""
    return encryption(2048) | encryption(3072)


def run_privacy() -> Figures:
    """The exact discrete Gaussian."""
    entropy = NoiseEntropy()
    return {
        f"discrete_gaussian_1m_sigma_{sigma}_ms": seconds(
            lambda sigma=sigma: discrete_gaussian(sigma**2, 1_000_000, entropy=entropy)  # type: ignore[misc]
        )
        * 1e3
        for sigma in (10, 1000, 100_000)
    }


BENCHES: dict[str, Callable[[], Figures]] = {"encryption": run_encryption, "privacy": run_privacy}


def main() -> None:
    """Run what is asked for, print a table, merge the figures into build/bench.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(BENCHES))
    only = parser.parse_args().only
    figures: Figures = {}
    for name in [only] if only else sorted(BENCHES):
        figures |= BENCHES[name]()
    for name, value in figures.items():
        print(f"{name:<36} {value:>14,.3f}")
    path = Path("build/bench.json")
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | figures, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
