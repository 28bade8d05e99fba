"""What the command runs: settings, the study, training, the report."""
