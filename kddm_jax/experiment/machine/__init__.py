"""Handles processes, signals, errors, records and the terminal."""
