"""The files of a job: fetched whole, continued, and kept only if the aggregator signed for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from src import client as client_module
from src.client import verify_manifest
from src.communication.generated import jobs_pb2
from src.communication.generated.common_pb2 import DataChunk
from src.errors import ConfigError, DigestError, InvalidInput, NotFoundError, SignatureError, SottoError, StorageError
from src.protocol.roster import Roster, save_roster, sign_roster
from src.protocol.signing import SigningKey

AGGREGATOR, OPERATOR, MALLORY = (SigningKey.from_bytes(bytes([n]) * 32) for n in (1, 2, 3))
ROSTER = Roster(
    federation="demo",
    key_id="k",
    custody="aggregator",
    threshold=0,
    colluders=0,
    aggregator_verify_key=AGGREGATOR.verify_key,
    members=(),
    created_at="2025-01-01T00:00:00Z",
)
MODEL = bytes(range(256)) * 40
JOB_ID = "0123456789abcdef"


def make_manifest(
    *, key: SigningKey = AGGREGATOR, signer: str = "aggregator", kind: str = "manifest", **changes: Any
) -> bytes:
    model = {"file": "model.safetensors", "sha256": hashlib.sha256(MODEL).hexdigest(), "bytes": len(MODEL)}
    statement = {"job_id": JOB_ID, "model": model, "rounds": [1, 2], **changes}
    signed = key.sign(kind, statement, signer=signer)
    return json.dumps({"manifest": signed.to_json(), "readable": statement}).encode()


@pytest.fixture
def house(house: Any) -> Any:
    """With a training's files, and clients that pin the roster."""
    house.service.files = {"model.safetensors": MODEL, "manifest.json": make_manifest()}
    house.roster = ROSTER
    return house


# --- files ------------------------------------------------------------------------------------------------------------


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def offsets(asked: Sequence[Any], name: str = "model.safetensors") -> list[int]:
    return [request.offset for request in downloads(asked) if request.file == name]


def downloads(asked: Sequence[Any]) -> list[Any]:
    return [request for request in asked if isinstance(request, jobs_pb2.DownloadArtifactRequest)]


async def test_a_broken_download_goes_on_after_the_last_byte(house: Any, tmp_path: Path) -> None:
    house.service.download_breaks, house.service.break_after = 2, 3
    files = await house.client().fetch_artifact(JOB_ID, tmp_path / "new" / "folder")
    assert files["model.safetensors"].read_bytes() == MODEL
    assert offsets(house.service.asked) == [0, 3000, 6000]


async def test_a_part_on_disk_is_continued_and_a_whole_file_not_fetched_again(house: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(MODEL[:5000])
    client = house.client()
    files = await client.fetch_artifact(JOB_ID, tmp_path)
    assert files == {name: tmp_path / name for name in ("model.safetensors", "manifest.json")}
    assert files["model.safetensors"].read_bytes() == MODEL
    assert offsets(house.service.asked) == [5000]
    assert names_in(tmp_path) == ["manifest.json", "model.safetensors"]
    await client.fetch_artifact(JOB_ID, tmp_path)
    assert len(downloads(house.service.asked)) == 2


@pytest.mark.parametrize("part", [b"x" * 5000, MODEL[:-1] + b"x", MODEL + b"x", b"x" * len(MODEL)])
async def test_a_part_on_disk_that_is_wrong_is_fetched_anew(house: Any, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(part)
    (tmp_path / "model.safetensors").write_bytes(b"the model of another job")
    files = await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert files["model.safetensors"].read_bytes() == MODEL
    assert offsets(house.service.asked)[-1] == 0


LIES: dict[str, Callable[[DataChunk], list[DataChunk]]] = {
    "a flipped bit": lambda chunk: [DataChunk(data=bytes([chunk.data[0] ^ 1]) + chunk.data[1:], offset=chunk.offset)],
    "a gap": lambda chunk: [] if chunk.offset == 1000 else [chunk],
    "a chunk twice": lambda chunk: [chunk, chunk],
    "an offset elsewhere": lambda chunk: [DataChunk(data=chunk.data, offset=chunk.offset + 1)],
    "too little": lambda chunk: [] if chunk.offset > 8000 else [chunk],
    "too much": lambda chunk: [DataChunk(data=chunk.data * 20, offset=chunk.offset)],
    "nothing": lambda chunk: [],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_bytes_that_are_not_those_announced_get_no_name(
    house: Any, tmp_path: Path, lie: Callable[[DataChunk], list[DataChunk]]
) -> None:
    house.service.lie = lie
    with pytest.raises(DigestError, match=r"model\.safetensors"):
        await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "name", ["", "..", "../model", "/etc/model", "a/b", "a\\b", ".hidden", "x.part", "a\x00b", "a" * 101, "é"]
)
async def test_a_file_may_not_choose_where_it_lands(house: Any, tmp_path: Path, name: str) -> None:
    house.service.files = {name: b"x"}
    with pytest.raises(InvalidInput, match="name"):
        await house.client(pinned=False).fetch_artifact(JOB_ID, tmp_path / "out")
    assert not downloads(house.service.asked)


async def test_a_directory_that_cannot_be_written_is_a_storage_error(house: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError):
        await house.client().fetch_artifact(JOB_ID, tmp_path / "out")


# --- what the aggregator signed ---------------------------------------------------------------------------------------

OTHER_MODEL = {"file": "model.safetensors", "sha256": "0" * 64}
BAD_MANIFESTS: dict[str, tuple[bytes, type[SottoError]]] = {
    "signed by somebody else": (make_manifest(key=MALLORY), SignatureError),
    "signed as a party": (make_manifest(signer="a"), SignatureError),
    "of another kind": (make_manifest(kind="transcript"), SignatureError),
    "of another job": (make_manifest(job_id="ffff"), SignatureError),
    "of another model": (make_manifest(model=OTHER_MODEL), DigestError),
    "of a model that is not there": (make_manifest(model={**OTHER_MODEL, "file": "other"}), DigestError),
    "of no model": (make_manifest(model={}), DigestError),
    "with a readable half of its own": (make_manifest().replace(b"[1, 2]", b"[1, 3]"), SignatureError),
    "with something added": (make_manifest()[:-1] + b', "note": "trust me"}', SignatureError),
    "not JSON": (b"?", InvalidInput),
    "not an object": (b"[]", InvalidInput),
    "without a signed half": (b'{"readable": {}}', InvalidInput),
}


@pytest.mark.parametrize(("manifest", "error"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
async def test_a_manifest_that_does_not_vouch_for_the_model_is_refused_and_nothing_kept(
    house: Any, tmp_path: Path, manifest: bytes, error: type[SottoError]
) -> None:
    house.service.files["manifest.json"] = manifest
    with pytest.raises(error):
        await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert names_in(tmp_path) == []


async def test_with_a_roster_files_without_a_manifest_are_refused(house: Any, tmp_path: Path) -> None:
    del house.service.files["manifest.json"]
    with pytest.raises(SignatureError, match="no manifest"):
        await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert await house.client(pinned=False).fetch_artifact(JOB_ID, tmp_path)


def other_files(name: str, data: bytes, **changes: Any) -> dict[str, bytes]:
    model = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return {name: data, "manifest.json": make_manifest(model=model, **changes)}


KINDS: dict[str, dict[str, bytes]] = {
    "an export": other_files("model.npz", b"npz" * 1000, exported_from={"job_id": "j"}),
    "an evaluation": other_files("model.safetensors", MODEL, evaluated={"job_id": "j"}),
    "an evaluation that keeps its model": {"manifest.json": make_manifest(evaluated={"job_id": "j"})},
}


@pytest.mark.parametrize("files", KINDS.values(), ids=KINDS)
async def test_the_artifact_of_every_kind_of_job_is_fetched_and_verified(
    house: Any, tmp_path: Path, files: dict[str, bytes]
) -> None:
    house.service.files = files
    fetched = await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert {name: path.read_bytes() for name, path in fetched.items()} == files
    assert verify_manifest(tmp_path / "manifest.json", ROSTER, job_id=JOB_ID)["job_id"] == JOB_ID


BAD_ARTIFACTS: dict[str, dict[str, bytes]] = {
    "an export with another model": {**other_files("model.npz", b"npz"), "model.npz": b"NPZ"},
    "a file that nobody vouches for": {**other_files("model.npz", b"npz"), "run.py": b"print()"},
    "an evaluation with another model": {**KINDS["an evaluation"], "model.safetensors": b"another"},
    "an evaluation of another file": {**KINDS["an evaluation that keeps its model"], "model.npz": MODEL},
    "a training without its model": {"manifest.json": make_manifest()},
}


@pytest.mark.parametrize("files", BAD_ARTIFACTS.values(), ids=BAD_ARTIFACTS)
async def test_files_that_the_manifest_does_not_vouch_for_are_not_kept(
    house: Any, tmp_path: Path, files: dict[str, bytes]
) -> None:
    house.service.files = files
    with pytest.raises(DigestError):
        await house.client().fetch_artifact(JOB_ID, tmp_path)
    assert names_in(tmp_path) == []


async def test_files_that_were_deleted_are_not_found(house: Any, tmp_path: Path) -> None:
    house.service.deleted = True
    with pytest.raises(NotFoundError, match="deleted"):
        await house.client().fetch_artifact(JOB_ID, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kept_artifact_can_be_verified_again_and_every_flipped_byte_shows(tmp_path: Path) -> None:
    path, model = tmp_path / "manifest.json", tmp_path / "model.safetensors"
    path.write_bytes(make_manifest())
    model.write_bytes(MODEL)
    assert verify_manifest(path, ROSTER)["rounds"] == [1, 2]
    good = path.read_bytes()
    for index in range(len(good)):
        path.write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
        with pytest.raises(InvalidInput):
            verify_manifest(path, ROSTER)
    path.write_bytes(good)
    model.write_bytes(MODEL[:-1])
    with pytest.raises(DigestError):
        verify_manifest(path, ROSTER)


async def test_a_configuration_is_all_it_takes(house: Any, tmp_path: Path) -> None:
    save_roster(tmp_path / "roster.json", sign_roster(ROSTER, OPERATOR), operator_verify_key=OPERATOR.verify_key)
    path = tmp_path / "client.yaml"
    path.write_text(
        f"version: 1\nfederation: demo\nserver: {{address: '{house.address}', insecure: true}}\n"
        "keys: {roster: roster.json}\n"
    )
    async with client_module.AsyncSottoClient.from_config(path) as client:
        house.service.files["manifest.json"] = make_manifest(key=MALLORY)
        with pytest.raises(SignatureError):
            await client.fetch_artifact(JOB_ID, tmp_path / "out")
    with pytest.raises(ConfigError, match="no such"):
        client_module.AsyncSottoClient.from_config(tmp_path / "none.yaml")


# --- of a released round ----------------------------------------------------------------------------------------------


def of_round(number: int) -> dict[str, bytes]:
    return {"model.safetensors": MODEL, "manifest.json": make_manifest(of_round={"round": number})}


async def test_a_round_is_fetched_by_its_number_and_by_the_very_files_that_were_named(
    house: Any, tmp_path: Path
) -> None:
    house.service.files = of_round(5)
    files = await house.client().fetch_artifact(JOB_ID, tmp_path, round=5)
    assert files["model.safetensors"].read_bytes() == MODEL
    asked = {request.file: (request.round, request.sha256) for request in downloads(house.service.asked)}
    assert asked == {name: ("5", hashlib.sha256(data).digest()) for name, data in of_round(5).items()}


@pytest.mark.parametrize("meant", [{"round": "last"}, {"best": "auc"}, {"round": "7"}])
async def test_what_was_meant_by_a_word_is_one_round_from_then_on(
    house: Any, tmp_path: Path, meant: dict[str, str]
) -> None:
    house.service.files = of_round(7)
    await house.client().fetch_artifact(JOB_ID, tmp_path, **meant)
    assert {request.round for request in downloads(house.service.asked)} == {"7"}


async def test_a_manifest_of_a_job_that_moves_on_is_asked_for_again(house: Any, tmp_path: Path) -> None:
    house.service.files, house.service.moved_on = of_round(5), {"manifest.json": 3}
    files = await house.client().fetch_artifact(JOB_ID, tmp_path, round=5)
    assert names_in(tmp_path) == ["manifest.json", "model.safetensors"]
    assert len(offsets(house.service.asked)) == 1  # the model is the same all the time
    house.service.moved_on = {"manifest.json": 1000}
    files["manifest.json"].unlink()
    with pytest.raises(NotFoundError, match="moves on faster"):
        await house.client().fetch_artifact(JOB_ID, tmp_path, round=5)


async def test_the_manifest_of_another_round_is_none(house: Any, tmp_path: Path) -> None:
    house.service.files = of_round(4)
    with pytest.raises(SignatureError, match="the manifest is of round 4"):
        await house.client().fetch_artifact(JOB_ID, tmp_path, round=5)
    assert names_in(tmp_path) == []


async def test_what_a_job_goes_on_from_is_verified_before_it_is_signed(house: Any) -> None:
    house.service.files = of_round(5)
    source = await house.client().continued_from(JOB_ID, round=5)
    assert (source.job_id, source.round) == (JOB_ID, 5)
    assert source.model_sha256 == hashlib.sha256(MODEL).hexdigest()
    house.service.files["manifest.json"] = make_manifest(key=MALLORY, of_round={"round": 5})
    with pytest.raises(SignatureError):
        await house.client().continued_from(JOB_ID, round=5)


@pytest.mark.parametrize(
    "meant", [{"round": -1}, {"round": 0}, {"round": "x"}, {"best": "n"}, {"round": 1, "best": "auc"}]
)
async def test_what_is_no_round_is_not_even_asked_for(house: Any, meant: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        await house.client().result(JOB_ID, **meant)
    assert house.service.asked == []
