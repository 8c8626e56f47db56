"""Tool calls in the text of replies, one small module for each syntax that models use."""
