from __future__ import annotations

from dataclasses import dataclass


@dataclass
class UpdateWeightsFromTensorReqInput:
    serialized_named_tensors: list[bytes]
    load_format: str
    flush_cache: bool
