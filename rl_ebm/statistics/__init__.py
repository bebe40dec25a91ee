"""What samples say of a mean: intervals, the bounds that hold for every n, and their conditions."""
