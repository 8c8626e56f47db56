"""Encoders (BERT and its kin) made smaller: fewer bits, fewer layers, a student."""
