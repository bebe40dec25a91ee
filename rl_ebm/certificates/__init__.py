r"""Certificates for any policy and any reward: what samples alone prove of log Z and of the KL.

No structure of the reward is used and nothing is enumerated. With W(y) = w(y) / pi(y), w the
unnormalised target (:meth:`rl_ebm.ebm.EBM.log_weight`) and y drawn from the policy pi,

    E_pi W <= Z  (= Z where pi forbids nothing possible)        bounds log Z from below      (1)
    E_p* 1 / W <= 1 / Z    with exact samples of p*             bounds log Z from above      (2)
    R <= reward_max                                             bounds log Z from above      (3)
    KL(pi, p*) = log Z - E_pi log W,    KL(p*, pi) = E_p* log W - log Z                      (4)

(1) to (3) hold with their confidence for every number of samples
(:mod:`rl_ebm.statistics.mean_bounds`). (2) is bidirectional Monte Carlo: Grosse, Ghahramani and
Adams (2015), https://arxiv.org/abs/1511.02543. The expectations of (4) are of variables without
known bounds: for them there are asymptotic intervals only, and a KL is reported as asymptotic with
them. An end of such an interval is given where nothing speaks against normal theory: not the tail
of the sample (:mod:`rl_ebm.statistics.tails`), nor responses that the policy hardly gives
(:mod:`rl_ebm.policies.detours`; all responses, where they are few). Else it is infinite, and a
warning says why. E_pi log W and E_pi R are ``-inf`` where the policy gives mass to something
impossible: where an EBM forbids responses, and they were not all looked at, that cannot be
excluded, and the lower end is ``-inf``.

Without exact samples and without a bound on the reward nothing bounds log Z from above: a mode
of p* that the policy never visits changes no sample. KL(pi, p*) then has no upper end, and the
certificate says so. The claims are about real numbers; a sampler in float32 draws from its
probabilities up to their rounding.
"""

from rl_ebm.certificates.certificate import Certificate
from rl_ebm.certificates.limits import (
    log_z_interval,
    log_z_limits,
    self_normalised_kl,
)
from rl_ebm.certificates.procedure import certify
from rl_ebm.statistics.expectations import sample_interval

__all__ = [
    "Certificate",
    "certify",
    "log_z_interval",
    "log_z_limits",
    "sample_interval",
    "self_normalised_kl",
]
