// The wire: what the .proto files say, loaded at run time, and what a failed call says.
//
// How values look here: fields and enumerations by their names in the .proto files (so that the fields that an error
// names are those that were sent); bytes are Buffers; 64-bit integers are decimal strings, as in protobuf's own JSON,
// because a JavaScript number is exact only below 2^53. `toNumber` makes a number of one, or refuses.

import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const at = (path) => fileURLToPath(new URL(path, import.meta.url));

const definition = protoLoader.loadSync(["sotto/v1/jobs.proto", "google/rpc/error_details.proto"], {
  includeDirs: [process.env.SOTTO_PROTO ?? at("../../../proto"), at("../third_party")],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true, // an absent message is null, an absent list empty; what is `optional` stays absent
  oneofs: true, // job.spec === "federated_training"
});

const { sotto, google } = grpc.loadPackageDefinition(definition);
export const JobService = sotto.v1.JobService;
export const Operations = google.longrunning.Operations;

/** A 64-bit integer of the wire as a number; throws a RangeError where it would not be exact. */
export function toNumber(text) {
  const value = Number(text);
  if (!Number.isSafeInteger(value)) throw new RangeError(`${text} is no number that JavaScript holds exactly`);
  return value;
}

/** A google.protobuf.Timestamp as a Date; null stays null. */
export const toDate = (time) => time && new Date(toNumber(time.seconds) * 1000 + Math.floor(time.nanos / 1e6));

/** Seconds as a google.protobuf.Duration. */
export function toDuration(seconds) {
  const whole = Math.floor(seconds);
  return { seconds: whole, nanos: Math.floor((seconds - whole) * 1e9) };
}

/** What a google.protobuf.Any holds; undefined for a type that the .proto files do not know. */
export const unpack = (any) => definition[any.type_url.split("/").pop()]?.deserialize(any.value);

/** Paths of fields that `request` has and the method's .proto has not. protobufjs would drop them without a word. */
export function unknownFields(service, method, request) {
  const { requestSerialize, requestDeserialize } = definition[service][method];
  return [...missing(request, requestDeserialize(requestSerialize(request)), "")];
}

function* missing(given, kept, path) {
  for (const [name, value] of Object.entries(given)) {
    const here = path ? `${path}.${name}` : name;
    if (value === undefined || value === null) continue;
    if (kept[name] === undefined || kept[name] === null) yield here;
    else if (typeof value === "object" && !ArrayBuffer.isView(value)) yield* missing(value, kept[name], here);
  }
}

// As in src/errors.py.
const PASSING = new Set(["UNAVAILABLE", "CANCELLED", "TOO_MANY_CALLS", "STORAGE_FULL", "LEASE_LOST"]);

const CODE_NAMES = Object.fromEntries(Object.entries(grpc.status).map(([name, number]) => [number, name]));

/**
 * Why something did not work (AIP-193). For programs: `reason`, an UPPER_SNAKE_CASE word that is unique in `domain`.
 *
 * code: the name of the gRPC status; metadata: strings by name; violations: texts by the path of the field at fault.
 */
export class SottoError extends Error {
  constructor(message, { code = "UNKNOWN", reason = "", domain = "", metadata = {}, violations = {}, cause } = {}) {
    super(message, { cause });
    Object.assign(this, { name: "SottoError", code, reason, domain, metadata, violations });
  }

  /** Of a google.rpc.Status: the details of a failed call, or an operation's error. */
  static fromStatus({ code, message, details }, cause) {
    const said = { code: CODE_NAMES[code] ?? "UNKNOWN", cause };
    for (const detail of details) {
      const value = unpack(detail);
      if (detail.type_url.endsWith("/google.rpc.ErrorInfo")) {
        Object.assign(said, { reason: value.reason, domain: value.domain, metadata: value.metadata });
      } else if (detail.type_url.endsWith("/google.rpc.BadRequest")) {
        const pairs = value.field_violations.map(({ field, description }) => [field, description]);
        said.violations = Object.fromEntries(pairs);
      }
    }
    return new SottoError(message, said);
  }

  /** Of what a call raised. The details travel as a google.rpc.Status in the trailer grpc-status-details-bin. */
  static fromCall(error) {
    if (error instanceof SottoError || error?.code === undefined || !(error.metadata instanceof grpc.Metadata)) {
      return error;
    }
    const [details] = error.metadata.get("grpc-status-details-bin");
    if (details) return SottoError.fromStatus(definition["google.rpc.Status"].deserialize(details), error);
    return new SottoError(error.details || error.message, { code: CODE_NAMES[error.code], cause: error });
  }

  /** The aggregator is away or going, or has no room for it now: the same call may be sent again. */
  get isAway() {
    return this.code === "UNAVAILABLE" || (this.code === "CANCELLED" && !this.reason) || PASSING.has(this.reason);
  }
}
