"""Runs: the loop of gradient steps, what it writes into a folder, and how it goes on from there."""
