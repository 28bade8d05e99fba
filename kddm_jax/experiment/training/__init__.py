"""Trains teachers and students."""
