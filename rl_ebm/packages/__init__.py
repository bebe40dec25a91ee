"""What is installed: the release of this library, and what other packages bring."""
