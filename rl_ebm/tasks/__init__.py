"""Named tasks: an EBM by its name and a seed."""

from rl_ebm.tasks.named import TASKS, Task, make_task, register

__all__ = ["TASKS", "Task", "make_task", "register"]
