"""Renders results: tables, curves and the page."""
