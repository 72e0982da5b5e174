"""Says what the toolkit runs on: versions of the packages and the device."""

import logging
import platform
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "diffaccel",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "triton",
    "xformers",
)


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that decide about results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def quiet_libraries() -> None:
    """Silences progress bars and advice of the libraries below, in a process of our own."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="(diffusers|transformers)")
    for library in ("diffusers", "transformers"):
        import_module(f"{library}.utils.logging").disable_progress_bar()


def best_device() -> str:
    """Returns "cuda" or "mps" where PyTorch can use one, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name(device: str) -> str:
    """Returns a device in words, such as "cpu (AMD EPYC, 2 threads)"."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device == "cpu":
        return f"cpu ({_processor_name()}, {torch.get_num_threads()} threads)"
    return device


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


def versions_line() -> str:
    """Returns all of `package_versions` in one line, for tables of results."""
    return ", ".join(f"{name} {text}" for name, text in package_versions().items())
