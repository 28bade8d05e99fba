"""Deals with the machine: processes, signals, errors, records and the terminal."""
