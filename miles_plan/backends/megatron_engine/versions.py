"""Which releases this engine was seen to work with, and what is missing here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

from miles_plan.backends.engine import EngineError

KNOWN_TO_WORK: dict[str, tuple[str, ...]] = {"megatron-core": ("0.19.2",), "transformer-engine": ("2.13.0",)}
_MODULES = {"megatron-core": "megatron.core", "transformer-engine": "transformer_engine"}


def installed(package: str) -> str | None:
    """The release of a package, None where it is not installed; nothing is imported but the parent package."""
    try:
        if importlib.util.find_spec(_MODULES[package]) is None:
            return None
        return importlib.metadata.version(package)
    except ModuleNotFoundError:  # neither the parent package nor the metadata is there
        return None


def version_problems(*, transformer_engine: bool = False) -> Iterator[str]:
    """Why a Megatron trainer cannot be trusted to run here: nothing means that the releases are known to work together."""
    for package in ("megatron-core", *(("transformer-engine",) if transformer_engine else ())):
        known = " or ".join(KNOWN_TO_WORK[package])
        found = installed(package)
        if found is None:
            yield f"{package} is not installed; known to work: {package} {known}"
        elif found not in KNOWN_TO_WORK[package]:
            yield f"{package} {found} is installed; known to work: {known}"


def require_megatron(*, transformer_engine: bool, deterministic: bool = False) -> None:
    """EngineError where something that the engine cannot do without is missing, with what to install or to set."""
    for package in ("megatron-core", *(("transformer-engine",) if transformer_engine else ())):
        if installed(package) is None:
            known = " or ".join(KNOWN_TO_WORK[package])
            raise EngineError(f"megatron train engine: {package} is not installed; known to work: {package} {known}")
    if transformer_engine and deterministic and os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") != "0":
        raise EngineError("megatron train engine: deterministic needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in the environment")
