"""The job spec: pydantic models, a YAML loader that keeps positions, layering, and the consumption ledger."""

from miles_plan.spec.job import JobSpec
from miles_plan.spec.ledger import Ledger
from miles_plan.spec.load import LoadedJob, job_from_mapping, load_job
from miles_plan.spec.origins import Origin, Origins

__all__ = ["JobSpec", "Ledger", "LoadedJob", "Origin", "Origins", "job_from_mapping", "load_job"]
