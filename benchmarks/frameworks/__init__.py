"""What the losses that other frameworks ship converge to."""
