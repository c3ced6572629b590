"""Where SGLang's engine lives; `sglang.Engine` is a proxy of it there."""

from sglang import Engine

__all__ = ["Engine"]
