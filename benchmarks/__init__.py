"""Measurements. rl_ebm is loaded before torch here: it sets how OpenMP threads wait."""

import rl_ebm  # noqa: F401
