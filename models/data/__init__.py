"""From data files to records, examples and blocks of token ids."""
