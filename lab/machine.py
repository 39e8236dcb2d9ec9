"""The machine: device, bfloat16, torchrun."""

import ctypes
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, and by nothing else
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # this process ...
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1  # ... of so many; only rank 0 writes
# seconds between updates of a progress bar, or between lines of a log file
QUIET = dict(mininterval=0.1 if getattr(sys.stderr, "isatty", bool)() else 30)


def set_up(name: str | None, shared: bool = False) -> torch.device:
    """The device; the processes, if they may share a batch; a heap that keeps what is freed."""
    if LAUNCHED and not shared:
        sys.exit("this runs on one device: start it without torchrun")
    torch.set_float32_matmul_precision("high")
    if sys.platform == "linux":  # glibc: a tenth of a CPU's step
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there.append("cpu")
    name = name or there[0]
    if name.split(":")[0] not in there:
        sys.exit(f"device {name} is not here: choose {' or '.join(there)}")
    if LAUNCHED:
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        dist.init_process_group("nccl" if "cuda" in name else "gloo", timeout=timedelta(days=1))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    return torch.device(name)


def bf16(recipe, device: torch.device) -> bool:
    """Wanted, and the device has instructions for it: emulated, a step takes far longer."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # a torch that cannot tell: float32
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return recipe.bf16 and native


def autocast(recipe, device: torch.device):
    """bfloat16 where `bf16` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16(recipe, device))


def peak_memory(device) -> float | None:
    """Most memory held so far on a GPU, in GiB."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
