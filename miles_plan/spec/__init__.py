"""The job spec: pydantic models, a YAML loader that keeps positions, layering, and the consumption ledger."""
