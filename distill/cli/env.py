"""`distill env`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Exit, Option

from distill import console
from distill.cli._report import print_json, reporting

if TYPE_CHECKING:
    from types import ModuleType

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "safetensors", "huggingface_hub", "numpy",
    "pillow", "pydantic",
)  # fmt: skip
EXTRAS = {  # optional, by the name of the extra; others are told of by what asks for them
    "fast": ("simplejpeg",),
    "hf": ("datasets",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "s3": ("s3fs",),
    "gs": ("gcsfs",),
}
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
)  # fmt: skip
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # said to be set or not, never shown
LITTLE_DISK = 5e9  # bytes; a small run with its checkpoints, and a pretrained model, fit into it


class Finding(NamedTuple):
    """Something missing or slow, and the one command or setting that mends it."""

    what: str
    mend: str
    fatal: bool = False  # nothing can be trained before it is mended


def env(
    as_json: Annotated[
        bool, Option("--json", help="Print the findings as one line of JSON on stdout.")
    ] = False,
) -> None:
    """Show versions and devices, and what is missing or slow here with the command that mends it.

    Example: distill env
    """
    with reporting():
        versions = {
            "python": platform.python_version(),
            "distill": version("distill-kd"),
            **{name: version(name) for name in PACKAGES},
        }
        machine = _machine()
        build, devices, findings = _torch()
        findings += [*_missing_extras(), *_slow(machine)]
        if as_json:
            print_json(
                {
                    "versions": versions,
                    "torch_build": build,
                    "machine": machine,
                    "devices": devices,
                    "findings": [finding._asdict() for finding in findings],
                }
            )
        else:
            _show(versions | {"torch": f"{versions['torch']} for {build}"}, machine, devices)
            for finding in findings:
                report = console.fail if finding.fatal else console.warn
                report(f"{finding.what}\n  mend with: {finding.mend}")
            if not findings:
                console.say("nothing is missing or slow")
    if any(finding.fatal for finding in findings):
        raise Exit(6)


def version(package: str) -> str | None:
    """The installed version; None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    """The machine as the operating system knows it."""
    affinity = hasattr(os, "sched_getaffinity")  # a container may have fewer cores than the machine
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 2),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "free_disk": shutil.disk_usage(Path.cwd()).free,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ}
        | {name: "set, not shown" for name in SECRETS if name in os.environ},
    }


def _torch() -> tuple[str, list[dict[str, Any]], list[Finding]]:
    """What torch is built for, the devices it can use, and what is wrong with its installation."""
    try:
        import torch
    except (ImportError, OSError) as error:
        what = f"torch cannot be loaded: {error}"
        return "nothing", [], [Finding(what, "pip install --force-reinstall torch", fatal=True)]
    devices = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "bf16": _cpu_bf16(torch),
        }
    ]
    with warnings.catch_warnings(record=True) as said:  # an old driver is a warning of torch's
        warnings.simplefilter("always")
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(i)
            devices.append(
                {
                    "device": f"cuda:{i}",
                    "name": properties.name,
                    "memory": properties.total_memory,
                    "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
                }
            )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "bf16": True})
    reason = str(said[0].message).partition(". ")[0] if said else ""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    return build, devices, [*_gpu_findings(torch, len(devices), reason), *_torchvision(torch)]


def _cpu_bf16(torch: ModuleType) -> bool:
    from distill.engine.machine import has_fast_bf16

    return has_fast_bf16(torch.cpu.get_capabilities())


def _gpu_findings(torch: ModuleType, devices: int, reason: str) -> list[Finding]:
    """A GPU that is there and not used."""
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if devices > 1 or not nvidia:
        return []
    if torch.version.cuda is None:
        return [
            Finding(
                f"there is an NVIDIA driver, but torch {torch.__version__} is built for CPU only",
                "pip install --force-reinstall torch torchvision",
            )
        ]
    reason = reason or "no device is visible"
    return [Finding(f"torch finds no usable NVIDIA GPU: {reason}", "nvidia-smi")]


def _torchvision(torch: ModuleType) -> list[Finding]:
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        # Wheels of two indexes: `operator torchvision::nms does not exist`.
        build = torch.__version__.partition("+")[2]
        index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
        return [
            Finding(
                f"torchvision {version('torchvision')} does not belong to torch "
                f"{torch.__version__}: {error}",
                f"pip install --force-reinstall torch torchvision{index}",
                fatal=True,
            )
        ]
    return []


def _missing_extras() -> list[Finding]:
    findings = []
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            what = f"the extra {extra} lacks {', '.join(missing)}"
            findings.append(Finding(what, f"pip install 'distill-kd[{extra}]'"))
    return findings


def _slow(machine: dict[str, Any]) -> list[Finding]:
    findings = []
    cores, load = machine["cores"], machine["load"]
    if load > cores / 2:
        what = f"the machine is busy: load {load} on {cores} cores; threads wait for each other"
        findings.append(Finding(what, "export OMP_NUM_THREADS=1"))
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true"):
        what = "HF_HUB_OFFLINE is set: pretrained weights come from the local cache alone"
        findings.append(Finding(what, "unset HF_HUB_OFFLINE"))
    if machine["free_disk"] < LITTLE_DISK:
        what = f"{machine['free_disk'] / 1e9:.1f} GB of disk are free in {Path.cwd()}"
        findings.append(Finding(what, "distill train RECIPE --out DIR, on another disk"))
    return findings


def _show(
    versions: dict[str, str | None],
    machine: dict[str, Any],
    devices: list[dict[str, Any]],
) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    rows = {
        **{name: found or "not installed" for name, found in versions.items()},
        "system": machine["system"],
        "memory": f"{machine['memory'] / 1e9:.1f} GB",
        "cores": f"{machine['cores']}, load {machine['load']}",
        "free disk": f"{machine['free_disk'] / 1e9:.1f} GB in {Path.cwd()}",
        **machine["variables"],
    }
    for device in devices:
        facts = [
            device["name"],
            f"{device['memory'] / 1e9:.1f} GB" if "memory" in device else "",
            f"{device['threads']} threads" if "threads" in device else "",
            f"bf16 {'in hardware' if device['bf16'] else 'imitated, slow'}",
        ]
        rows[device["device"]] = ", ".join(fact for fact in facts if fact)
    for name, text in rows.items():
        table.add_row(f"[bold]{console.plain(name)}[/]", console.plain(text))
    console.out.print(table, highlight=False)
