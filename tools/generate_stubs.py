"""Writes `disaggregated/v1/` from `proto/`; with `--check`, compares instead and fails when they differ."""

from __future__ import annotations

import argparse
import importlib.resources
import pathlib
import sys
import tempfile

from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = pathlib.Path("disaggregated/v1")


def generate(into: pathlib.Path) -> None:
    """Write the stubs below `into`, which gets `disaggregated/v1/*.py` and `*.pyi`."""
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    sources = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    flags = [f"--{kind}_out={into}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    # Beside this interpreter, which need not be the one that PATH finds.
    scripts = pathlib.Path(sys.executable).parent
    flags += [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", *flags, *sources]) != 0:
        sys.exit("protoc failed")
    (into / PACKAGE / "__init__.py").write_text('"""Generated from proto/ by tools/generate_stubs.py."""\n')


def differing(fresh: pathlib.Path) -> list[str]:
    names = {path.name for folder in (ROOT, fresh) for path in (folder / PACKAGE).glob("*.py*")}
    return sorted(name for name in names if _text(ROOT / PACKAGE / name) != _text(fresh / PACKAGE / name))


def _text(path: pathlib.Path) -> str | None:
    return path.read_text() if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(pathlib.Path(scratch))
        if names := differing(pathlib.Path(scratch)):
            sys.exit(f"stubs differ from proto/: {', '.join(names)}; run tools/generate_stubs.py")


if __name__ == "__main__":
    main()
