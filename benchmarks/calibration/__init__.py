"""The calibration study: one file per group of experiments, and what they share."""
