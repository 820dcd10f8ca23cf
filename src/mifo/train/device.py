"""Where and in what arithmetic a run computes, and how the CPU is set up for it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

import torch

from mifo.errors import DeviceError

GNU_M_TRIM_THRESHOLD, GNU_M_TOP_PAD, GNU_M_MMAP_THRESHOLD = -1, -2, -3


def pick_device(name: str) -> torch.device:
    """The device of `model.device`.

    Raises:
        DeviceError: CUDA was asked for and is not there, or the name is not one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"model.device = '{name}' is not a device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"model.device = '{name}' is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"model.device = '{name}', but this machine shows {torch.cuda.device_count()} CUDA devices. Use auto or cpu."
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Arithmetic of a forward pass: bfloat16 where the machine multiplies it faster, unless told otherwise.

    A CPU has to have matrix units for that. With the dot products of AVX-512 alone, products of the embedded model's sizes
    ran at 84 GFLOP/s in bfloat16 and at 147 in float32 (one core of a Xeon, torch 2.13).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    faster = bool(capabilities.get("amx_bf16") or capabilities.get("bf16"))  # of Intel's, of Arm's
    return torch.bfloat16 if faster else torch.float32


def set_up_cpu(threads: int | None) -> None:
    """Threads, and a malloc that keeps memory instead of returning every large tensor to the system.

    glibc maps and unmaps large blocks by default, so each activation costs page faults: an element-wise pass over 28 M
    floats took 31 ms instead of 209 ms with the blocks kept (2-core Xeon, torch 2.13).
    """
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(GNU_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(GNU_M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(GNU_M_TOP_PAD, 64 << 20)
