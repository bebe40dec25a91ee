"""python -m benchmarks.readme [--check]: see :mod:`benchmarks.readme.page`."""

from benchmarks.readme.page import main

if __name__ == "__main__":
    main()
