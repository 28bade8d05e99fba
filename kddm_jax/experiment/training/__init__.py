"""Trains teachers and students, and defines what decides their results."""
