"""The demonstration from kits to comparison."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import shutil
import string
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..client import AsyncSottoClient
from ..communication.generated import jobs_pb2
from ..errors import ConfigError, DeadlineError, JobFailed
from ..jobs.spec import FederatedTrainingSpec, LocalTraining, PartyPrivacy, spec_to_proto
from ..learning.tasks.randhie import DEMO, RandHieTask
from ..privacy.accounting import MEANINGLESS_EPSILON
from ..protocol.canonical import number_or_inf
from ..provisioning import Summary, provision
from .processes import Roles
from .view import View, epsilon

FEDERATION: Final = "demo"
SPARE_ROUNDS: Final = 1
TRAINING_ROWS: Final = 3 * DEMO.declared_rows
"""Rows that are not held out, rounded: what parties declare together."""
START_TIMEOUT_S: Final = 120.0
ROUND_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a person may choose; `threshold` None is the least that the rule allows."""

    parties: int = DEMO.parties
    rounds: int = DEMO.rounds
    threshold: int | None = None
    modulus_bits: int = 3072
    insecure_small_modulus: bool = False
    seed: int = 0
    out: Path = Path("runs")

    def __post_init__(self) -> None:
        checks = {
            "--parties: from 2 to 20": 2 <= self.parties <= 20,
            "--rounds: from 1 to 1000": 1 <= self.rounds <= 1000,
            "--seed: a whole number from 0 to 2^53 - 1": 0 <= self.seed < 2**53,
        }
        problems = tuple(text for text, holds in checks.items() if not holds)
        if problems:
            raise ConfigError("the demo cannot be run like this", problems=problems)

    @property
    def names(self) -> tuple[str, ...]:
        """a, b, c, …"""
        return tuple(string.ascii_lowercase[: self.parties])

    @property
    def declared_rows(self) -> int:
        """What each party declares: the training rows, shared evenly."""
        return TRAINING_ROWS // self.parties


class Demo:
    """One run."""

    def __init__(self, options: Options, view: View) -> None:
        self._options = options
        self._view = view
        self._started = time.monotonic()
        self._work = options.out.absolute() / f".work-{secrets.token_hex(4)}"

    async def run(self) -> dict[str, Any]:
        """Provision, start, train, compare, report; returns the JSON object that `--json` prints."""
        options, view = self._options, self._view
        view.note(f"{options.parties} parties, an aggregator, a scientist: processes of their own, mTLS over loopback")
        self._work.mkdir(parents=True, mode=0o700)
        roles = Roles(self._work)
        try:
            summary = await self._provision()
            result, job = await self._federate(roles, summary)
        except JobFailed as error:
            self._show_logs(roles, error)
            raise
        finally:
            roles.stop()
        directory = options.out.absolute() / job.job_id
        (directory / "logs").mkdir(exist_ok=True)
        for role in roles.running.values():
            role.log.replace(directory / "logs" / role.log.name)
        shutil.rmtree(self._work)  # keys and shares of a federation that is no more
        memory = {name: round(role.peak_mb, 1) for name, role in roles.running.items()}
        return await self._conclude(result, job, directory=directory, memory=memory)

    # --- the federation -----------------------------------------------------------------------------------------------

    async def _provision(self) -> Summary:
        options = self._options
        shared = {"parties": options.parties, "seed": options.seed}
        budget = {"example": {"epsilon": DEMO.epsilon, "delta": DEMO.delta}}
        with self._view.doing(f"making keys of {options.modulus_bits} bits and kits (certificates, shares)") as tell:
            summary = await asyncio.to_thread(
                provision,
                self._work / "kits",
                federation=FEDERATION,
                parties=options.names,
                threshold=options.threshold,
                modulus_bits=options.modulus_bits,
                insecure_small=options.insecure_small_modulus,
                progress=tell,
                aggregator_overrides={
                    "server": {"listen": "127.0.0.1:0", "address_file": "address"},
                    "evaluation": {RandHieTask.name: shared},
                },
                party_overrides={
                    "datasets": {RandHieTask.name: {"declared_rows": options.declared_rows, "options": shared}},
                    "privacy": {"budgets": budget},
                },
            )
        self._view.say(
            f"kits for {options.parties} parties: any {summary.threshold} of {options.parties} key shares open a sum, "
            f"fewer open nothing; the aggregator holds none  [{self._clock()}]"
        )
        return summary

    async def _federate(self, roles: Roles, summary: Summary) -> tuple[dict[str, Any], jobs_pb2.Job]:
        with self._view.doing("starting the roles"):
            address = await self._start_aggregator(roles, summary.out)
            for name in self._options.names:
                config = summary.out / f"party-{name}" / "party.yaml"
                arguments = ["party", "--config", str(config)]
                roles.start(f"party-{name}", arguments, {"SOTTO__SERVER__ADDRESS": address})
            client = AsyncSottoClient.from_config(summary.out / "scientist" / "client.yaml", address=address)
            async with client:
                watching = asyncio.create_task(roles.watch())
                try:
                    await self._until(self._joined(client), watching)
                    names = ", ".join(self._options.names)
                    self._view.say(f"aggregator on {address}, parties {names} connected  [{self._clock()}]")
                    job = await self._until(client.submit(self._job()), watching)
                    self._view.say(f"job {job.job_id} submitted: {self._spec().rounds} rounds of federated DP-SGD")
                    self._view.rounds_header()
                    followed: tuple[dict[str, Any], jobs_pb2.Job] = await self._until(
                        self._follow(client, job.job_id), watching
                    )
                    return followed
                finally:
                    watching.cancel()
                    with contextlib.suppress(asyncio.CancelledError, JobFailed):
                        await watching

    async def _until(self, work: Any, watching: asyncio.Task[None]) -> Any:
        """The result of `work`, unless a role ends before."""
        task = asyncio.ensure_future(work)
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            watching.result()  # raises what happened to the role
        return task.result()

    async def _start_aggregator(self, roles: Roles, kits: Path) -> str:
        config = kits / "aggregator" / "aggregator.yaml"
        roles.start("aggregator", ["aggregator", "--config", str(config)], {})
        address = config.parent / "address"
        async with asyncio.timeout(START_TIMEOUT_S):
            while not address.exists():
                roles.check()
                await asyncio.sleep(0.05)
        return address.read_text().strip()

    async def _joined(self, client: AsyncSottoClient) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    status = await client.status()
                    if all(party.connected for party in status.parties):
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError:
            missing = [party.party for party in status.parties if not party.connected]
            raise DeadlineError(f"parties {', '.join(missing)} did not join within {START_TIMEOUT_S:.0f} s") from None

    async def _follow(self, client: AsyncSottoClient, job_id: str) -> tuple[dict[str, Any], jobs_pb2.Job]:
        rounds = []
        async for event in client.watch(job_id):
            if event.kind == "round":
                self._view.round(event.round)
                rounds.append(_round_json(event.round))
            elif event.kind == "waiting":
                self._view.note(event.message)
        job = await client.get(job_id)
        if job.state != jobs_pb2.SUCCEEDED:
            text = job.error.message or jobs_pb2.JobState.Name(job.state).lower()
            raise JobFailed(f"the job ended without a model: {text}", stage=job.error.stage)
        await client.fetch_artifact(job_id, self._options.out.absolute() / job_id)
        return {"rounds": rounds}, job

    def _spec(self) -> FederatedTrainingSpec:
        demo = DEMO
        return FederatedTrainingSpec(
            task=RandHieTask.name,
            rounds=self._options.rounds,
            spare_rounds=SPARE_ROUNDS,
            seed=self._options.seed,
            round_timeout_s=ROUND_TIMEOUT_S,
            local_training=LocalTraining(
                steps=demo.local_steps,
                sampling_rate=demo.sampling_rate,
                learning_rate=demo.learning_rate,
                max_grad_norm=demo.max_grad_norm,
                epsilon=demo.epsilon,
                delta=demo.delta,
            ),
            party_privacy=PartyPrivacy(
                clipping_norm=demo.clipping_norm, noise_multiplier=demo.party_noise_multiplier, delta=demo.delta
            ),
        )

    def _job(self) -> jobs_pb2.Job:
        return jobs_pb2.Job(display_name="demo", federated_training=spec_to_proto(self._spec()))

    # --- what it was worth --------------------------------------------------------------------------------------------

    async def _conclude(
        self, result: dict[str, Any], job: jobs_pb2.Job, *, directory: Path, memory: dict[str, float]
    ) -> dict[str, Any]:
        released = [each for each in result["rounds"] if each["state"] == "RELEASED"]
        with self._view.doing("training the same model centrally, for comparison"):
            baselines = await asyncio.to_thread(self._baselines, len(result["rounds"]))
        final = job.result
        auc = dict(final.metrics)
        self._view.comparison(
            [
                ("centrally, without privacy", baselines.central, "none"),
                ("centrally, DP-SGD", baselines.central_dp, f"ε = {final.epsilon_example:.2f} a row, a trusted server"),
                ("in this federation", auc, f"ε = {final.epsilon_example:.2f} a row, no trusted server"),
            ]
        )
        self._say_what_holds(final)
        report = directory / "report.png"
        await asyncio.to_thread(self._report, report, released, baselines, final)
        self._view.say(f"model, manifest and picture: {directory}  [{self._clock()}]")
        return {
            "job_id": job.job_id,
            "rounds": result["rounds"],
            "auc": auc["auc"],
            "accuracy": auc["accuracy"],
            "auc_central": baselines.central["auc"],
            "auc_central_dp": baselines.central_dp["auc"],
            "epsilon_example": final.epsilon_example,
            "epsilon_party": number_or_inf(final.epsilon_party),
            "epsilon_party_against_aggregator": number_or_inf(final.epsilon_party_against_aggregator),
            "epsilon_party_if_all_others_collude": number_or_inf(final.epsilon_party_if_all_others_collude),
            "delta": final.delta,
            "party_delta": final.party_delta,
            "bytes_up": sum(party["bytes_up"] for each in result["rounds"] for party in each["parties"]),
            "peak_rss_mb": memory,
            "seconds": round(time.monotonic() - self._started, 2),
            "artifact": str(directory),
        }

    def _say_what_holds(self, final: jobs_pb2.JobResult) -> None:
        self._view.note(
            f"example level: ε = {final.epsilon_example:.2f} at δ = {final.delta:g} protects one row (a person-year; "
            "a person has about four) against everybody"
        )
        party = f"ε = {epsilon(final.epsilon_party)} at δ = {final.party_delta:g}"
        party += f" ({epsilon(final.epsilon_party_against_aggregator)} against the aggregator,"
        party += f" {epsilon(final.epsilon_party_if_all_others_collude)} if all others collude)"
        text = f"* party level: {party} for all rounds"
        if final.epsilon_party > MEANINGLESS_EPSILON:
            text += ": no meaningful party-level guarantee with so few parties"
        self._view.note(text)
        if math.isfinite(final.epsilon_party):
            self._view.note(f"  it assumes that {final.party_assumption}")

    def _baselines(self, rounds: int) -> Any:
        from ..learning.baselines import central, pooled_training
        from ..privacy.accounting import calibrate_dp_sgd
        from ..privacy.entropy import SystemEntropy

        demo, options = DEMO, self._options
        task = RandHieTask()
        shared = {"parties": options.parties, "seed": options.seed}
        steps = demo.local_steps * (options.rounds + SPARE_ROUNDS)
        multiplier = calibrate_dp_sgd(
            epsilon=demo.epsilon, delta=demo.delta, sampling_rate=demo.sampling_rate, steps=steps
        )
        local = replace(demo, declared_rows=options.declared_rows).local_training(noise_multiplier=multiplier)
        return central(
            task,
            [task.load_data({"party": index, **shared}) for index in range(options.parties)],
            holdout=task.load_holdout(shared),
            plain=demo.central_training(),
            private=pooled_training(
                local, rounds=rounds, parties=options.parties, learning_rate=demo.central_dp_learning_rate
            ),
            seed=options.seed,
            entropy=SystemEntropy(),
            threads=max(1, (os.cpu_count() or 2) // 2),
        )

    def _report(self, path: Path, released: list[dict[str, Any]], baselines: Any, final: jobs_pb2.JobResult) -> None:
        from ..learning.report import write_report

        options = self._options
        write_report(
            path,
            [
                {
                    "round": each["round"],
                    "auc": each["metrics"]["auc"],
                    "epsilon": max(party["example_epsilon_spent"] for party in each["parties"]),
                }
                for each in released
            ],
            comparison={"central": baselines.central["auc"], "central_dp": baselines.central_dp["auc"]},
            budget={"epsilon": DEMO.epsilon, "delta": DEMO.delta},
            party_level={"epsilon": final.epsilon_party, "delta": final.party_delta, "parties": options.parties},
            subtitle=(
                f"RAND Health Insurance Experiment, {options.parties} parties, Paillier {options.modulus_bits} bit, "
                f"seed {options.seed}"
            ),
        )

    # --- failures -----------------------------------------------------------------------------------------------------

    def _show_logs(self, roles: Roles, error: JobFailed) -> None:
        """Of the role that failed; where a job failed, of the aggregator and of every party it names."""
        failing = error.metadata.get("role", "")
        named = [name for name in self._options.names if f"{name}: " in error.message]
        for name in [failing] if failing else ["aggregator", *(f"party-{each}" for each in named)]:
            if name in roles.running:
                self._view.failure(name, roles.running[name].tail())
        self._view.note(f"everything is kept in {self._work}")

    def _clock(self) -> str:
        return f"{time.monotonic() - self._started:.1f} s"


def _round_json(summary: jobs_pb2.RoundSummary) -> dict[str, Any]:
    return {
        "round": summary.round,
        "state": summary.state,
        "contributions": summary.contributions,
        "metrics": dict(summary.metrics),
        "epsilon_party": number_or_inf(summary.epsilon_party),
        "epsilon_party_against_aggregator": number_or_inf(summary.epsilon_party_against_aggregator),
        "parties": [
            {
                "party": party.party,
                "bytes_up": party.bytes_up,
                "example_epsilon_spent": party.example_epsilon_spent,
                "example_epsilon_left": party.example_epsilon_left,
                "example_epsilon_left_delta": party.example_epsilon_left_delta,
            }
            for party in summary.parties
        ],
        "seconds": summary.seconds if summary.HasField("seconds") else None,
        "reason": summary.reason,
    }
