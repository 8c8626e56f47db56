"""The native CPU engine: a small C core (core.h says what each file is) and the backend that drives it."""
