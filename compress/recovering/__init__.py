"""Training a quantized model: weights made of codes, and the layers' own phase."""
