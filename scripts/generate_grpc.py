"""Generate gRPC stubs flat into src/communication/generated with relative imports; `--check` only compares.

Two rewrites make the flat, relative layout work (in .py and .pyi): `from sotto.v1 import x_pb2` becomes `from . import
x_pb2`, and the module name given to the message builder becomes `__name__`, without which messages cannot be pickled.
"""

from __future__ import annotations

import filecmp
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.longrunning import operations_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "communication" / "generated"
COMMON_PROTOS = Path(str(operations_pb2.__file__)).resolve().parents[2]
DOCSTRING = '"""Generated from proto/ by generate_grpc.sh: never edit a file here."""\n'


def stage_operations(include: Path) -> None:
    """The package ships operations_proto.proto; under its canonical name what is generated imports."""
    target = include / "google" / "longrunning" / "operations.proto"
    target.parent.mkdir(parents=True)
    shutil.copy(COMMON_PROTOS / "google" / "longrunning" / "operations_proto.proto", target)


def compile_protos(include: Path, out: Path) -> None:
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{include}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"-I{COMMON_PROTOS}",
        f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python")),
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *(str(path) for path in protos),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")


def rewrite(text: str) -> str:
    text = re.sub(r"from sotto\.v1 import (\w+_pb2)", r"from . import \1", text)
    text = re.sub(r"(BuildTopDescriptorsAndMessages\(DESCRIPTOR, )'sotto\.v1\.\w+'", r"\1__name__", text)
    # In .pyi files mypy-protobuf writes absolute names.
    text = re.sub(r"^import sotto\.v1\.(\w+_pb2)$", r"from . import \1", text, flags=re.MULTILINE)
    text = re.sub(r"^from sotto\.v1\.(\w+_pb2) import", r"from .\1 import", text, flags=re.MULTILINE)
    return re.sub(r"\bsotto\.v1\.(\w+_pb2)\b", r"\1", text)


def generate(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        include, out = Path(scratch, "include"), Path(scratch, "out")
        out.mkdir()
        stage_operations(include)
        compile_protos(include, out)
        target.mkdir(parents=True, exist_ok=True)
        (target / "__init__.py").write_text(DOCSTRING)
        for path in sorted((out / "sotto" / "v1").iterdir()):
            (target / path.name).write_text(rewrite(path.read_text()))


def check() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "generated")
        generate(fresh)
        names = {p.name for p in fresh.iterdir()} | {p.name for p in TARGET.iterdir() if p.is_file()}
        _, differing, missing = filecmp.cmpfiles(fresh, TARGET, names, shallow=False)
        for name in sorted(differing + missing):
            print(f"src/communication/generated/{name} is not what proto/ gives: run 'make proto'", file=sys.stderr)
        return 1 if differing or missing else 0


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(check())
    generate(TARGET)
    print(f"wrote {len(list(TARGET.glob('*_pb2*')))} files to {TARGET.relative_to(ROOT)}")
