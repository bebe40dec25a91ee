"""Every claim of arXiv 2512.15605, and the questions it leaves open, by measurement."""
