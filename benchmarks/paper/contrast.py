"""Ways to train an EBM whose partition function is not summed: one step of each.

The gradient of the risk is E_p grad R - E_data grad R; each method has another way to the first
term, or around it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paper.chain import Chain
from benchmarks.paper.fit import descend_ebm, make_arm, make_ebm
from rl_ebm import TokenSpace
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies import log_prob
from rl_ebm.policies.decoding import sample
from rl_ebm.rewards import TransformerReward

POLICY_RATE = 3e-3
"""of the ARM that a method keeps beside the EBM"""
INNER = 8
"""steps of the policy of min-max to one of the EBM: the inner maximum comes first"""


class Law(Protocol):
    """What the data are drawn from."""

    space: TokenSpace

    def draw(self, n: int, generator: torch.Generator) -> Int64[Tensor, "n T"]:
        """Responses."""

    def log_p(self, tokens: Int64[Tensor, "n T"]) -> Float64[Tensor, "n"]:
        """Their log-probabilities."""


class Enumerated:
    """A law given by the log-probability of every sequence."""

    def __init__(self, space: TokenSpace, log_rho: Float64[Tensor, "N"]) -> None:
        self.space, self.log_rho = space, log_rho
        self.tokens, _ = space.sequences()

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        draws = torch.multinomial(self.log_rho.exp(), n, replacement=True, generator=generator)
        return self.tokens[draws]

    def log_p(self, tokens: Tensor) -> Tensor:
        lengths = torch.full((len(tokens),), self.space.max_length)
        return self.log_rho[self.space.sequence_indices(tokens, lengths)]


class ChainLaw:
    """The EBM of a chain reward: exact samples and probabilities beyond enumeration."""

    def __init__(self, chain: Chain) -> None:
        self.space, self.chain = chain.space, chain

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        ids = torch.zeros(n, dtype=torch.int64)
        return sample(self.chain, self.space, n, generator, ids).tokens

    def log_p(self, tokens: Tensor) -> Tensor:
        lengths = torch.full((len(tokens),), self.space.max_length)
        return log_prob(self.chain, self.space, tokens, lengths).double()


class Setting:
    """What every method shares: the data, the EBM, its optimiser."""

    def __init__(
        self, law: Law, config: TransformerConfig, batch_size: int, lr: float, seed: int
    ) -> None:
        self.law, self.space, self.batch_size = law, law.space, batch_size
        self.reward = make_ebm(self.space, config, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.adam(self.reward.parameters(), lr)
        self.policy = make_arm(self.space, config, seed + 100)
        log_uniform = -self.space.max_length * math.log(self.space.vocab_size)
        self.log_z = torch.tensor(-log_uniform, requires_grad=True)

    def adam(self, parameters: object, lr: float = POLICY_RATE) -> torch.optim.Optimizer:
        """An Adam whose rate follows the run's schedule."""
        optimizer = torch.optim.Adam(parameters, lr=lr)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["peak"] = lr
        self.optimizers.append(optimizer)
        return optimizer

    def set_rate(self, progress: float) -> None:
        """A constant rate that falls to 0 over the last fifth."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, 5 * (1 - progress))

    def data(self) -> Tensor:
        """Responses drawn from the law."""
        return self.law.draw(self.batch_size, self.generator)

    def r(self, tokens: Tensor, reward: TransformerReward | None = None) -> Tensor:
        """R of responses, with gradient."""
        lengths = torch.full((len(tokens),), self.space.max_length)
        model = self.reward if reward is None else reward
        out: Tensor = model(tokens, lengths, torch.zeros_like(lengths))
        return out

    def draw(self, n: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Responses of the policy: a batch of them, drawn with its own generator by default."""
        n = self.batch_size if n is None else n
        ids = torch.zeros(n, dtype=torch.int64)
        generator = self.generator if generator is None else generator
        return sample(self.policy, self.space, n, generator, ids).tokens

    def log_q(self, tokens: Tensor) -> Tensor:
        """log-probability of responses under the policy, with gradient."""
        lengths = torch.full((len(tokens),), self.space.max_length)
        return log_prob(self.policy, self.space, tokens, lengths)

    def teach(self) -> Callable[[], None]:
        """A step of teacher forcing of the policy on the data."""
        optimizer = self.adam(self.policy.parameters())

        def step() -> None:
            optimizer.zero_grad()
            (-self.log_q(self.data()).mean()).backward()
            optimizer.step()

        return step

    def contrast(self, negatives: Tensor) -> None:
        """One step on E_negatives R - E_data R."""
        optimizer = self.optimizers[0]
        optimizer.zero_grad()
        r = self.r(torch.cat([negatives, self.data()]))
        (r[: len(negatives)].mean() - r[len(negatives) :].mean()).backward()
        optimizer.step()


Step = Callable[[], Tensor | None]
"""One step of a method; responses that stand for the EBM's own, where it has some."""


def risk(s: Setting) -> Step:
    """Both terms by enumeration: no sampling at all."""
    assert isinstance(s.law, Enumerated)
    descend = descend_ebm(s.reward, s.law.log_rho)

    def step() -> None:
        s.optimizers[0].zero_grad()
        descend()
        s.optimizers[0].step()

    return step


def exact(s: Setting) -> Step:
    """The sum over all sequences, data sampled."""
    tokens, _ = s.space.sequences()

    def step() -> None:
        s.optimizers[0].zero_grad()
        r = s.r(torch.cat([tokens, s.data()]))
        log_z = torch.logsumexp(r[: len(tokens)], 0)
        (log_z - r[len(tokens) :].mean()).backward()
        s.optimizers[0].step()

    return step


def gibbs(s: Setting) -> Step:
    """Persistent chains, one sweep of Gibbs a step."""
    a, t, n = s.space.vocab_size, s.space.max_length, s.batch_size
    chains = torch.randint(a, (n, t), generator=s.generator)

    def step() -> Tensor:
        for place in torch.randperm(t, generator=s.generator).tolist():
            candidates = chains[:, None].repeat(1, a, 1)
            candidates[:, :, place] = torch.arange(a)
            with torch.no_grad():
                r = s.r(candidates.flatten(0, 1)).view(n, a)
            noise = torch.empty_like(r).exponential_(generator=s.generator).log_()
            chains[:, place] = (r - noise).argmax(1)
        s.contrast(chains)
        return chains.clone()

    return step


def metropolis(s: Setting) -> Step:
    """Persistent chains, proposals from an ARM that is fitted to the same data."""
    improve, chains, n = s.teach(), s.draw(), s.batch_size

    def step() -> Tensor:
        improve()
        proposals = s.draw()
        with torch.no_grad():
            both = torch.cat([chains, proposals])
            # Both are weighed anew: the EBM and the proposal have moved since the last step.
            weight = s.r(both) - s.log_q(both)
        accept = torch.rand(n, generator=s.generator).log() < weight[n:] - weight[:n]
        chains[accept] = proposals[accept]
        s.contrast(chains)
        return chains.clone()

    return step


def nce(s: Setting) -> Step:
    """Noise-contrastive estimation against that ARM, log Z a parameter (Gutmann, Hyvarinen 2010)."""
    improve, optimizer = s.teach(), s.adam([s.log_z])

    def step() -> None:
        improve()
        both = torch.cat([s.draw(), s.data()])
        with torch.no_grad():
            log_q = s.log_q(both)
        logit = s.r(both) - s.log_z - log_q
        is_data = (torch.arange(2 * s.batch_size) >= s.batch_size).float()
        s.optimizers[0].zero_grad()
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit, is_data).backward()
        s.optimizers[0].step()
        optimizer.step()

    return step


def min_max(s: Setting) -> Step:
    """A policy as the sampler, trained to the EBM by RLOO (arXiv 2512.15605, App. A.8)."""
    optimizer, n = s.adam(s.policy.parameters()), s.batch_size
    ids = torch.zeros(n, dtype=torch.int64)

    def follow() -> Tensor:
        tokens = s.draw()
        with torch.no_grad():
            log_weight = s.r(tokens)
        optimizer.zero_grad()
        log_pi = s.log_q(tokens)
        policy_gradient_loss(
            log_pi[:, None], torch.zeros(n, 1), log_weight, ids + 1, ids
        ).backward()
        optimizer.step()
        return tokens

    def step() -> Tensor:
        for _ in range(INNER):
            tokens = follow()
        s.contrast(tokens)
        return tokens

    return step


METHODS: dict[str, Callable[[Setting], Step]] = {
    "risk": risk,
    "exact": exact,
    "gibbs": gibbs,
    "metropolis": metropolis,
    "nce": nce,
    "min-max": min_max,
}


def evaluations(space: TokenSpace, batch_size: int) -> dict[str, int]:
    """Responses that each method scores by R in a step."""
    return {
        "risk": space.num_sequences,
        "exact": space.num_sequences + batch_size,
        "gibbs": batch_size * space.max_length * space.vocab_size + 2 * batch_size,
        "metropolis": 4 * batch_size,
        "nce": 2 * batch_size,
        "min-max": (INNER + 2) * batch_size,
    }


def timed(step: Step, s: Setting, seconds: float) -> Iterator[tuple[float, int]]:
    """Steps until the time is over: processor time spent in them, and their number.

    What the caller does between two steps costs nothing.
    """
    spent, count = 0.0, 0
    while spent < seconds:
        s.set_rate(spent / seconds)
        start = time.process_time()
        step()
        spent += time.process_time() - start
        count += 1
        yield spent, count
