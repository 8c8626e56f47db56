"""What `export.trt` is made of: reading a model, the lint, profiles, building, the record."""
