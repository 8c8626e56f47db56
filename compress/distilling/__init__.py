"""A student that learns from its teacher."""
