// Reads Sotto's batch format with nothing but Node: `node examples/node/verify_batch.mjs FILE …` for round vectors
// (tests/vectors/round_*.json). One line a check; the exit code is 1 if one failed. The bytes: docs/wire-format.md.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";

const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();
const toInteger = (bytes) => BigInt("0x" + Buffer.from(bytes).toString("hex"));
const fromHex = (text) => {
  if (!/^(?:[0-9a-f]{2})*$/.test(text)) throw new Error("bytes are lower-case hexadecimal");
  return Buffer.from(text, "hex");
};

function powerModulo(base, exponent, modulus) {
  let result = 1n;
  for (base %= modulus; exponent > 0n; exponent >>= 1n) {
    if (exponent & 1n) result = (result * base) % modulus;
    base = (base * base) % modulus;
  }
  return result;
}

function inverseModulo(value, modulus) {
  let [a, b, x, y] = [value % modulus, modulus, 1n, 0n];
  while (b) [a, b, x, y] = [b, a % b, y, x - (a / b) * y];
  if (a !== 1n) throw new Error("no inverse");
  return ((x % modulus) + modulus) % modulus;
}

// The header's fields, in order; a size of 0 is a text: one length byte and that many bytes.
const HEADER = [
  ["scheme", 0], ["keyId", 0], ["modulusBits", 4], ["slotBits", 2], ["offset", 8], ["parameterCount", 8],
  ["ciphertextCount", 8], ["ciphertextBytes", 4], ["jobId", 0], ["round", 4], ["contributor", 0],
];

function parseHeader(bytes) {
  let at = 0;
  const take = (size) => {
    if (at + size > bytes.length) throw new Error("the header is cut short");
    return bytes.subarray(at, (at += size));
  };
  if (take(4).toString("latin1") !== "SOTB") throw new Error("this is not a batch");
  if (toInteger(take(2)) !== 1n) throw new Error("another version");
  const header = {};
  for (const [name, size] of HEADER) {
    header[name] = size ? toInteger(take(size)) : new TextDecoder("utf-8", { fatal: true }).decode(take(take(1)[0]));
  }
  header.planDigest = take(32).toString("hex");
  if (at !== bytes.length) throw new Error("the header is too long");
  return header;
}

function ciphertexts(body, header) {
  const width = Number(header.ciphertextBytes);
  if (BigInt(body.length) !== header.ciphertextCount * header.ciphertextBytes) throw new Error("a body of another length");
  return Array.from({ length: body.length / width }, (_, j) => body.subarray(j * width, (j + 1) * width));
}

// RFC 9162, section 2.1.1.
function merkleRoot(leaves) {
  if (leaves.length === 1) return sha256(Buffer.of(0), leaves[0]);
  let half = 1;
  while (half * 2 < leaves.length) half *= 2;
  return sha256(Buffer.of(1), merkleRoot(leaves.slice(0, half)), merkleRoot(leaves.slice(half)));
}

const toBytes = (value, width) => Buffer.from(value.toString(16).padStart(2 * width, "0"), "hex");
const eightBytes = (value) => toBytes(BigInt(value), 8);

// Whether a contributor knows what is inside its ciphertexts; no secret is needed to see it.
function knows(proof, body, header, n, h) {
  const [width, nBytes] = [Number(header.ciphertextBytes), Number(header.modulusBits) / 8];
  const maskBits = header.modulusBits / 2n + 296n;
  if (proof.length !== 32 + nBytes + Number((maskBits + 8n) / 8n)) return false;
  const seed = proof.subarray(0, 32);
  const [z, w] = [proof.subarray(32, 32 + nBytes), proof.subarray(32 + nBytes)].map(toInteger);
  if (z >= n || w >> (maskBits + 1n)) return false;
  const modulus = n * n;
  const product = body.reduce((total, ciphertext, j) => {
    const weight = sha256("sotto/knowledge/weight/1", seed, eightBytes(j)).subarray(0, 16);
    return (total * powerModulo(toInteger(ciphertext), toInteger(weight), modulus)) % modulus;
  }, 1n);
  const commitment = ((1n + n * z) * powerModulo(h, w, modulus) * inverseModulo(product, modulus)) % modulus;
  const parts = [
    "sotto/knowledge/challenge/1", header.keyId, Buffer.concat([toBytes(n, width), toBytes(h, width)]),
    `sotto/v1/knowledge\n${header.planDigest}\n${header.contributor}`, sha256(...body), toBytes(commitment, width),
  ].map((part) => Buffer.from(part));
  return sha256(...parts.flatMap((part) => [eightBytes(part.length), part])).equals(seed);
}

function decrypt(ciphertext, p, q) {
  const n = p * q;
  const order = (p - 1n) * (q - 1n);
  const power = powerModulo(ciphertext, order, n * n);
  if (power % n !== 1n) throw new Error("not a ciphertext");
  return (((power - 1n) / n) * inverseModulo(order, n)) % n;
}

// The slots of opened plaintexts, k offsets subtracted; slots that no value needs must be empty.
function unpack(plaintexts, header, contributions) {
  const width = header.slotBits;
  const slots = Number((header.modulusBits - 1n) / width);
  const mask = (1n << width) - 1n;
  const largest = 2n * BigInt(contributions) * header.offset;
  const values = [];
  for (const plaintext of plaintexts) {
    if (plaintext >> (width * BigInt(slots))) throw new Error("a bit above the last slot");
    for (let j = 0; j < slots; j++) {
      const slot = (plaintext >> (width * BigInt(j))) & mask;
      const used = BigInt(values.length) < header.parameterCount;
      if (slot > (used ? largest : 0n)) throw new Error("a slot that no sum has");
      if (used) values.push(slot - BigInt(contributions) * header.offset);
    }
  }
  return values;
}

const same = (one, other) => one.length === other.length && one.every((value, i) => value === other[i]);

function* checks(vector) {
  const [p, q] = [vector.primes.p, vector.primes.q].map((text) => BigInt("0x" + text));
  const n = p * q;
  const headers = vector.batches.map((batch) => parseHeader(fromHex(batch.header)));
  const bodies = vector.batches.map((batch, i) => ciphertexts(fromHex(batch.body), headers[i]));
  const [first] = headers;

  yield ["headers are for this key", headers.every((header) =>
    header.scheme === "paillier" && header.keyId === vector.key_id && header.planDigest === vector.plan_digest &&
    header.modulusBits === BigInt(n.toString(2).length) && header.ciphertextBytes * 4n === header.modulusBits)];
  yield ["headers name their contributors and agree on the rest", headers.every((header, i) =>
    header.contributor === vector.batches[i].contributor &&
    Object.keys(first).every((name) => name === "contributor" || header[name] === first[name]))];
  yield ["roots of the batches", vector.batches.every((batch, i) =>
    merkleRoot([fromHex(batch.header), ...bodies[i]]).toString("hex") === batch.root)];
  const h = BigInt("0x" + vector.threshold_key.public.h);
  yield ["contributors know what is inside", vector.batches.every((batch, i) =>
    knows(fromHex(batch.proof), bodies[i], headers[i], n, h))];

  const product = bodies[0].map((_, j) => bodies.reduce((sum, body) => (sum * toInteger(body[j])) % (n * n), 1n));
  const aggregate = ciphertexts(fromHex(vector.aggregate.body), first);
  yield [`the product of ${bodies.length} bodies modulo n² is the aggregate`, same(product, aggregate.map(toInteger))];

  const names = headers.map((header) => header.contributor).join(",");
  const leaf = Buffer.from(`sotto/v1/aggregate\n${vector.plan_digest}\n${names}`);
  yield ["root of the aggregate", merkleRoot([leaf, ...aggregate]).toString("hex") === vector.aggregate.root];

  const plaintexts = product.map((ciphertext) => decrypt(ciphertext, p, q));
  yield ["the private key opens it as the holders did", same(plaintexts, vector.opened.map((text) => toInteger(fromHex(text))))];

  const sums = unpack(plaintexts, first, bodies.length);
  const added = vector.sums.map((_, i) => vector.batches.reduce((sum, batch) => sum + BigInt(batch.values[i]), 0n));
  yield [`its ${sums.length} slots hold the sum of the values`, same(sums, added) && same(sums, vector.sums.map(BigInt))];
}

let failed = process.argv.length < 3;
if (failed) console.error("usage: node verify_batch.mjs FILE …");
for (const file of process.argv.slice(2)) {
  try {
    for (const [claim, holds] of checks(JSON.parse(readFileSync(file, "utf8")))) {
      console.log(`${holds ? "ok   " : "WRONG"} ${file}: ${claim}`);
      failed ||= !holds;
    }
  } catch (error) {
    console.log(`WRONG ${file}: ${error.message}`);
    failed = true;
  }
}
process.exitCode = failed ? 1 : 0;
