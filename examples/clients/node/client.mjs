// A scientist's side of Sotto: submit a job, watch it, wait for it, fetch what it made, believe only what is signed.
//
//   const client = await SottoClient.fromKit("kits/scientist", { address: "aggregator.example.org:50051" });
//   const { jobId } = await client.submit({ federated_training: { task: "randhie", rounds: 5 } });
//   for await (const event of client.watch(jobId)) console.log(event.sequence, event.kind, event.message);
//   const { files, manifest } = await client.fetch(jobId, "out");
//
// Every call may be sent twice (submissions carry a request_id), so all of them are repeated while the aggregator is
// away; a watch goes on after the last event that came, a download after the last byte on disk.

import { randomUUID } from "node:crypto";
import { mkdir, open, readFile, rename, rm } from "node:fs/promises";
import { isIP } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { checkServerIdentity } from "node:tls";

import grpc from "@grpc/grpc-js";

import { holderOf, signOrder } from "./order.mjs";
import { loadRoster, sha256Of, verifyManifest } from "./verify.mjs";
import { JobService, Operations, SottoError, toDuration, toNumber, unknownFields, unpack } from "./wire.mjs";

export { SottoError, toDate, toNumber } from "./wire.mjs";

export const AT_REST = new Set(["SUCCEEDED", "FAILED", "CANCELLED"]);

const OPERATION_PREFIX = "operations/";
const RETRY_FOR_S = 60; // a restart of the aggregator takes seconds
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 5000;
const WAIT_SLICE_S = 30; // of one WaitOperation: shorter than what proxies cut off
const FILE_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/; // whoever sends a file may not choose where it lands

const CHANNEL_OPTIONS = {
  // The server takes a ping every 10 s at most; a network that drops silently is noticed after 30 s.
  "grpc.keepalive_time_ms": 20_000,
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.keepalive_permit_without_calls": 1,
  "grpc.initial_reconnect_backoff_ms": 200,
  "grpc.max_reconnect_backoff_ms": 5_000,
  "grpc.enable_retries": 0, // this client knows what may be sent twice
};

/** This end's certificate, and belief in servers of `ca` whose certificate names the host that was dialled. */
function mutualTls(address, [ca, key, cert]) {
  const host = address.replace(/:\d+$/, "").replace(/^\[|\]$/g, "");
  if (!isIP(host)) return { credentials: grpc.credentials.createSsl(ca, key, cert) };
  // grpc-js would send the address as TLS server name, which RFC 6066 does not permit and of which Node warns. So
  // another name is sent, which nobody looks at, and the certificate is checked for the address all the same.
  const checks = { checkServerIdentity: (_, certificate) => checkServerIdentity(host, certificate) };
  return {
    credentials: grpc.credentials.createSsl(ca, key, cert, checks),
    options: { "grpc.ssl_target_name_override": "aggregator" },
  };
}

const invalid = (text, violations = {}) =>
  new SottoError(text, { code: "INVALID_ARGUMENT", reason: "INVALID_INPUT", violations });
const differs = (text) => new SottoError(text, { code: "DATA_LOSS", reason: "DIGEST_MISMATCH" });

/** Growing pauses between attempts, bounded one by one and all together. */
class Patience {
  constructor(retryForS) {
    this.retryForMs = retryForS * 1000;
    this.reset();
  }

  /** Something came: the next failure is a first one again. */
  reset() {
    this.since = undefined; // of the first failure, not of the last word: a job may be silent for hours
    this.pauseMs = FIRST_PAUSE_MS;
  }

  /** Waits before the next attempt; throws `error` where there is nothing to wait for, or no time left. */
  async pause(error) {
    this.since ??= Date.now();
    if (!error.isAway || Date.now() + this.pauseMs > this.since + this.retryForMs) throw error;
    await sleep(this.pauseMs);
    this.pauseMs = Math.min(2 * this.pauseMs, LONGEST_PAUSE_MS);
  }
}

export class SottoClient {
  #jobs;
  #operations;
  #metadata = new grpc.Metadata();
  #roster;
  #signer;
  #retryForS;

  /**
   * address: "host:port"; ca, cert, key: PEM texts or Buffers. Or insecure: "role/name" for an aggregator without TLS,
   * which listens on loopback only. roster: pinned, as `loadRoster` gives it; without one `fetch` checks digests alone.
   * signer: who signs jobs, { federation, scientist, key }: without one they are not signed, which few aggregators take.
   * retryForS: how long the aggregator may be away. Dials with the first call.
   */
  constructor({ address, ca, cert, key, insecure, roster, signer, retryForS = RETRY_FOR_S }) {
    if (!address) throw new TypeError("address: host:port of the aggregator");
    if (!insecure && !(ca && cert && key)) throw new TypeError("ca, cert and key, or insecure: 'role/name'");
    if (insecure) this.#metadata.set("sotto-identity", insecure);
    const { credentials, options } = insecure
      ? { credentials: grpc.credentials.createInsecure() }
      : mutualTls(address, [ca, key, cert].map((pem) => Buffer.from(pem)));
    this.#jobs = new JobService(address, credentials, { ...CHANNEL_OPTIONS, ...options });
    this.#operations = new Operations(address, credentials, { channelOverride: this.#jobs.getChannel() });
    this.#roster = roster;
    this.#signer = signer;
    this.#retryForS = retryForS;
  }

  /** With the TLS files, the signing key and the pinned roster of a scientist's kit, as `sotto provision` made it. */
  static async fromKit(kit, options) {
    const read = (name) => readFile(join(kit, "tls", `${name}.pem`));
    const [ca, cert, key] = await Promise.all(["ca", "cert", "key"].map(read));
    const signer = { ...holderOf(cert), key: await readFile(join(kit, "signing.key")) };
    return new SottoClient({ ca, cert, key, signer, roster: await loadRoster(join(kit, "roster.json")), ...options });
  }

  close() {
    this.#jobs.close();
  }

  // --- calls -------------------------------------------------------------------------------------------------------

  /** One call, repeated while the aggregator is away; a SottoError when it does not work. */
  async #call(stub, method, request) {
    const patience = new Patience(this.#retryForS);
    for (;;) {
      try {
        return await new Promise((resolve, reject) => {
          stub[method](request, this.#metadata, (error, answer) => (error ? reject(error) : resolve(answer)));
        });
      } catch (error) {
        await patience.pause(SottoError.fromCall(error));
      }
    }
  }

  /** The messages of a stream, opened again while the aggregator is away: by `request()`, which says where to go on. */
  async *#stream(method, request) {
    const patience = new Patience(this.#retryForS);
    for (;;) {
      const call = this.#jobs[method](request(), this.#metadata);
      call.on("error", () => {}); // also when nobody reads any more: an event without a listener ends the process
      try {
        for await (const message of call) {
          patience.reset();
          yield message;
        }
        return;
      } catch (error) {
        await patience.pause(SottoError.fromCall(error));
      } finally {
        call.cancel(); // whoever leaves the loop early hangs up
      }
    }
  }

  // --- jobs --------------------------------------------------------------------------------------------------------

  /**
   * Submits a job: fields of sotto.v1.Job that a scientist sets, by their names in jobs.proto, such as
   * { display_name, federated_training: { task, rounds } }. The same requestId gives the same job, however often it is
   * sent, and signed. A field that jobs.proto has not is refused here: a misspelt epsilon must not become the default one.
   * Returns the operation, as `wait` does: at once, or within `inlineWaitS` when the job is at rest by then.
   */
  async submit(job, { requestId = randomUUID(), inlineWaitS = 0 } = {}) {
    const request = { request_id: requestId, job, inline_wait_s: inlineWaitS };
    const unknown = unknownFields("sotto.v1.JobService", "CreateJob", request);
    if (unknown.length) {
      const fields = unknown.map((path) => path.replace(/^job\./, ""));
      const violations = Object.fromEntries(fields.map((path) => [path, "there is no such field"]));
      throw invalid(`unknown: ${fields.join(", ")}`, violations);
    }
    if (this.#signer) request.order = signOrder(job, this.#signer, { requestId });
    return toOperation(await this.#call(this.#jobs, "CreateJob", request));
  }

  /** A job with its progress. */
  get(jobId) {
    return this.#call(this.#jobs, "GetJob", { job_id: jobId });
  }

  /** Jobs, newest first, page by page: `for await (const job of client.list({ filter: "state=RUNNING" }))`. */
  async *list({ filter = "", orderBy = "", pageSize = 0 } = {}) {
    let token = "";
    do {
      const request = { filter, order_by: orderBy, page_size: pageSize, page_token: token };
      const page = await this.#call(this.#jobs, "ListJobs", request);
      yield* page.jobs;
      token = page.next_page_token;
    } while (token);
  }

  /** Asks a job to stop. One at rest stays as it is. */
  cancel(jobId) {
    return this.#call(this.#jobs, "CancelJob", { job_id: jobId });
  }

  /** How the aggregator is. */
  status() {
    return this.#call(this.#jobs, "GetStatus", {});
  }

  /**
   * The job's events after a sequence number, then each as it happens, until the job is at rest. Every event comes
   * once, also when the connection is lost in between: the next WatchJob asks for what follows the last one seen.
   */
  async *watch(jobId, { afterSequence = 0 } = {}) {
    let last = toNumber(afterSequence);
    for await (const event of this.#stream("WatchJob", () => ({ job_id: jobId, after_sequence: last }))) {
      const sequence = toNumber(event.sequence);
      if (sequence <= last) continue;
      last = sequence;
      yield event;
    }
  }

  /**
   * The operation once its job is at rest: { jobId, done, metadata: sotto.v1.OperationMetadata, result: JobResult or
   * undefined, error: SottoError or undefined }. A DEADLINE_EXCEEDED when it is not within `timeoutS`; it goes on then.
   */
  async wait(jobId, { timeoutS = Infinity } = {}) {
    const end = Date.now() + timeoutS * 1000;
    for (;;) {
      const left = Math.max(0, (end - Date.now()) / 1000);
      const request = { name: OPERATION_PREFIX + jobId, timeout: toDuration(Math.min(WAIT_SLICE_S, left)) };
      const operation = await this.#call(this.#operations, "WaitOperation", request);
      if (operation.done) return toOperation(operation);
      if (Date.now() >= end) {
        const code = "DEADLINE_EXCEEDED";
        throw new SottoError(`job ${jobId} is not at rest after ${timeoutS} s`, { code, reason: code });
      }
    }
  }

  // --- artifacts ---------------------------------------------------------------------------------------------------

  /**
   * Fetches the files of a job that succeeded into a directory: { files: paths by name, manifest: what the aggregator
   * signed, or undefined without a roster }. What is there already is not fetched again, and what is there in part
   * ("….part") is continued. Files get their names only when all have the announced SHA-256 and the manifest is signed
   * by the roster's aggregator and speaks of this job and this model.
   */
  async fetch(jobId, directory) {
    const job = await this.get(jobId);
    if (job.state !== "SUCCEEDED") {
      throw new SottoError(`job ${jobId} is ${job.state}`, { code: "FAILED_PRECONDITION", reason: "WRONG_STATE" });
    }
    await mkdir(directory, { recursive: true });
    const fetched = {};
    for (const file of job.result.files) fetched[file.name] = await this.#download(jobId, file, directory);
    let manifest;
    if (this.#roster) {
      try {
        const path = fetched["manifest.json"] ?? join(directory, "manifest.json");
        manifest = await verifyManifest(path, this.#roster, { files: fetched, jobId });
      } catch (error) {
        await Promise.all(Object.values(fetched).filter(isPart).map((path) => rm(path, { force: true })));
        throw error;
      }
    }
    const files = {};
    for (const [name, path] of Object.entries(fetched)) {
      files[name] = join(directory, name);
      if (isPart(path)) await rename(path, files[name]);
    }
    return { files, manifest };
  }

  /** Where the whole file lies, its digest verified: under its name if it was there before, else with ".part". */
  async #download(jobId, { name, bytes, sha256 }, directory) {
    if (!FILE_NAME.test(name) || isPart(name)) {
      throw invalid(`an artifact's file has a name that is not a plain one: ${JSON.stringify(name)}`);
    }
    const wanted = sha256.toString("hex");
    const target = join(directory, name);
    const part = `${target}.part`;
    if ((await sha256Of(target)) === wanted) return target;
    for (;;) {
      const resumed = await this.#append(jobId, name, toNumber(bytes), part);
      if ((await sha256Of(part)) === wanted) return part;
      await rm(part);
      // What an earlier attempt left may be of another file; what came in one piece may not.
      if (!resumed) throw differs(`${name} does not have the announced SHA-256`);
    }
  }

  /** Adds to a file what it lacks of `total` bytes; returns whether something was there before. */
  async #append(jobId, name, total, path) {
    const file = await open(path, "a");
    try {
      const before = (await file.stat()).size;
      let size = before;
      const request = () => ({ job_id: jobId, file: name, offset: size });
      if (size < total) {
        for await (const { data, offset } of this.#stream("DownloadArtifact", request)) {
          if (toNumber(offset) !== size || size + data.length > total) {
            throw differs(`${name}: a piece that does not follow byte ${size} of ${total}`);
          }
          await file.appendFile(data);
          size += data.length;
        }
      }
      await file.sync();
      return before > 0;
    } finally {
      await file.close();
    }
  }
}

const isPart = (path) => path.endsWith(".part");

/** A google.longrunning.Operation with its Any fields unpacked. */
function toOperation({ name, done, metadata, response, error }) {
  return {
    jobId: name.slice(OPERATION_PREFIX.length),
    done,
    metadata: metadata && unpack(metadata),
    result: response ? unpack(response) : undefined,
    error: error ? SottoError.fromStatus(error) : undefined,
  };
}
