"""The peers: other people's software doing the same, per parameter. One that cannot be had is skipped by name.

Peers are looked for where this Python looks, then in build/peers, where they are installed when they are missing.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np

from .measure import Figures, cpu_s, say

ROOT = Path(__file__).resolve().parent.parent
OWN_PLACE = ROOT / "build" / "peers"
DISTRIBUTIONS = {
    "phe": "phe",
    "paillier": "pypaillier",
    "tenseal": "tenseal",
    "heu.phe": "sf-heu",
    "opendp.prelude": "opendp",
    "deprecated": "deprecated",
    "wrapt": "wrapt",
}
INSTALL_TIMEOUT_S = 60
SLICE = 20
"""Encryptions of a peer that needs ten milliseconds for each."""


def peer(module: str) -> ModuleType | None:
    """A peer's module, installed if need be; None, and a line that says so, where it will not install."""
    name = DISTRIBUTIONS[module]
    if str(OWN_PLACE) not in sys.path:
        sys.path.append(str(OWN_PLACE))
    try:
        return importlib.import_module(module)
    except ImportError:
        pass
    try:
        _install(name)
        importlib.invalidate_caches()
        return importlib.import_module(module)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        say(f"{name} is skipped: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return None


def _install(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    (requirement,) = [each for each in extras if each.startswith(name)]
    say(f"installing {requirement} into {OWN_PLACE.relative_to(ROOT)}")
    uv = Path(sys.executable).with_name("uv")
    pip = (
        [str(uv), "pip", "install", "--python", sys.executable]
        if uv.exists()
        else [sys.executable, "-m", "pip", "install"]
    )
    arguments = ["--quiet", "--no-deps", "--target", str(OWN_PLACE), "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *arguments, requirement], check=True, timeout=INSTALL_TIMEOUT_S)  # noqa: S603  our own command


def phe_us(p: int, q: int) -> Figures:
    """python-paillier, a ciphertext a parameter: encrypt, add and decrypt, in microseconds."""
    phe = peer("phe")
    if phe is None:
        return {}
    public = phe.PaillierPublicKey(p * q)
    private = phe.PaillierPrivateKey(public, p, q)
    one, two = public.encrypt(3), public.encrypt(4)
    return {
        "encrypt": cpu_s(lambda: [public.encrypt(7) for _ in range(SLICE)]) / SLICE * 1e6,
        "add": cpu_s(lambda: [(one + two).ciphertext(be_secure=False) for _ in range(1000)]) / 1000 * 1e6,
        "decrypt": cpu_s(lambda: [private.decrypt(one) for _ in range(SLICE)]) / SLICE * 1e6,
    }


def heu_us(bits: int, slots: int) -> Figures:
    """SecretFlow HEU's ZPaillier, as many slots in a ciphertext as we have: encrypt and add, in microseconds a slot."""
    heu = peer("heu.phe")
    if heu is None:
        return {}
    kit = heu.setup(heu.SchemaType.ZPaillier, bits)
    encryptor, evaluator = kit.encryptor(), kit.evaluator()
    packed = heu.Plaintext(heu.SchemaType.ZPaillier, (1 << (bits - 8)) // 3)
    ciphertext = encryptor.encrypt(packed)
    return {
        "encrypt": cpu_s(lambda: [encryptor.encrypt(packed) for _ in range(200)]) / 200 / slots * 1e6,
        "add": cpu_s(lambda: [evaluator.add(ciphertext, ciphertext) for _ in range(1000)]) / 1000 / slots * 1e6,
    }


def pypaillier_us(bits: int, slots: int) -> Figures:
    """pypaillier, whose integers are packed by hand into as many slots as we have: encrypt, add and decrypt, in
    microseconds of all cores together a slot."""
    paillier = peer("paillier")
    if paillier is None:
        return {}
    public, secret = paillier.generate_keypair(bits)
    packed = [(1 << (bits - 32)) // 3] * (10 * SLICE)  # it keeps room for a sum of 2^20
    ciphertexts = [bytes(each) for each in paillier.encrypt_integers(public, packed)]
    return {
        "encrypt": cpu_s(lambda: paillier.encrypt_integers(public, packed)) / len(packed) / slots * 1e6,
        "add": cpu_s(lambda: paillier.add_many(public, ciphertexts)) / (len(packed) - 1) / slots * 1e6,
        "decrypt": cpu_s(lambda: paillier.decrypt_exact_many(secret, ciphertexts)) / len(packed) / slots * 1e6,
    }


def tenseal_us() -> Figures:
    """TenSEAL's CKKS as NVIDIA FLARE sets it up (8192, [60, 40, 40], scale 2^40): approximate sums, one key holder."""
    tenseal = peer("tenseal")
    if tenseal is None:
        return {}
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40])
    context.global_scale = 2**40
    slots = 4096
    values = np.random.default_rng(0).normal(size=slots)
    one, two = tenseal.ckks_vector(context, values), tenseal.ckks_vector(context, values)
    return {
        "encrypt": cpu_s(lambda: [tenseal.ckks_vector(context, values) for _ in range(50)]) / 50 / slots * 1e6,
        "add": cpu_s(lambda: [one + two for _ in range(500)]) / 500 / slots * 1e6,
        "decrypt": cpu_s(lambda: [one.decrypt() for _ in range(50)]) / 50 / slots * 1e6,
        "bytes": len(one.serialize()) / slots,
    }


def numpy_us() -> Figures:
    """No encryption: a million int64 added in memory."""
    one = np.ones(1_000_000, dtype=np.int64)
    return {"add": cpu_s(lambda: one + one, repeats=20), "bytes": 8.0}
