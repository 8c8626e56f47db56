"""The case studies, each a command that runs in minutes and leaves one page: python -m examples.qa, examples.nlg, examples.encoder."""
