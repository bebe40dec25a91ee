"""Everything public that can be called, with arguments that are right: source text, to be spoilt.

``ALL`` is read from the packages' ``__all__``, so that a new name is swept without being told;
only a required argument whose name is new needs a line in ``RIGHT``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import rl_ebm
from rl_ebm import agents, envs, policies, rewards

PACKAGES = {
    "rl_ebm": rl_ebm,
    "rl_ebm.rewards": rewards,
    "rl_ebm.policies": policies,
    "rl_ebm.envs": envs,
    "rl_ebm.agents": agents,
}

# Names that expressions may use, made anew for each case.
NAMES = {
    "letters": "decoded(tokenizers.Tokenizer(tokenizers.models.BPE(dict(a=0, b=1, c=2), [])))",
    "space": "rl_ebm.TokenSpace(3, 3)",
    "eos": "rl_ebm.TokenSpace(3, 3, 0)",
    "scores": "torch.linspace(-1, 1, 27)",
    "ebm": "rl_ebm.EBM(space, scores)",
    "solution": "rl_ebm.solve(ebm)",
    "automaton": "rl_ebm.rewards.Automaton.contains(space, [1])",
    "automaton_ebm": "rl_ebm.EBM(space, automaton)",
    "automaton_solution": "rl_ebm.solve(automaton_ebm)",
    "generator": "torch.Generator().manual_seed(0)",
    "tabular": "rl_ebm.policies.Tabular(space, generator=generator)",
    "policy": "rl_ebm.policies.Transformer(space, small)",
    "small": "rl_ebm.policies.TransformerConfig(layers=1, heads=1, dim=4, hidden=4)",
    "batch": "ebm.score(solution.sample(2, generator))",
    "tokens": "torch.tensor([[0, 1, 2], [2, 2, 2]])",
    "lengths": "torch.tensor([3, 3])",
    "prompt_ids": "torch.tensor([0, 0])",
    "actions": "torch.tensor([0, 1])",
    "machine": "automaton.machine",
    "fitted": "rl_ebm.policies.fit_ngram(space, batch)",
    "report": "rl_ebm.verify(tabular, solution)",
    "sampled": "rl_ebm.verify(tabular, solution, samples=4)",
    "certificate": "rl_ebm.certify(tabular, ebm, 8)",
    "env": "(made := rl_ebm.envs.TokenMDP(ebm), made.reset())[0]",
    "vector_env": "(made := rl_ebm.envs.TokenVectorEnv(2, ebm), made.reset())[0]",
    "transition": "rl_ebm.envs.Transition(ebm)",
    "state": "transition.start(prompt_ids)",
    "depths": "[torch.zeros(3**t, 3) for t in range(3)]",
    "table_file": "rl_ebm.rewards.TableFile(torch.zeros(4).double(), two, ('a', 'b'))",
    "two": "rl_ebm.TokenSpace(2, 2)",
    "function": "rl_ebm.rewards.Function(lambda tokens, lengths: tokens.double().sum(1))",
    "learned": "rl_ebm.rewards.TransformerReward(space, small)",
    "log_weight_3": "torch.zeros(3, 2, 2)",
}

# Required arguments by their name; "Owner.name" goes first.
RIGHT = {
    "space": "space", "reward": "scores", "ebm": "ebm", "policy": "tabular",
    "solution": "solution",
    "run": "folder / 'run'", "out": "folder / 'run'", "r": "depths", "q": "depths",
    "machine": "machine",
    "phrase": "[1, 2]", "word": "[0, 1]", "opening": "0", "closing": "1", "depth": "1",
    "fields": "torch.zeros(3, 3)", "log_initial": "torch.zeros(2)", "log_weight": "log_weight_3",
    "log_transition": "torch.zeros(2, 2)", "log_emission": "torch.zeros(2, 3)",
    "scores": "scores",
    "modular.scores": "[0.0, 1.0]", "log_weights": "torch.zeros(3, 3)", "pattern": "'(0|1)*'",
    "function": "lambda *args: torch.zeros(2)", "decode": "str", "expression": "'contains:1'",
    "from_trl.function": "lambda prompts, completions: [0.0 for _ in completions]",
    "path": "folder / 'table.tsv'", "prompts": "None", "responses": "batch", "num_states": "2",
    "tokens": "tokens", "decode.tokens": "[0, 1]", "lengths": "lengths", "n": "2",
    "prompt_ids": "prompt_ids", "env": "env", "FlatVectorObservation.env": "vector_env",
    "name": "'random'", "entry_of.name": "'dpg'",
    "entry_of_run.name": "'dpg'", "batch": "batch", "device": "'cpu'", "parts": "[batch, batch]",
    "rows": "torch.tensor([0])", "take.rows": "torch.tensor([1, 0])", "actions": "actions",
    "t": "torch.tensor([0, 2])", "children": "torch.zeros(9)", "fill": "0.0",
    "gather_children.rows": "torch.zeros(3, 3)", "rank": "tokens", "action": "1",
    "TokenVectorEnv.actions": "np.array([0, 1])", "observation": "env.reset()[0]",
    "observations": "vector_env.reset()[0]", "state": "state", "reward_rows.rows": "range(0, 1)",
    "logits": "torch.zeros(2, 3, 3)", "estimate": "0.0", "low": "0.0", "high": "1.0",
    "confidence": "0.9", "kind": "'bound'", "check_values.reward": "torch.zeros(2)",
    "with_reward.reward": "torch.zeros(2)", "where": "'here'", "alphabet": "('a', 'b')",
    "TableFile.space": "two", "TableFile.scores": "torch.zeros(4).double()", "options": "None",
    "ended": "torch.zeros(2, dtype=torch.bool)", "log_ref": "None", "description": "'a task'",
    "vocab_size": "3", "max_length": "3", "Task.reward": "lambda space, seed: scores",
    "summary": "'sum'", "paper": "'none'", "agent": "rl_ebm.agents.SoftQAgent",
    "config": "rl_ebm.agents.SoftQConfig", "v": "depths", "TreeSolution.scores": "scores[None]",
    "entry": "rl_ebm.agents.AGENTS['soft-q']", "make_options.name": "'soft-q'",
    "register.name": "'mine'", "register.kind": "lambda text, factor, words: automaton",
    "parse_reference.expression": "'uniform'",
    "make_options.options": "{'lr': 0.1}", "known": "['random', 'star']",
    "TreeSolution.log_ref": "[0.0, 0.0, 0.0]", "log_z": "torch.zeros(1)", "reference": "None",
    "AutomatonSolution.reward": "machine", "AutomatonPolicy.machine": "fitted.machine",
    "AutomatonSolution.ebm": "automaton_ebm",
    "reward_rows.depth": "0", "TransformerConfig.dim": "4", "loss": "lambda *args: 0",
    "audit.solution": "rl_ebm.solve(rl_ebm.EBM(two, torch.zeros(4)))", "tokenizer": "letters",
    "read_pairs.path": "folder / 'pairs.jsonl'", "chosen": "batch", "rejected": "batch",
    "write_pairs.path": "folder / 'new.jsonl'",
    "tree": "PrefixTree.full(space)", "audit_loss.loss": "lambda log_pi, *args: -log_pi.sum()",
}  # fmt: skip

# What stands for self, by class.
INSTANCES = {
    "EBM": "ebm", "AutomatonSolution": "automaton_solution", "TreeSolution": "solution",
    "Batch": "batch",
    "Certificate": "certificate", "Report": "report", "SampledReport": "sampled",
    "TokenSpace": "space",
    "Interval": "sampled.tv", "Automaton": "automaton", "Function": "function",
    "TableFile": "table_file",
    "TRLFunction": "rl_ebm.rewards.from_trl(lambda completions, **_: [0.0] * 2, str)",
    "Table": "rl_ebm.rewards.Table(scores)", "TransformerReward": "learned",
    "AutomatonPolicy": "fitted",
    "AgentEntry": "rl_ebm.agents.AGENTS['soft-q']",
    "Tabular": "tabular", "Transformer": "policy", "MLP": "rl_ebm.policies.MLP(space)",
    "Uniform": "rl_ebm.policies.Uniform(space)",
    "TokenMDP": "env", "TokenVectorEnv": "vector_env", "Transition": "transition",
    "FlatObservation": "rl_ebm.envs.FlatObservation(env)",
    "FlatVectorObservation": "rl_ebm.envs.FlatVectorObservation(vector_env)",
}  # fmt: skip

# Abstract, or nothing but names of errors.
LEFT_OUT = {"Policy", "Trainable", "Reward", "Agent", "RunError", "TooLargeError"}
INNER_CLASSES = {
    "State", "Report", "SampledReport", "Certificate", "Interval", "TreeSolution",
    "AutomatonSolution",
}  # fmt: skip
"""classes that the library makes and users read: their constructors take what it computed"""
INNER_METHODS = {
    # Rules of the token MDP, called in every step with tensors that were checked at the door.
    "rank", "unrank", "prefix_indices", "state_ids", "sequence_indices", "spread",
    "gather_children",
    "replaces", "ends", "find_lengths", "num_prefixes", "state_offset", "prefixes", "sequences",
    "state_offsets", "action_mask", "state_action_mask",
    # Decoding by one position, and rows of a tree: between a policy and what walks it.
    "begin", "start", "step", "q", "read", "q_rows", "r_rows", "reward_rows", "rows",
    "tree_logits", "reduced_q_rows", "reduced_rows",
    # Members that are read by limits_of and summarise.
    "limits", "summary",
    # Within a training step.
    "learn_values",
    "counts", "update", "loss", "terms", "log_pi", "log_weights", "position_means", "returns",
    "chosen",
    "drawn_from",
    "log_w", "prompts", "load_state_dict", "state_dict", "extra_parameters", "log_ref",
    "log_ref_rows",
    "take", "cat", "clean", "with_reward", "bind", "unmasked", "forward", "to", "log_probs",
    "log_ref_constants", "Config", "parameters", "reward",
    # What doors call.
    "check_kind",
    # What the audit asks of an entry, with a problem that it has made.
    "limit", "ends_at_target",
}  # fmt: skip
# What says of an agent or of a name what a sentence or a report holds.
INNER = INNER_CLASSES | {"tree_logits", "behaviour", "learned_log_z", "meant", "Behaviour"}
STEPPED = {"TokenMDP", "TokenVectorEnv"}
"""whose step is called by users"""


@dataclass(frozen=True)
class Subject:
    """What is called, as source, with its parameters."""

    label: str
    source: str
    required: tuple[tuple[str, str], ...]
    """names and right values"""
    parameters: tuple[str, ...]
    inner: bool = False
    """called by the library alone, with what it has checked"""


@cache
def subjects(inner: bool = False) -> tuple[Subject, ...]:
    """All of them, once each; ``inner`` adds what only the library calls."""
    found: dict[int, Subject] = {}
    for package, module in PACKAGES.items():
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and name not in LEFT_OUT and id(value) not in found:
                found[id(value)] = _subject(name, f"{package}.{name}", value, "", name in INNER)
    classes = [
        (s, v) for s, v in ((s, eval(s.source)) for s in found.values()) if inspect.isclass(v)
    ]
    methods = [m for subject, value in classes for m in _methods(subject, value)]
    return tuple(s for s in (*found.values(), *methods) if s.parameters and (inner or not s.inner))


def _methods(subject: Subject, kind: type) -> Iterator[Subject]:
    agent = subject.label.endswith("Agent")
    instance = INSTANCES.get(subject.label)
    if agent:
        entry = next(name for name, entry in agents.AGENTS.items() if entry.agent is kind)
        config = f"rl_ebm.agents.AGENTS[{entry!r}].config"
        sized = "batch_size" in inspect.signature(agents.AGENTS[entry].config).parameters
        options = f"{config}({'batch_size=8' if sized else ''})"
        instance = f"{subject.source}(ebm, tabular, {options}, generator, solution)"
    for name in sorted(dir(kind)):
        owner = (
            next(c for c in kind.__mro__ if name in c.__dict__)
            if not name.startswith("_")
            else object
        )
        method = None if owner is object else getattr(kind, name)
        if not owner.__module__.startswith("rl_ebm") or not callable(method):
            continue
        static = isinstance(inspect.getattr_static(kind, name), (staticmethod, classmethod))
        source = f"{subject.source}.{name}" if static or instance is None else f"{instance}.{name}"
        inner = name in INNER_METHODS and not (subject.label in STEPPED and name == "step")
        if instance is None and not static:
            raise LookupError(f"INSTANCES needs a {subject.label}")
        yield _subject(name, source, method, subject.label, inner, bound=not static)


def _subject(
    name: str, source: str, value: Any, owner: str, inner: bool, bound: bool = False
) -> Subject:
    parameters = list(inspect.signature(value).parameters.values())[bound:]
    kept = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    label = f"{owner}.{name}" if owner else name
    required = []
    for p in kept:
        if p.default is p.empty:
            keys = [k for k in (f"{owner}.{p.name}", f"{name}.{p.name}", p.name) if k in RIGHT]
            if not keys and inner:
                return Subject(label, source, (), (), True)
            if not keys:
                raise LookupError(f"RIGHT needs {p.name!r} of {owner}.{name}")
            required.append((p.name, RIGHT[keys[0]]))
    return Subject(label, source, tuple(required), tuple(p.name for p in kept), inner)
