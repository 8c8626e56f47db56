"""Fewer weights: layers, widths, tokens, zeros."""
