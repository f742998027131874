"""NVML's facts of a GPU: what it does not tell, or not to this user, is absent."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Facts", "Gpu", "Slice", "facts", "open_gpu"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """An opened GPU.

    Attributes:
        nvml: The module `pynvml`.
        handle: Of the GPU; of a MIG slice, of the GPU that it is part of: clocks and power are told of that only.
        mig: Of the MIG slice; `None` for a whole GPU.
    """

    nvml: Any
    handle: Any
    mig: Any = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A MIG slice.

    Attributes:
        memory_bytes: Its memory.
        gpu_memory_bytes: Memory of the whole GPU.
        multiprocessors: Its streaming multiprocessors; 0 where NVML does not tell.
    """

    memory_bytes: int
    gpu_memory_bytes: int
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What NVML tells of a GPU once.

    Attributes:
        driver: Version of the driver; empty where not told.
        pcie: Generation and width of the link at its best, `5 x16`; it drops while the GPU idles.
        nvlinks: NVLinks that are up.
        nvlink_version: Of the first of them; 0 without.
        peers: How many of the other GPUs asked about it reaches over NVLink.
        mig: The MIG slice; `None` for a whole GPU.
    """

    driver: str = ""
    pcie: str = ""
    nvlinks: int = 0
    nvlink_version: int = 0
    peers: int = 0
    mig: Slice | None = None


@functools.cache
def open_gpu(uuid: str) -> Gpu | None:
    """Return the GPU or MIG slice with this UUID, opened once per process.

    Args:
        uuid: As torch tells it, with or without `GPU-` or `MIG-`: `CUDA_VISIBLE_DEVICES` renumbers indices, and NVML
            does not know.

    Returns:
        `None` without the package `nvidia-ml-py`, without the driver's library, or where NVML refuses.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    handle = next((h for name in names if (h := _asked(nvml, "nvmlDeviceGetHandleByUUID", name)) is not None), None)
    if handle is None:
        return None
    if _asked(nvml, "nvmlDeviceIsMigDeviceHandle", handle):
        whole = _asked(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        return None if whole is None else Gpu(nvml, whole, handle)
    return Gpu(nvml, handle)


def facts(uuid: str, others: Iterable[str] = ()) -> Facts:
    """Return what NVML tells of a GPU.

    Args:
        uuid: As `open_gpu` takes it.
        others: UUIDs of the GPUs that a job would use beside it.
    """
    gpu = open_gpu(uuid)
    if gpu is None:
        return Facts()

    def ask(name: str, *arguments: Any) -> Any:
        return _asked(gpu.nvml, name, *arguments)

    generation, width = (ask(f"nvmlDeviceGetMaxPcieLink{what}", gpu.handle) for what in ("Generation", "Width"))
    links = [i for i in range(getattr(gpu.nvml, "NVML_NVLINK_MAX_LINKS", 0)) if ask(_LINK_STATE, gpu.handle, i) == 1]
    neighbours = [other for u in others if (other := open_gpu(u)) is not None]
    return Facts(
        driver=_text(ask("nvmlSystemGetDriverVersion")),
        pcie=f"{generation} x{width}" if generation and width else "",
        nvlinks=len(links),
        nvlink_version=int(ask("nvmlDeviceGetNvLinkVersion", gpu.handle, links[0]) or 0) if links else 0,
        peers=sum(ask("nvmlDeviceGetP2PStatus", gpu.handle, n.handle, _P2P_NVLINK) == 0 for n in neighbours),
        mig=None if gpu.mig is None else _slice(gpu, ask),
    )


_LINK_STATE = "nvmlDeviceGetNvLinkState"
_P2P_NVLINK = 2
"""`NVML_P2P_CAPS_INDEX_NVLINK`; 0 is `NVML_P2P_STATUS_OK`."""


def _slice(gpu: Gpu, ask: Callable[..., Any]) -> Slice | None:
    own, whole = ask("nvmlDeviceGetMemoryInfo", gpu.mig), ask("nvmlDeviceGetMemoryInfo", gpu.handle)
    if own is None or whole is None:
        return None
    attributes = ask("nvmlDeviceGetAttributes", gpu.mig)
    return Slice(int(own.total), int(whole.total), int(getattr(attributes, "multiprocessorCount", 0)))


def _asked(nvml: Any, name: str, *arguments: Any) -> Any:
    """Return NVML's answer; `None` where it refuses or an older one does not know the question."""
    question = getattr(nvml, name, None)
    if question is None:
        return None
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer or "")
