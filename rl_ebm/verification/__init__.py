"""How far a policy is from the exact solution: over every prefix, or along samples."""
