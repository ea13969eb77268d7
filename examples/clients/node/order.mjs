// What makes a job the scientist's: the order that comes with it, a statement of kind "order" (jobs.proto, CreateJob),
// signed with the key of the kit. The aggregator takes no job without one, and parties train for nothing else.

import { createHash, createPrivateKey, sign, X509Certificate } from "node:crypto";

import { canonicalJson } from "./verify.mjs";
import { SottoError } from "./wire.mjs";

const KINDS = { federated_training: "initial_model", evaluation: "model", export: undefined }; // and their models
const DEFAULT_ROUNDS = 10; // as jobs.proto has them
const DEFAULT_SPARE_ROUNDS = 2;
const VALID_S = 30 * 86_400; // a job without a timeout may have to wait for its turn
const CLOCKS_S = 3_600; // by so much clocks may differ
const PKCS8 = Buffer.from("302e020100300506032b657004220420", "hex"); // RFC 8410: before the 32 bytes of an Ed25519 key

const invalid = (text) => new SottoError(text, { code: "INVALID_ARGUMENT", reason: "INVALID_INPUT" });

/** Who a certificate speaks for: { federation, scientist }, of spiffe://<federation>/<role>/<name>. */
export function holderOf(certificate) {
  const found = /URI:spiffe:\/\/([^/, ]+)\/(?:scientist|operator)\/([^/, ]+)/.exec(
    new X509Certificate(certificate).subjectAltName ?? "",
  );
  if (!found) throw invalid("the certificate is no scientist's");
  return { federation: found[1], scientist: found[2] };
}

/**
 * The signed order for a job, as CreateJobRequest.order takes it.
 *
 * job: as `submit` takes it. signer: { federation, scientist, key }, the key 32 bytes. now: milliseconds.
 */
export function signOrder(job, { federation, scientist, key }, { requestId, now = Date.now() }) {
  const kind = Object.keys(KINDS).find((name) => job[name]);
  if (!kind) throw invalid(`a job is one of ${Object.keys(KINDS).join(", ")}`);
  if (key?.length !== 32) throw invalid("a signing key has 32 bytes");
  const { [KINDS[kind]]: model, ...spec } = job[kind];
  const validS = job.timeout ? Number(job.timeout.seconds ?? 0) + CLOCKS_S : VALID_S;
  const statement = canonicalJson({
    kind: "order",
    version: 1,
    federation,
    scientist,
    request_id: requestId,
    expires_at: new Date(now + validS * 1000).toISOString().replace(/\.\d+Z$/, "Z"),
    job: kind,
    spec: JSON.stringify(protoJson(spec)),
    model_sha256: model?.length ? createHash("sha256").update(model).digest("hex") : "",
    most_rounds: kind === "federated_training" ? rounds(spec) : 0,
  });
  const privateKey = createPrivateKey({ key: Buffer.concat([PKCS8, key]), format: "der", type: "pkcs8" });
  const signature = sign(null, Buffer.from(`sotto/v1/order\n${statement}`), privateKey);
  return { statement: Buffer.from(statement), signer: scientist, signature };
}

/** Rounds and spare rounds: zero rounds mean the default on the wire; spare rounds may be none. */
function rounds({ rounds: given, spare_rounds: spare }) {
  return (Number(given ?? 0) || DEFAULT_ROUNDS) + Number(spare ?? DEFAULT_SPARE_ROUNDS);
}

/** A message as ProtoJSON has it (https://protobuf.dev/programming-guides/json), of one as this client has it. */
function protoJson(value) {
  if (typeof value === "number") return Number.isFinite(value) ? value : String(value);
  if (Array.isArray(value)) return value.map(protoJson);
  if (typeof value === "bigint" || typeof value?.toNumber === "function") return String(value); // 64-bit integers
  if (value === null || typeof value !== "object") return value;
  const given = Object.entries(value).filter(([, item]) => item !== undefined && item !== null);
  return Object.fromEntries(
    given.map(([name, item]) => [name, name === "task_options" ? plainStruct(item) : protoJson(item)]),
  );
}

/** A google.protobuf.Struct as the JSON object that it stands for. */
function plainStruct({ fields = {} }) {
  return Object.fromEntries(Object.entries(fields).map(([name, value]) => [name, plainValue(value)]));
}

function plainValue({ number_value, string_value, bool_value, struct_value, list_value }) {
  if (struct_value) return plainStruct(struct_value);
  if (list_value) return (list_value.values ?? []).map(plainValue);
  return number_value ?? string_value ?? bool_value ?? null;
}
