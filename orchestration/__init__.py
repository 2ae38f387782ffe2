"""Dagster only: names, order, checks and schedules. Every number comes from `offrl_models`."""
