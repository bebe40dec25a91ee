"""What takes part: a method of some library, with its settings and what it converges to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from benchmarks.peers.watch import Watch
from rl_ebm import EBM
from rl_ebm.policies import Uniform

TARGET = "p*"
"""what a method's fixed point is called where it is the EBM"""


@dataclass(frozen=True)
class Contender:
    """One method of one library.

    Attributes:
        name: what tables call it.
        package: the distribution that it is from.
        module: what that distribution is imported as.
        extra: the extra of this project that installs it; None where nothing is needed.
        network: kind and size.
        settings: those that it runs with.
        source: where these settings are recommended.
        fixed_point: "p*", or a sentence that says what else it converges to.
        train: ``train(ebm, seed, watch)`` builds everything, calls ``watch.start``, and then
            trains for ever, with ``watch(policy, updates, reward_calls)`` between updates; the
            watch ends it.
        limit: seconds that this one is given, where it is less than the others have.
        spreads: whether the library spreads its work over all cores and has no switch for it.
        one_length: whether it is for responses of one length alone, without an EOS.
        uniform: whether its reference can be the uniform one alone.
    """

    name: str
    package: str
    module: str
    extra: str | None
    network: str
    settings: str
    source: str
    fixed_point: str
    train: Callable[[EBM, int, Watch], None]
    limit: float | None = None
    spreads: bool = False
    one_length: bool = False
    uniform: bool = False

    @property
    def ends_at_target(self) -> bool:
        """Whether its fixed point is the EBM."""
        return self.fixed_point == TARGET

    @property
    def installed(self) -> bool:
        """Whether the running interpreter has its library; nothing is imported."""
        return importlib.util.find_spec(self.module) is not None

    def cannot(self, ebm: EBM) -> str:
        """Why it cannot be run on an EBM, in one sentence; "" where it can."""
        if self.one_length and ebm.space.eos_id is not None:
            return "cannot do this task: its responses end with an EOS, and here it has one length"
        if self.uniform and not isinstance(ebm.reference, Uniform):
            return "cannot do this task: its reference is the uniform law that the model starts as"
        return ""

    @property
    def how_to_install(self) -> str:
        """One sentence for who does not have it."""
        return f"not installed: pip install '.[{self.extra}]'"

    @property
    def version(self) -> str:
        """Of its library, as the running interpreter has it."""
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return self.package

    def seconds(self, limit: float) -> float:
        """How long it is given where the others have ``limit``."""
        return limit if self.limit is None else min(limit, self.limit)
