"""What an agent is called elsewhere: the literature's names for what has another name here."""

from __future__ import annotations

from collections.abc import Iterable

from rl_ebm.messages.words import nearest

ELSEWHERE = {
    "policy-gradient": {
        "rloo": "RLOO is its leave-one-out baseline, the default",
        "reinforce": "REINFORCE with the KL in the reward; baseline=none for the plain one",
        "vanilla policy gradient": "",
        "vpg": "",
        "pg": "",
        "a2c": "without a critic",
        "a3c": "without a critic",
        "actor critic": "without a critic",
        "reinforce plus plus": "",
        "reinforce++": "",
        "kl control": "",
    },
    "ppo": {
        "ppo clip": "",
        "proximal policy optimization": "",
        "trpo": "its clipped form",
        "rlhf": "with a reward model as the reward",
    },
    "grpo": {
        "dr grpo": "with advantage=none and reduce_tokens=sum",
        "dapo": "",
        "gspo": "",
        "group relative policy optimization": "",
    },
    "soft-q": {
        "sql": "soft Q-learning",
        "soft q learning": "",
        "q learning": "of the soft kind",
        "dqn": "of the soft kind",
        "sac": "discrete, its actor is the softmax of q",
        "soft actor critic": "discrete, its actor is the softmax of q",
        "munchausen": "",
    },
    "path-consistency": {"pcl": "", "trust pcl": "", "path consistency learning": ""},
    "trajectory-balance": {
        "tb": "",
        "gfn": "",
        "gflownet": "",
        "gflownets": "",
    },
    "detailed-balance": {"db": "", "forward looking detailed balance": ""},
    "subtb": {"stb": "", "sub tb": "", "sub trajectory balance": "", "subtrajectory balance": ""},
    "vargrad": {
        "log variance": "",
        "log var": "",
        "lv": "",
        "variance": "",
        "tbv": "",
        "rebel": "its loss is the mean of the squares of all pairwise differences",
    },
    "tree-backup": {
        "treesample": "it backs up exactly over what was seen",
        "tree sample": "it backs up exactly over what was seen",
        "mapo": "its memory is a tree, summed exactly",
        "mcts": "",
    },
    "monte-carlo": {
        "q#": "",
        "q sharp": "",
        "qsharp": "",
        "mc": "",
        "controlled decoding": "",
        "cd": "controlled decoding",
    },
    "dpg": {
        "gdc": "",
        "cdpg": "",
        "kl adaptive dpg": "",
        "f dpg": "with divergence=...",
        "fdpg": "with divergence=...",
        "distribution matching": "",
        "distributional policy gradient": "",
    },
    "best-of-n": {
        "bon": "",
        "best of k": "",
        "bond": "",
        "rejection sampling": "imitating the best of n",
        "rft": "rejection sampling fine-tuning",
        "raft": "with source=policy",
        "expert iteration": "with source=policy",
        "exit": "expert iteration, with source=policy",
        "rest": "with source=policy",
        "star": "with source=policy",
    },
    "sampled-teacher": {
        "mcmc": "with method=mcmc",
        "metropolis hastings": "with method=mcmc",
        "sir": "with method=sir",
        "resampling": "with method=sir",
        "importance sampling": "with method=sir",
        "smc": "with method=sir, a particle filter of one step",
        "rws": "with method=sir and source=policy",
        "reweighted wake sleep": "with method=sir and source=policy",
        "wake sleep": "with method=sir and source=policy",
    },
    "on-policy-distillation": {
        "gkd": "",
        "opd": "",
        "minillm": "with divergence=reverse",
        "distillation": "",
        "knowledge distillation": "with on_policy=0 and divergence=forward",
        "kd": "with on_policy=0 and divergence=forward",
        "dagger": "",
    },
    "dpo": {
        "direct preference optimization": "",
        "direct preference optimisation": "",
        "cdpo": "with label_smoothing=...",
        "conservative dpo": "with label_smoothing=...",
        "online dpo": "with source=policy",
        "iterative dpo": "with source=policy",
    },
    "ipo": {
        "identity preference optimization": "",
        "psi po": "",
        "online ipo": "with source=policy",
    },
    "teacher-forcing": {
        "sft": "on samples of the exact solution",
        "supervised": "on samples of the exact solution",
        "mle": "",
        "nll": "",
        "maximum likelihood": "",
        "cross entropy": "",
        "bc": "behaviour cloning",
        "behaviour cloning": "",
        "behavior cloning": "",
    },
    "exact": {"exact kl": "", "full gradient": "", "dp": "distillation of dynamic programming"},
}
"""agent: {a name from elsewhere, in lower case with spaces: what to add to the agent's name}"""

PREFERENCES = {
    *("kto", "orpo", "simpo", "cpo", "apo", "rpo", "bco", "xpo", "slic", "slic hf", "nash md"),
}
"""methods that learn from preferences, and are no agents here"""


def key(name: str) -> str:
    """A name as it stands in the tables."""
    return " ".join(name.lower().replace("-", " ").replace("_", " ").split())


def meant(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown agent: which of the known ones is meant."""
    known = list(known)
    if not isinstance(name, str):
        return f"; an agent is named by one of {', '.join(known)}"
    asked = key(name)
    if asked in PREFERENCES:
        return (
            ": of what learns from preferences, 'dpo' and 'ipo' are agents here. 'dpo' ends at the "
            "EBM where they are drawn with probability sigmoid(R1 - R2), as its own are; 'vargrad' "
            "compares responses by their rewards themselves, and ends there too"
        )
    for agent, names in ELSEWHERE.items():
        if agent in known and (asked in names or asked == key(agent)):
            note = names.get(asked)
            return f": did you mean {agent!r}?" + (f" ({note})" if note else "")
    return nearest(name, known)
