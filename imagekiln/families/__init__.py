"""Generative models: one file is one family, and its name is the file's name."""
