// node run.mjs --kit DIR --address HOST:PORT --task NAME [--rounds N] --out DIR
// Submits a job, prints its events as they come, waits for it, fetches what it made, and verifies that. The exit code
// is 0 only if all of it is right.

import { randomUUID } from "node:crypto";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { SottoClient, SottoError, toDate } from "./client.mjs";
import { loadRoster, verifyManifest } from "./verify.mjs";

const USAGE = `usage: node run.mjs --kit DIR --address HOST:PORT --out DIR [what to do]
  --task NAME           submit a federated training of this task
    --rounds N          rounds (default: the aggregator's)
    --spec JSON         further fields of sotto.v1.FederatedTraining, such as '{"local_training": {"epsilon": 2}}'
    --request-id TEXT   the same text gives the same job again
  --job ID              come back to a job that was submitted before
  --verify              verify what lies in --out already; no aggregator is asked
exit codes: 0 all is right, 1 it is not (why is on stderr), 2 usage`;

function usage(problem) {
  console.error(`${problem}\n${USAGE}`);
  process.exit(2);
}

function options() {
  const text = { type: "string" };
  const names = ["kit", "address", "out", "task", "rounds", "spec", "request-id", "job"];
  const known = { ...Object.fromEntries(names.map((name) => [name, text])), verify: { type: "boolean" } };
  let values;
  try {
    ({ values } = parseArgs({ options: known }));
    values.spec = JSON.parse(values.spec ?? "{}");
  } catch (error) {
    usage(error.message);
  }
  if (!values.kit || !values.out) usage("--kit and --out are needed");
  if (!values.verify && !values.address) usage("--address is needed");
  if (!values.verify && !values.task === !values.job) usage("one of --task, --job and --verify is needed");
  return values;
}

/** Text from elsewhere, without what would move a terminal's cursor. */
const plain = (text) => text.replace(/\p{Cc}/gu, " ");

function show(event) {
  const time = toDate(event.time).toISOString();
  console.log(`event ${event.sequence} ${time} ${event.kind}: ${plain(event.message)}`);
  const metrics = Object.entries(event.round?.metrics ?? {}).sort(); // a map of the wire has no order
  const texts = metrics.map(([name, value]) => `${plain(name)} ${value.toPrecision(5)}`);
  if (texts.length) console.log(`  ${texts.join(", ")}`);
}

function tell(manifest) {
  const { job_id: jobId, federation, order, privacy, statements } = manifest;
  console.log(`verified: manifest of job ${jobId}, signed by the aggregator of federation ${federation}`);
  console.log(`  ${order?.signer ? `ordered by ${order.signer}, and signed` : "nobody signed for this job"}`);
  if (typeof privacy === "string") console.log(`  privacy: ${plain(privacy)}`);
  else {
    console.log(`  one row of a party's data: epsilon ${privacy.example.epsilon}, delta ${privacy.example.delta}`);
    console.log(`  a party as a whole: epsilon ${privacy.party.epsilon}, delta ${privacy.party.delta}`);
  }
  for (const line of statements) console.log(`  ${plain(line)}`);
}

async function run(client, { task, rounds, spec, out, job, "request-id": requestId = randomUUID() }) {
  let jobId = job;
  if (!jobId) {
    const training = { task, ...(rounds && { rounds }), ...spec };
    ({ jobId } = await client.submit({ federated_training: training }, { requestId }));
    console.log(`job ${jobId} (request ${requestId})`);
  }
  for await (const event of client.watch(jobId)) show(event);
  const operation = await client.wait(jobId);
  if (operation.error) throw operation.error;
  const { files, manifest } = await client.fetch(jobId, out);
  for (const { name, bytes, sha256 } of operation.result.files) {
    console.log(`file ${files[name]} ${bytes} bytes, SHA-256 ${sha256.toString("hex")}`);
  }
  tell(manifest);
}

function explain(error) {
  if (!(error instanceof SottoError)) return console.error(error);
  const { code, reason, domain, message, violations, metadata } = error;
  console.error(plain(`${code} ${reason}${domain && ` (${domain})`}: ${message}`));
  for (const [field, text] of Object.entries(violations)) console.error(plain(`  field ${field}: ${text}`));
  for (const [name, text] of Object.entries(metadata)) console.error(plain(`  ${name}: ${text}`));
}

const wishes = options();
let client;
try {
  if (wishes.verify) {
    const roster = await loadRoster(join(wishes.kit, "roster.json"));
    tell(await verifyManifest(join(wishes.out, "manifest.json"), roster, { jobId: wishes.job }));
  } else {
    client = await SottoClient.fromKit(wishes.kit, { address: wishes.address });
    await run(client, wishes);
  }
} catch (error) {
  explain(error);
  process.exitCode = 1;
} finally {
  client?.close();
}
