"""Releases that were seen to run together, and where each comes from: what `doctor` compares a machine with.

A row is an observation, not a requirement: it says who saw it, where and when.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package that an engine needs. name: as importlib.metadata knows it; why: what is missing without it; get: how to."""

    name: str
    why: str
    get: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Releases that ran together. versions: (package, release); notes: what had to be done for it."""

    engines: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]
    python: str
    gpu: str
    source: str
    notes: tuple[str, ...] = ()


_SOURCE = "one to four NVIDIA H200, 2026-11-21, CUDA 13.0, driver 580.159"

SEEN: tuple[Seen, ...] = (
    Seen(
        engines=("megatron", "sglang"),
        versions=(
            ("torch", "2.11.0"),
            ("triton", "3.6.0"),
            ("sglang", "0.5.16"),
            ("sglang-kernel", "0.4.5"),
            ("torch_memory_saver", "0.0.10"),
            ("megatron-core", "0.19.2"),
            ("transformer-engine", "2.13.0"),
            ("transformers", "5.12.1"),
            ("tokenizers", "0.22.2"),
            ("ray", "2.55.1"),
        ),
        python="3.12",
        gpu="H200",
        source=_SOURCE,
        notes=(
            "transformers 5.17 breaks SGLang 0.5.16: 'qwen3_asr' is registered twice",
            "SGLang imports megatron-core where it is there, and so Transformer Engine, whose torch extension must be built",
            "torch's cuDNN 9.19 must come before a system's 9.14 in LD_LIBRARY_PATH, or Transformer Engine takes the wrong one",
            "megatron-core 0.19 wants multi_tensor_scale_tensor of Transformer Engine's optimizers; 2.13 lacks it, None does",
            "megatron-core 0.16.1 runs on Python 3.11, but its router of experts fails without Transformer Engine",
        ),
    ),
    Seen(
        engines=("torch", "torch"),
        versions=(("torch", "2.13.0"), ("transformers", "5.23.0"), ("ray", "2.60.0")),
        python="3.11",
        gpu="none",
        source="a machine with two CPU cores, 2026-11-21",
    ),
)

_RAY = Package(name="ray", why="every process of a run is Ray's", get="pip install 'miles-plan[run]'")
_TORCH = Package(name="torch", why="every engine computes with it", get="pip install 'miles-plan[run]'")
_TRANSFORMERS = Package(name="transformers", why="models are read and made with it", get="pip install 'miles-plan[run]'")
_SAFETENSORS = Package(name="safetensors", why="weights are stored in it", get="pip install 'miles-plan[run]'")
_BASE = (_TORCH, _RAY, _TRANSFORMERS, _SAFETENSORS)

NEEDS: dict[str, tuple[Package, ...]] = {
    "torch": _BASE,
    "fsdp2": _BASE,
    "megatron": (
        *_BASE,
        Package(name="megatron-core", why="the trainer", get="pip install megatron-core==0.19.2  # Python 3.12"),
        Package(
            name="transformer-engine",
            why="attention, grouped products and FP8 of the trainer",
            get="pip install 'transformer-engine[pytorch]==2.13.0'",
        ),
    ),
    "sglang": (
        *_BASE,
        Package(name="sglang", why="the rollout engine", get="pip install sglang==0.5.16"),
        Package(name="sglang-kernel", why="its kernels", get="pip install sglang-kernel==0.4.5"),
        Package(
            name="torch_memory_saver",
            why="gives GPU memory back while the trainer works on the same GPU",
            get="pip install torch_memory_saver==0.0.10",
        ),
    ),
}


def release_seen(engine: str, package: str) -> str | None:
    """The release of a package that was seen to work with an engine, None where none was."""
    return next((dict(row.versions)[package] for row in SEEN if engine in row.engines and package in dict(row.versions)), None)
