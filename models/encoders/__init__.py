"""Encoders (BERT and its kin): transformers' networks, our training, data and files."""
