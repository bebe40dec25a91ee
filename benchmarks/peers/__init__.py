"""Our methods and other libraries, side by side: the same tasks, machine and stopwatch."""
