"""The machine: processes, signals, errors, records, the terminal."""
