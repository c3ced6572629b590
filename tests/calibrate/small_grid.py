"""Sizes that measure every kind of point within seconds, on a CPU too."""

from __future__ import annotations

from miles_plan.calibrate.measure import Grid

SMALL = Grid(
    stream_bytes=1 << 20,
    host_copy_bytes=(1 << 16, 1 << 20),
    gemms=((128, 128, 64), (64, 64, 64)),
    decode_gemms=((16, 64, 64), (32, 64, 128), (16, 128, 64)),
    grouped_gemms=((4, 16, 32, 64),),
    attention=((1, 64, 4, 2, 64),),
    decode_attention=((2, 64, 4, 2, 64), (4, 128, 4, 2, 64)),
    collective_bytes=(1 << 16, 1 << 18),
)
