"""What a reader sees: tables, curves, the page."""
