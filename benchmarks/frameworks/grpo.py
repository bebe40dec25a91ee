"""What GRPOTrainer of the installed TRL converges to, as JSON.

    python -m benchmarks.frameworks.grpo

On the task ``random`` with A=4, T=3, beta 0.5 and a uniform reference.
"""

from __future__ import annotations

import json

from rl_ebm import solve
from rl_ebm.envs import make_task
from rl_ebm.studies.frameworks import audit_framework

if __name__ == "__main__":
    ebm = make_task("random", vocab_size=4, max_length=3, beta=0.5, reference="uniform")
    print(json.dumps(audit_framework("trl", solve(ebm), lambda row: "GRPOTrainer" in row.name)))
