"""The curves of a run: which metrics there are, what they are called, and their values by iteration."""

from __future__ import annotations

from dataclasses import dataclass

from miles_plan.report.run_files import RunRecord, is_number

COMPARED = "tokens_compared"
LOG_PROB_DIFF = "max_abs_log_prob_diff"
REWARD = "reward_mean"
ROUTING = "routing_mismatches"
NOT_CURVES = frozenset({"loop", "iteration", "step", "task_s", "reward_std", COMPARED})


@dataclass(frozen=True, slots=True)
class Metric:
    """A key of metrics.jsonl, its title and unit. chief: it is looked at first."""

    key: str
    title: str
    unit: str = ""
    chief: bool = True


CHIEF = (
    Metric(REWARD, "reward"),
    Metric("loss", "loss"),
    Metric("kl", "KL"),
    Metric("reference_kl", "KL to the reference", "nats"),
    Metric("entropy", "entropy", "nats"),
    Metric("grad_norm", "gradient norm"),
    Metric("response_tokens_mean", "response length", "tokens"),
    Metric(LOG_PROB_DIFF, "log-prob diff", "nats"),
    Metric(ROUTING, "routing mismatches"),
    Metric("tokens_per_s", "throughput", "tokens/s"),
    Metric("step_s", "iteration time", "s"),
)
UNIT_OF_SUFFIX = {"_bytes": "bytes", "_s": "s", "_fraction": "fraction", "_tokens": "tokens", "_diff": "nats"}


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the iterations of one loop. Values that are no finite number are left out and listed in `odd`."""

    metric: Metric
    loop: str
    iterations: tuple[int, ...]
    values: tuple[float, ...]
    odd: tuple[int, ...]


def loops_of(record: RunRecord) -> list[str]:
    """The loops that left metrics, in order."""
    return list(dict.fromkeys(str(row["loop"]) for row in record.metrics))


def metrics_of(record: RunRecord, loop: str) -> list[Metric]:
    """The metrics a loop reported: the chief ones first, then any other number it wrote, its unit read from its name."""
    keys = {key for row in record.metrics if row["loop"] == loop for key, value in row.items() if _numeric(value)}
    chief = [metric for metric in CHIEF if metric.key in keys]
    others = sorted(keys - {metric.key for metric in CHIEF} - NOT_CURVES)
    return chief + [Metric(key, key.replace("_", " "), _unit_of(key), chief=False) for key in others]


def _unit_of(key: str) -> str:
    return next((unit for suffix, unit in UNIT_OF_SUFFIX.items() if key.endswith(suffix)), "")


def series(record: RunRecord, loop: str, metric: Metric) -> Series:
    """The values of a metric in a loop."""
    found = [(int(row["iteration"]), row[metric.key]) for row in record.metrics if row["loop"] == loop and metric.key in row]
    good = [(iteration, float(value)) for iteration, value in found if is_number(value)]
    return Series(
        metric=metric,
        loop=loop,
        iterations=tuple(iteration for iteration, _ in good),
        values=tuple(value for _, value in good),
        odd=tuple(iteration for iteration, value in found if not is_number(value)),
    )


def total(record: RunRecord, key: str) -> int | None:
    """The sum of a counter over all iterations; None where no iteration reported it."""
    values = [row[key] for row in record.metrics if is_number(row.get(key))]
    return int(sum(values)) if values else None


def log_prob_verdict(record: RunRecord) -> str | None:
    """One sentence on |rollout log-prob - trainer log-prob|: exactly 0, or how far off and how often; None if not reported."""
    values = [row[LOG_PROB_DIFF] for row in record.metrics if LOG_PROB_DIFF in row]
    if not values:
        return None
    compared = total(record, COMPARED)
    tokens = f", {compared:,} tokens compared" if compared is not None else ""
    off = [value for value in values if not is_number(value) or value != 0.0]
    if not off:
        return f"exactly 0 in all {len(values):,} iterations{tokens}"
    finite = [value for value in off if is_number(value)]
    worst = f"up to {max(finite):.3g} nats" if finite else "not a number"
    return f"{worst}, not 0 in {len(off):,} of {len(values):,} iterations{tokens}"


def _numeric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
