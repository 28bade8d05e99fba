"""Runs the experiments: settings, the study, training and the report."""
