"""The Paillier layer per parameter, beside its peers: 16-bit values, 16 parties, 20-bit slots without noise."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np

from src.encryption.dealer import deal, make_public_key
from src.encryption.integers import PackedIntegers, split
from src.encryption.keys import KeyShare, PrivateKey, PublicKey, ThresholdKey
from src.encryption.paillier_scheme import PaillierScheme
from src.encryption.primes import generate_primes, generate_safe_primes
from src.encryption.scheme import Layout, LayoutRequest, SystemEntropy
from src.encryption.threshold import partial_decrypt_all
from src.privacy.noise import tail_bound

from .measure import Figures, cpu_in_turn_s, cpu_s, least_in_turn, say, speedup
from .peers import heu_us, numpy_us, phe_us, pypaillier_us, tenseal_us

VALUE_BOUND: Final = 2**15 - 1
PARTIES: Final = 16
PARAMETERS: Final = 100_000
"""In a batch whose time is taken: 981 ciphertexts of 2048 bits, half a second to encrypt."""
ADDITIONS: Final = 27
"""Times that such batches are added up, which takes milliseconds."""
MODEL: Final = 1_000_000
"""Parameters of the model whose encryption and sum are weighed, and for which tables are chosen."""
OPENED: Final = 20_000
"""Parameters that are opened: 197 ciphertexts of 2048 bits, three seconds a share."""
UPLOADS: Final = (2, 100)

REACH: Final[dict[str, tuple[str, float]]] = {
    "encrypt_2048_vs_phe": ("≥", 1000),
    "encrypt_3072_vs_phe": ("≥", 1500),
    "encrypt_prepared_2048_vs_phe": ("≥", 50_000),
    "encrypt_2048_vs_heu_equal_slots": ("≥", 1.2),
    "add_2048_vs_phe": ("≥", 100),
    "add_2048_vs_gmp": ("≤", 1.35),
    "decrypt_2048_vs_phe": ("≥", 75),
    "bytes_per_parameter_2048": ("≤", 5.1),
    "encrypt_two_cores_of_two_alone": ("≥", 0.9),
    "partial_two_cores_of_two_alone": ("≥", 0.9),
    "sum_two_cores_of_two_alone": ("≥", 0.8),
    "proof_overhead": ("≤", 1.15),
    "encrypt_1m_extra_mb": ("≤", 300),
    "sum_100_vs_2_extra_mb": ("≤", 5),
}
"""What is to be reached: at least, or at most."""

ENTROPY: Final = SystemEntropy()


class Bench:
    """One key, and batches under it."""

    def __init__(self, p: int, q: int, *, dealt: tuple[ThresholdKey, list[KeyShare]] | None = None) -> None:
        self.p, self.q = int(p), int(q)
        self.key: ThresholdKey | None = dealt[0] if dealt else None
        self.shares = dealt[1] if dealt else []
        self.public: PublicKey = self.key.public if self.key else make_public_key(p, q, entropy=ENTROPY)
        self.bits = self.public.modulus_bits
        self.ciphertexts = self.layout(MODEL).ciphertext_count

    def scheme(self, processes: int = 1) -> PaillierScheme:
        """With tables for a model of `MODEL` parameters."""
        return PaillierScheme(self.public, self.key, expected_ciphertexts=self.ciphertexts, processes=processes)

    def layout(self, parameters: int, *, noise_bound: int = 0, contributions: int = PARTIES) -> Layout:
        """Of a batch of so many values."""
        request = LayoutRequest(
            parameter_count=parameters,
            value_bound=VALUE_BOUND,
            noise_bound=noise_bound,
            contributions=contributions,
        )
        return PaillierScheme(self.public).plan(request)

    def protect(self, parameters: int, *, processes: int = 1) -> bytes:
        """A batch of random values."""
        values = np.random.default_rng(0).integers(-VALUE_BOUND, VALUE_BOUND + 1, parameters)
        return b"".join(self.scheme(processes).protect(self.layout(parameters), [values], entropy=ENTROPY))


def run() -> Figures:
    """Everything; two minutes on two free cores."""
    say("keys")
    primes = generate_safe_primes(2048, entropy=ENTROPY)
    bench = Bench(*primes, dealt=deal(*primes, threshold=2, holders=3, entropy=ENTROPY))
    larger = Bench(*generate_primes(3072, entropy=ENTROPY))
    figures: Figures = {}
    for step in (one_core, larger_key, peers, opening, two_cores, memory):
        say(step.__name__.replace("_", " "))
        figures |= step(larger if step is larger_key else bench)
    return figures


def one_core(bench: Bench) -> Figures:
    """Encrypt, add and decrypt on one core, against python-paillier, HEU and GMP."""
    layout = bench.layout(PARAMETERS)
    body = bench.protect(PARAMETERS)  # builds the tables
    add_s, gmp_s = cpu_in_turn_s(_add(bench, body, layout), _gmp(bench, body), repeats=ADDITIONS)
    ours, phe, heu, pypaillier = least_in_turn(
        lambda: {
            "encrypt": cpu_s(lambda: bench.protect(PARAMETERS)) / PARAMETERS * 1e6,
            "add": cpu_s(_add(bench, body, layout), repeats=ADDITIONS) / PARAMETERS * 1e6,
            "decrypt": _decrypt_s(bench) / PARAMETERS * 10 * 1e6,
            "prepared": _prepared_s(bench) / PARAMETERS * 1e6,
        },
        lambda: phe_us(bench.p, bench.q),
        lambda: heu_us(bench.bits, layout.slots_per_ciphertext),
        lambda: pypaillier_us(bench.bits, layout.slots_per_ciphertext),
    )
    figures = {f"{name}_2048_us": value for name, value in ours.items()}
    figures |= {
        "bytes_per_parameter_2048": bench.layout(MODEL).body_bytes / MODEL,
        "slot_bits": layout.slot_bits,
        "slot_bits_with_noise": _noisy_slot_bits(bench),
        "add_2048_vs_gmp": add_s / gmp_s,
    }
    figures |= {f"phe_{name}_2048_us": value for name, value in phe.items()}
    figures |= {f"{name}_2048_vs_phe": value / ours[name] for name, value in phe.items()}
    if phe:
        figures["encrypt_prepared_2048_vs_phe"] = phe["encrypt"] / ours["prepared"]
    figures |= {f"heu_{name}_2048_us": value for name, value in heu.items()}
    figures |= {f"{name}_2048_vs_heu_equal_slots": value / ours[name] for name, value in heu.items()}
    return figures | _beside_pypaillier(bench, pypaillier, ours)


def _beside_pypaillier(bench: Bench, found: Figures, ours: Figures) -> Figures:
    figures = {f"pypaillier_{name}_{bench.bits}_us": value for name, value in found.items()}
    return figures | {
        f"{name}_{bench.bits}_vs_pypaillier_packed": value / ours[name] for name, value in found.items() if name in ours
    }


def _add(bench: Bench, body: bytes, layout: Layout) -> Callable[[], object]:
    scheme = bench.scheme()
    return lambda: b"".join(scheme.fold(layout, [BytesIO(body), BytesIO(body)]))


def _gmp(bench: Bench, body: bytes) -> Callable[[], object]:
    """The bare product: integers in, integers out, nothing else."""
    ciphertexts, n_squared = split(body, bench.public.ciphertext_bytes), bench.public.n_squared

    def product() -> None:
        for ciphertext in ciphertexts:
            ciphertext * ciphertext_2 % n_squared

    ciphertext_2 = ciphertexts[0]
    return product


def _decrypt_s(bench: Bench) -> float:
    """A tenth of the parameters."""
    private, scheme, layout = PrivateKey(bench.p, bench.q, bench.public), bench.scheme(), bench.layout(PARAMETERS // 10)
    body = bench.protect(PARAMETERS // 10)

    def work() -> None:
        opened = scheme.open_with_key(layout, private, [body])
        for _ in scheme.decode(layout, opened, contributions=1):
            pass

    return cpu_s(work)


def _prepared_s(bench: Bench) -> float:
    """Randomness that a child has prepared; the child's time is not counted, taking over what it prepared is."""
    scheme, layout = bench.scheme(processes=2), bench.layout(PARAMETERS)
    values = np.random.default_rng(0).integers(-VALUE_BOUND, VALUE_BOUND + 1, PARAMETERS)
    with scheme.prepare(layout, entropy=ENTROPY) as prepared:
        return cpu_s(lambda: b"".join(scheme.protect(layout, [values], entropy=ENTROPY, prepared=prepared)), repeats=1)


def _noisy_slot_bits(bench: Bench) -> int:
    """Noise multiplier 1: half the variance from the aggregator, half from 16 parties; overflow below 2^-64 a job of
    1000 rounds."""
    draws = MODEL * (PARTIES + 1) * 1000
    bound = tail_bound(VALUE_BOUND**2 // 2, log2_probability=64, draws=draws)
    return bench.layout(MODEL, noise_bound=bound, contributions=PARTIES + 1).slot_bits


def larger_key(bench: Bench) -> Figures:
    """Encrypt and add under a key of 3072 bits."""
    layout, body = bench.layout(PARAMETERS), bench.protect(PARAMETERS)
    ours, phe, pypaillier = least_in_turn(
        lambda: {
            "encrypt": cpu_s(lambda: bench.protect(PARAMETERS)) / PARAMETERS * 1e6,
            "add": cpu_s(_add(bench, body, layout), repeats=ADDITIONS) / PARAMETERS * 1e6,
        },
        lambda: phe_us(bench.p, bench.q),
        lambda: pypaillier_us(bench.bits, layout.slots_per_ciphertext),
    )
    figures = {f"{name}_3072_us": value for name, value in ours.items()}
    figures |= {f"{name}_3072_vs_phe": phe[name] / value for name, value in ours.items() if name in phe}
    figures |= _beside_pypaillier(bench, pypaillier, ours)
    return figures | {"bytes_per_parameter_3072": bench.layout(MODEL).body_bytes / MODEL}


def peers(_: Bench) -> Figures:
    """What does not use Paillier."""
    return {
        f"{peer}_{name}" + ("_per_parameter" if name == "bytes" else "_us"): value
        for peer, found in (("tenseal_ckks", tenseal_us()), ("numpy_plaintext", numpy_us()))
        for name, value in found.items()
    }


def opening(bench: Bench) -> Figures:
    """A share with its proof, on one core; verifying and combining."""
    key, scheme, layout = _dealt(bench), bench.scheme(), bench.layout(OPENED)
    material = bench.protect(OPENED)
    ciphertexts = PackedIntegers(material, layout.ciphertext_bytes)

    def share(holder: int) -> bytes:
        return scheme.open_share(layout, bench.shares[holder], [material], binding=b"bench", entropy=ENTROPY)

    bare, proven = cpu_in_turn_s(lambda: partial_decrypt_all(bench.shares[0], key, ciphertexts), lambda: share(0))
    batches = {bench.shares[holder].index: share(holder) for holder in (0, 1)}
    verify = cpu_s(lambda: scheme.verify_share(layout, material, batches[1], index=1, binding=b"bench"), repeats=2)
    combine = cpu_s(lambda: b"".join(scheme.combine(layout, material, batches)))
    return {
        "share_2048_us": proven / OPENED * 1e6,
        "verify_2048_us": verify / OPENED * 1e6,
        "combine_2048_us": combine / OPENED * 1e6,
        "proof_overhead": proven / bare,
    }


def _dealt(bench: Bench) -> ThresholdKey:
    if bench.key is None:
        raise ValueError("this key was not dealt out")
    return bench.key


def two_cores(bench: Bench) -> Figures:
    """The same call with two processes, with one, and with one in each of two that have nothing to do with it."""
    layout, opened = bench.layout(PARAMETERS), bench.layout(OPENED // 2)
    material = bench.protect(OPENED // 2)
    figures = speedup(
        "encrypt_two_cores",
        lambda: bench.protect(PARAMETERS * 3, processes=1),
        lambda: bench.protect(PARAMETERS * 3, processes=2),
    )

    def share(processes: int) -> Callable[[], bytes]:
        scheme = bench.scheme(processes)
        return lambda: scheme.open_share(opened, bench.shares[0], [material], binding=b"bench", entropy=ENTROPY)

    figures |= speedup("partial_two_cores", share(1), share(2), repeats=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "body"
        path.write_bytes(bench.protect(PARAMETERS) * 4)
        wide = bench.layout(4 * layout.ciphertext_count * layout.slots_per_ciphertext)

        def fold(processes: int) -> None:
            with ExitStack() as stack:
                bodies = [stack.enter_context(path.open("rb")) for _ in range(PARTIES)]
                for _ in bench.scheme(processes).fold(wide, bodies):
                    pass

        figures |= speedup("sum_two_cores", lambda: fold(1), lambda: fold(2))
    return figures


def memory(bench: Bench) -> Figures:
    """Each in a process of its own, on two cores: what it takes beyond what it had when it began."""
    with tempfile.TemporaryDirectory() as folder:
        settings, body = Path(folder) / "settings.json", Path(folder) / "body"
        settings.write_text(json.dumps({"public": bench.public.to_json(), "layout": _memory_layout(bench).to_json()}))

        def megabytes(operation: str, *more: str) -> float:
            command = [sys.executable, str(Path(__file__).with_name("memory.py")), operation, str(settings), str(body)]
            return float(subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout)  # noqa: S603  our own

        encrypt = megabytes("encrypt")
        few, many = (megabytes("fold", str(count)) for count in UPLOADS)
    return {"encrypt_1m_extra_mb": encrypt, "sum_2_extra_mb": few, "sum_100_vs_2_extra_mb": many - few}


def _memory_layout(bench: Bench) -> Layout:
    return bench.layout(MODEL, contributions=max(UPLOADS))
