"""`miles-plan gpus`: the catalog's GPUs."""

from __future__ import annotations

import json
import sys
from typing import Any

from miles_plan.cli.options import AsJson


def gpus(as_json: AsJson = False) -> None:
    """List the GPUs that `cluster.gpu` accepts, with the figures that plans are priced from."""
    from miles_plan.catalog.gpus import gpu_names

    rows = [_row(name) for name in gpu_names()]
    if as_json:
        sys.stdout.write(json.dumps({"schema": "miles-plan/gpus/1", "gpus": rows}, indent=2) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from miles_plan.cli.console import console

    table = Table(box=SIMPLE_HEAD)
    table.add_column("gpu", no_wrap=True)
    for title in ("memory", "bf16", "fp8", "HBM", "NVLink", "network", "per node"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        flops = row["flops"]
        rates = [f"{flops[each] / 1e12:,.0f} TF" if each in flops else "" for each in ("bf16", "fp8")]
        links = [
            _rate(row[each], unit, scale)
            for each, unit, scale in (
                ("hbm_bytes_per_s", "TB/s", 1e12),
                ("nvlink_bytes_per_s", "GB/s", 1e9),
                ("nic_bytes_per_s", "GB/s", 1e9),
            )
        ]
        table.add_row(row["name"], f"{row['memory_bytes'] / 2**30:,.0f} GiB", *rates, *links, str(row["gpus_per_node"]))
    console().print(table)


def _row(name: str) -> dict[str, Any]:
    from miles_plan.catalog.gpus import find_gpu

    gpu = find_gpu(name)
    return {
        "name": gpu.name,
        "vendor": gpu.vendor,
        "memory_bytes": gpu.memory_bytes,
        "usable_bytes": gpu.usable_bytes,
        "flops": dict(gpu.flops),
        "hbm_bytes_per_s": gpu.hbm_bytes_per_s,
        "nvlink_bytes_per_s": gpu.nvlink_bytes_per_s,
        "nvlink_domain": gpu.nvlink_domain,
        "nic_bytes_per_s": gpu.nic_bytes_per_s,
        "gpus_per_node": gpu.gpus_per_node,
        "host_memory_bytes": gpu.host_memory_bytes,
        "source": gpu.source,
    }


def _rate(value: float, unit: str, scale: float) -> str:
    return f"{value / scale:,.1f} {unit}" if value else ""
