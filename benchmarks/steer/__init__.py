"""A small language model that is steered, and held against the truth."""
