#!/usr/bin/env bash
# pypaillier 0.8.0: a message that is a valid Paillier plaintext is refused above n / 2^21.
#
# Valid input: an integer below n / 2 in absolute value, which is what a signed Paillier plaintext is by the scheme (Paillier 1999,
# section 3; python-paillier takes everything up to n / 3). Here room for a sum of 2^20 ciphertexts is kept in every message, also
# in one that is never added to anything, and no parameter says otherwise. Whoever packs several values into a plaintext by the
# number of bits of the key, as for another library, packs 21 bits too many, which with 32-bit values is a slot.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "pypaillier==0.8.0" "phe==1.5.0"
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import paillier
import phe

BITS = 2048
public, secret = paillier.generate_keypair(BITS)
theirs, their_secret = phe.generate_paillier_keypair(n_length=BITS)


def taken(value: int) -> str:
    try:
        (ciphertext,) = paillier.encrypt_integers(public, [value])
    except Exception as error:
        return type(error).__name__
    (back,) = paillier.decrypt_exact_many(secret, [bytes(ciphertext)])
    return "taken" if back == (value, 0) else "comes back as another number"


shortest = min(
    (bits for bits in range(BITS - 40, BITS) if taken((1 << bits) - 1) != "taken"), default=None
)  # a number of that many bits is refused first
refusal = taken((1 << (BITS - 3)) - 1)
value = (1 << (BITS - 3)) - 1
other = their_secret.raw_decrypt(theirs.raw_encrypt(value)) == value
print(
    f"pypaillier {version('pypaillier')}, {BITS} bits: numbers of {shortest} bits are the first that are refused; of "
    f"{BITS - 3} bits: {refusal}; phe {version('phe')} encrypts and decrypts these: {other}"
)
seen = shortest is not None and BITS - 24 <= shortest <= BITS - 19 and refusal == "ValueError" and other
print("as described" if seen else "CHANGED: not as described")
raise SystemExit(not seen)
PYTHON
