"""Fewer bits: grids, methods of choosing codes, and formats by module."""
