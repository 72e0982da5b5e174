"""Says what the toolkit runs on: versions of the packages and the device."""

import os
import platform
import subprocess
import warnings
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "diffaccel",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "triton",
    "xformers",
)
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
"""What the libraries below read from the environment when they are imported."""


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that decide about results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def versions_line() -> str:
    """Returns all of `package_versions` in one line, for tables of results."""
    return ", ".join(f"{name} {text}" for name, text in package_versions().items())


def quiet_libraries() -> None:
    """Silences progress bars and advice of the libraries below, in a process of our own.

    Imports none of them, so that it costs nothing where they are not needed. What the user has
    set in the environment stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="(diffusers|transformers)")


def best_device() -> str:
    """Returns the kind of accelerator that PyTorch can use ("cuda", "mps"), else "cpu"."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def device_name(device: str) -> str:
    """Returns a device in words, such as "cpu (AMD EPYC, 2 threads)"."""
    import torch

    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device == "cpu":
        return f"cpu ({_processor_name()}, {torch.get_num_threads()} threads)"
    return device


def likely_device() -> str:
    """Returns in words what `best_device` would probably choose, without loading PyTorch."""
    graphics_card = _graphics_card()
    if graphics_card and not package_versions()["torch"].endswith("+cpu"):
        return f"cuda ({graphics_card})"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return f"mps ({_processor_name()})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu ({_processor_name()}, {cores} cores)"


def _graphics_card() -> str:
    """Name of the first NVIDIA card that the driver shows, or nothing."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return shown.stdout.strip().partition("\n")[0]


def _processor_name() -> str:
    """Returns the processor's marketing name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
