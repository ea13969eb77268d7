// What the aggregator signed, checked with nothing but Node. The bytes: docs/wire-format.md, "Statements, digests,
// signatures". Everything here throws a SottoError when it does not hold.

import { createHash, createPublicKey, verify } from "node:crypto";
import { createReadStream } from "node:fs";
import { readFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";

import { SottoError } from "./wire.mjs";

const malformed = (text, cause) => new SottoError(text, { code: "INVALID_ARGUMENT", reason: "INVALID_INPUT", cause });
const unsigned = (text) => new SottoError(text, { code: "INVALID_ARGUMENT", reason: "SIGNATURE_INVALID" });
const different = (text) => new SottoError(text, { code: "DATA_LOSS", reason: "DIGEST_MISMATCH" });

// --- canonical JSON ------------------------------------------------------------------------------------------------

const TOKEN = /[ \t\n\r]*("(?:[^"\\\u0000-\u001f]|\\.)*"|-?(?:0|[1-9][0-9]*)(?![0-9.eE])|true|false|null|[[\]{},:])/y;

/** JSON without reals. Integers beyond 2^53 become BigInt, which JSON.parse would round; objects have no prototype. */
export function parseJson(text) {
  let position = 0;
  const next = () => {
    TOKEN.lastIndex = position;
    const found = TOKEN.exec(text);
    if (!found) throw new SyntaxError(`no JSON token at ${position}`);
    position = TOKEN.lastIndex;
    return found[1];
  };
  const expect = (token, wanted) => {
    if (token !== wanted) throw new SyntaxError(`${wanted} expected before ${position}`);
  };
  const items = (close, add) => {
    let token = next();
    if (token === close) return;
    for (; ; token = next()) {
      add(token);
      token = next();
      if (token === close) return;
      expect(token, ",");
    }
  };
  const string = (token) => {
    const text = JSON.parse(token);
    if (/\p{Surrogate}/u.test(text)) throw new SyntaxError("half of a surrogate pair");
    return text;
  };
  const value = (token) => {
    if (token === "{") {
      const object = Object.create(null);
      items("}", (name) => {
        if (name[0] !== '"') throw new SyntaxError("a name is a string");
        expect(next(), ":");
        object[string(name)] = value(next());
      });
      return object;
    }
    if (token === "[") {
      const list = [];
      items("]", (first) => list.push(value(first)));
      return list;
    }
    if (token[0] === '"') return string(token);
    if (!/^-?[0-9]/.test(token)) return JSON.parse(token); // true, false, null; throws on anything else
    return Number.isSafeInteger(Number(token)) ? Number(token) : BigInt(token);
  };
  const whole = value(next());
  if (text.slice(position).trim()) throw new SyntaxError("something follows the value");
  return whole;
}

/** The one text of a value: names sorted by code points, no white space. */
export function canonicalJson(value) {
  if (typeof value === "bigint") return value.toString();
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const byCodePoints = (a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)); // UTF-8 sorts as code points do
  const members = Object.keys(value).sort(byCodePoints);
  return `{${members.map((name) => `${JSON.stringify(name)}:${canonicalJson(value[name])}`).join(",")}}`;
}

/** The object that `text` is the canonical form of. */
export function parseCanonical(text) {
  let value;
  try {
    value = parseJson(text);
  } catch (error) {
    throw malformed("a statement is not canonical JSON", error);
  }
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  if (!isObject || canonicalJson(value) !== text) throw malformed("a statement is not in canonical form");
  return value;
}

// --- signed statements ---------------------------------------------------------------------------------------------

const hexBytes = (text, size) => {
  if (typeof text !== "string" || text.length !== 2 * size || !/^[0-9a-f]*$/i.test(text)) {
    throw malformed(`${size} bytes in hexadecimal were expected`);
  }
  return Buffer.from(text, "hex");
};

/** A signed statement's object, once its Ed25519 signature verified (32-byte key) and its kind is the one asked for. */
export function openSigned(signed, kind, verifyKey) {
  if (typeof signed?.statement !== "string") throw malformed("a signed statement is malformed");
  const message = Buffer.from(`sotto/v1/${kind}\n${signed.statement}`);
  const key = createPublicKey({
    key: { kty: "OKP", crv: "Ed25519", x: verifyKey.toString("base64url") },
    format: "jwk",
  });
  if (!verify(null, message, key, hexBytes(signed.signature, 64))) {
    throw unsigned(`the signature of "${signed.signer}" on a ${kind} does not verify`);
  }
  const statement = parseCanonical(signed.statement);
  if (statement.kind !== kind) throw unsigned(`"${signed.signer}" signed something else than a ${kind}`);
  delete statement.kind;
  return statement;
}

/** The roster that a kit pins: who is in the federation, with which keys. Its signature is verified. */
export async function loadRoster(path) {
  let content;
  try {
    content = JSON.parse(await readFile(path, "utf8"));
  } catch (error) {
    throw malformed(`${path} is not a pinned roster: ${error.message}`, error);
  }
  return openSigned(content.roster, "roster", hexBytes(content.operator_verify_key, 32));
}

/** SHA-256 of a file, in hexadecimal; undefined where there is none. */
export async function sha256Of(path) {
  const hash = createHash("sha256");
  try {
    for await (const piece of createReadStream(path)) hash.update(piece);
  } catch (error) {
    if (error.code === "ENOENT") return undefined;
    throw error;
  }
  return hash.digest("hex");
}

/**
 * What the aggregator of a federation signed about a job: the statement in manifest.json.
 *
 * path: manifest.json; roster: as `loadRoster` gives it, its key of the aggregator is the one that counts;
 * files: paths by name, where the model does not lie beside the manifest; jobId: which job it has to be about.
 */
export async function verifyManifest(path, roster, { files = {}, jobId } = {}) {
  let content;
  try {
    content = parseJson(await readFile(path, "utf8"));
  } catch (error) {
    throw malformed(`${basename(path)} is not a manifest`, error);
  }
  const { manifest: signed, readable, ...others } = content ?? {};
  if (signed?.signer !== "aggregator") throw unsigned("the manifest is not signed by the aggregator");
  const statement = openSigned(signed, "manifest", hexBytes(roster.aggregator_verify_key, 32));
  const sameToRead = readable === undefined || canonicalJson(readable) === canonicalJson(statement);
  if (!sameToRead || Object.keys(others).length) {
    throw unsigned("the manifest's readable half is not what the aggregator signed");
  }
  if (jobId && statement.job_id !== jobId) {
    throw unsigned(`the manifest is of job ${statement.job_id}, not of ${jobId}`);
  }
  checkOrder(statement, roster);
  const { file, sha256 } = statement.model ?? {};
  const lies = files[file] ?? join(dirname(path), basename(String(file)));
  const found = await sha256Of(lies);
  if (found === undefined) throw different(`the manifest is about ${file}, which is not there`);
  if (found !== sha256) throw different(`${file} is not the model that the manifest is about`);
  return statement;
}

/** The order in a manifest is its owner's; a manifest may say instead that nobody signed. */
function checkOrder({ order, owner }, roster) {
  if (order === undefined || order === "nobody signed") return;
  const scientist = roster.scientists?.find(({ name }) => name === order?.signer);
  if (!scientist) throw unsigned("the manifest has an order that nobody in the roster signed");
  const ordered = openSigned(order, "order", hexBytes(scientist.verify_key, 32));
  if (ordered.scientist !== scientist.name || String(owner).split("/")[1] !== scientist.name) {
    throw unsigned(`the manifest has an order of ${scientist.name}, and is of ${owner}'s job`);
  }
}
