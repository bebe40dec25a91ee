"""The diagnosis: a run's error, split into parts that say what to do about it.

With fp the fixed point of the run's objective and cap the best that the same network reaches by
exact full-gradient fitting of fp,

    KL(p*, pi) =   KL(p*, fp)                     objective
                 + KL(p*, cap) - KL(p*, fp)       capacity
                 + KL(p*, pi) - KL(p*, cap)       optimisation and sampling

exactly. A part can be negative: errors can undo each other.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.agents import (
    AgentEntry,
    Behaviour,
    ExactAgent,
    ExactConfig,
    behaviour,
    learned_log_z,
)
from rl_ebm.divergences import kl
from rl_ebm.ebm import EBM
from rl_ebm.exact import Solution, solve
from rl_ebm.fixed_points import Problem
from rl_ebm.messages.arguments import finite, shown, whole
from rl_ebm.messages.numerals import as_json
from rl_ebm.messages.words import printable
from rl_ebm.policies import Policy, Tabular, Trainable
from rl_ebm.policies.scoring import tree_q_values
from rl_ebm.soft_bellman import log_policy, q_from_r, sequence_log_probs
from rl_ebm.studies.problems import problems
from rl_ebm.training.checkpoint import RunError, load_state
from rl_ebm.training.directory import (
    CONFIG,
    STATE,
    agent_of_run,
    damage_told,
    decode,
    load,
    read_config,
)
from rl_ebm.training.run_policy import make_policy

RARE = 0.1
"""a response is missing where the policy gives it less than this share of what the target does"""
SMALL = 1e-3
"""KL in nats below which nothing is worth mending"""


@dataclass(frozen=True)
class Missing:
    """A response that the target gives far more than the policy does."""

    sequence: str
    target: float
    policy: float


@dataclass(frozen=True)
class Diagnosis:
    """What ``rl-ebm diagnose`` says; nats, means over the prompts.

    Attributes:
        total: KL(p*, pi).
        objective: KL(p*, fixed point); None where the fixed point is not known.
        capacity: what the network adds at best; None where the objective is not finite.
        optimisation: the rest; None likewise.
        fit_steps: gradient steps of the fit that measures the capacity.
        log_z_error: learned log Z less log Z, largest of the prompts; None for an agent that tells
            of none.
        missing_mass: p* of the responses that the policy gives less than a tenth of theirs.
        missing: the likeliest of them.
        starved_mass: p* of the responses that the run has drawn less than once, expected under
            what draws now; None for an agent that does not tell who draws.
        advice: one sentence.
    """

    agent: str
    total: float
    objective: float | None
    capacity: float | None
    optimisation: float | None
    fit_steps: int
    log_z_error: float | None
    missing_mass: float
    missing: list[Missing]
    starved_mass: float | None
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """JSON; infinite numbers as text."""
        return {name: as_json(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        def number(x: float | None) -> str:
            return "not known" if x is None else f"{x:.4g}"

        lines = [
            f"KL(target, policy)            {number(self.total)} nats",
            f"  objective                   {number(self.objective)}",
            f"  capacity                    {number(self.capacity)}",
            f"  optimisation and sampling   {number(self.optimisation)}",
            f"learned log Z less log Z      {number(self.log_z_error)}",
            f"p* of what the policy misses  {number(self.missing_mass)}",
            f"p* of what was hardly drawn   {number(self.starved_mass)}",
        ]
        lines += [
            f"  missing: {printable(m.sequence)}  p* {m.target:.3g}, policy {m.policy:.3g}"
            for m in self.missing
        ]
        return "\n".join([*lines, "", self.advice])


def diagnose(run: str | Path, seconds: float = 60.0, examples: int = 5) -> Diagnosis:
    """Split a run's error into objective, capacity, and optimisation and sampling.

    Args:
        run: the run directory; its EBM must be small enough to solve.
        seconds: time for the fit that measures the capacity.
        examples: how many missing responses to list.

    Raises:
        TypeError: a run that is no path, or a number that is none.
        ValueError: a number out of range, or an EBM that cannot be solved.
        RunError: no run, a damaged one, or one of an agent that is not known here.
    """
    if not isinstance(run, (str, os.PathLike)):
        raise TypeError(f"run must be the path of a run's folder, got {shown(run)}")
    run = Path(run)
    seconds, examples = finite("seconds", seconds, 0.0, above=True), whole("examples", examples, 0)
    config = read_config(run)
    with damage_told(run / CONFIG):
        entry, options = agent_of_run(config)
    name = config["agent"]["name"]
    policy, ebm = load(run)
    solution = solve(ebm)
    cases = problems(solution)
    points = [entry.limit(options, case) for case in cases]
    star = torch.stack([case.log_target for case in cases])
    log_pi = laws(policy, ebm)
    total = float(kl(star, log_pi).mean())
    state = load_state(run / STATE, "cpu") if (run / STATE).exists() else {}
    # Now: the fit goes on with the policy's weights.
    agent = _agent(entry, ebm, policy, options, solution, state, run / STATE)
    log_z_error = _log_z_error(learned_log_z(agent), solution.log_z)
    starved = _starved(
        behaviour(agent), policy, ebm, star, cases, int(state.get("reward_calls", 0))
    )
    objective, capacity, optimisation, steps = _parts(
        config, ebm, cases, [p.log_law for p in points], policy, seconds, total
    )
    missing, mass = _missing(config["ebm"], ebm, star, log_pi, examples)
    return Diagnosis(
        name,
        total,
        objective,
        capacity,
        optimisation,
        steps,
        log_z_error,
        mass,
        missing,
        starved,
        _advice(name, total, objective, capacity, optimisation),
    )


@torch.no_grad()
def laws(
    policy: Policy, ebm: EBM, temperature: float | int = 1.0, epsilon: float | int = 0.0
) -> Float[Tensor, "P N"]:
    """log pi of every response to every prompt, float64; of draws as :func:`policies.sample` has.

    Args:
        temperature: of the draws.
        epsilon: chance of each token to be drawn uniformly instead.
    """
    space = ebm.space
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    log_pi = log_policy(tree_q_values(policy, space, ebm.num_prompts).double() / temperature)
    if epsilon:
        anything = log_policy(space.state_action_mask(log_pi.device).double().log())
        keep = math.log1p(-epsilon) if epsilon < 1 else -math.inf
        log_pi = torch.logaddexp(log_pi + keep, anything + math.log(epsilon))
    return sequence_log_probs(list(log_pi.split(sizes, dim=1)), space)


def policy_of(log_laws: Float[Tensor, "P N"], cases: list[Problem], ebm: EBM) -> Tabular:
    """The policy with these laws: q = M(r) of a reward log-law that is paid at the end."""
    per_prompt = [
        q_from_r(case.at_ends(law), ebm.space) for law, case in zip(log_laws, cases, strict=True)
    ]
    tables = [torch.stack(tables) for tables in zip(*per_prompt, strict=True)]
    return Tabular.from_tables(tables, ebm.space, ebm.prompts)


def _parts(
    config: dict[str, Any],
    ebm: EBM,
    cases: list[Problem],
    limits: list[Tensor | None],
    policy: Trainable,
    seconds: float,
    total: float,
) -> tuple[float | None, float | None, float | None, int]:
    """Objective, capacity, optimisation and sampling, as far as the limits are known; steps."""
    known = [law for law in limits if law is not None]
    if len(known) < len(limits):
        return None, None, None, 0
    fixed = torch.stack(known)
    star = torch.stack([case.log_target for case in cases])
    objective = max(0.0, float(kl(star, fixed).mean()))
    if not math.isfinite(objective):
        return objective, None, None, 0
    best, steps = fixed, 0
    if config["policy"]["kind"] != "tabular":  # a table can be any law
        best, steps = _fit(config, ebm, cases, fixed, policy, seconds)
    reached = float(kl(star, best).mean())
    return objective, reached - objective, total - reached, steps


def _fit(
    config: dict[str, Any],
    ebm: EBM,
    cases: list[Problem],
    fixed: Float[Tensor, "P N"],
    policy: Trainable,
    seconds: float,
) -> tuple[Float[Tensor, "P N"], int]:
    """The best fit to the fixed point, of the run's own weights and of new ones; its steps."""
    teacher = policy_of(fixed, cases, ebm)
    found, steps = [laws(policy, ebm)], 0
    for student in (policy, make_policy(config["policy"], ebm, seed=1, values=False)):
        agent = ExactAgent(ebm, student, ExactConfig(), teacher=teacher)
        start, progress = time.monotonic(), 0.0
        while progress < 1:
            progress = min(1.0, 2 * (time.monotonic() - start) / seconds)
            agent.update(None, progress)
            steps += 1
        found.append(laws(student, ebm))
    return min(found, key=lambda law: float(kl(fixed, law).mean())), steps


def _agent(
    entry: AgentEntry,
    ebm: EBM,
    policy: Trainable,
    options: Any,
    solution: Solution,
    state: dict[str, Any],
    path: Path,
) -> Any:
    """The run's agent as it was at the last checkpoint: it says what it learned, and who draws."""
    agent = entry.agent(ebm, policy, options, torch.Generator(ebm.device), solution)
    if "agent" not in state:
        return agent
    try:
        agent.load_state_dict(state["agent"])
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} does not fit the run's configuration ({error!r})") from None
    return agent


def _log_z_error(learned: Tensor | None, log_z: Tensor) -> float | None:
    return None if learned is None else float((learned.double() - log_z).abs().max())


def _missing(
    source: dict[str, Any], ebm: EBM, star: Tensor, log_pi: Tensor, examples: int
) -> tuple[list[Missing], float]:
    rare = log_pi < star + math.log(RARE)
    p = star.exp().masked_fill(~rare, 0.0)
    mass = float(p.sum(1).mean())
    best = p.flatten().topk(min(examples, p.numel()))
    found = []
    for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if value > 0:
            index = place % star.shape[1]
            tokens, lengths = ebm.space.sequences(index, index + 1)
            text = decode(source, tokens[0, : int(lengths[0])].tolist())
            found.append(Missing(text, value, float(log_pi.flatten()[place].exp())))
    return found, mass


def _starved(
    who: Behaviour | None,
    policy: Policy,
    ebm: EBM,
    star: Float[Tensor, "P N"],
    cases: list[Problem],
    calls: int,
) -> float | None:
    """p* of the responses that ``calls`` draws are expected to hold less than once."""
    if calls == 0 or who is None:
        return None
    own = laws(policy, ebm, who.temperature, who.epsilon).exp()
    start = torch.stack([case.start_law for case in cases]).exp()
    drawn = who.policy * own + who.reference * start + who.teacher * star.exp()
    # Every prompt has its share of the calls.
    hardly = calls / len(cases) * drawn < 1
    return float(star.exp().masked_fill(~hardly, 0.0).sum(1).mean())


def _advice(
    name: str,
    total: float,
    objective: float | None,
    capacity: float | None,
    optimisation: float | None,
) -> str:
    if objective is None:
        return (
            f"What {name} with these options converges to is not known here, so that its error "
            "cannot be split: rl-ebm audit lists objectives that end at the EBM."
        )
    if total < SMALL and math.isfinite(objective):
        return f"Nothing to mend: the policy is within {total:.2g} nats of the EBM."
    if math.isinf(objective) or objective >= max(capacity or 0.0, optimisation or 0.0):
        return (
            f"The objective is the problem: {name} with these options converges to a law "
            f"{objective:.3g} nats from the EBM, however long it runs; rl-ebm audit lists those "
            "that end at the EBM."
        )
    if (capacity or 0.0) >= (optimisation or 0.0):
        return (
            f"The network is the problem: the best fit that was found for its size still loses "
            f"{capacity:.3g} nats; make it larger (--dim, --layers)."
        )
    return (
        f"Optimisation is the problem: the same network can be {optimisation:.3g} nats better; "
        "train longer, with more responses a step, or with more exploration."
    )
