"""verl's actor: every policy loss, ``kl_penalty`` and advantage estimator that has a limit.

What is called is ``ppo_loss``, which its workers call: a policy loss by its name, and the KL loss
with its coefficient. Rewards become advantages by the estimators of ``core_algos``; each is called
once, on a batch of six, and must return there what :class:`Advantages` does (``_agree``), which
then takes the mean of a large group in its place. A KL in the reward is what ``apply_kl_penalty``
pays: its ``kl_penalty`` of each token, times ``kl_coef``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, FrameworkError, Instead, Row, part, version_of
from rl_ebm.studies.losses.advantages import Advantages, Combine, Returns

CORE = "verl.trainer.ppo.core_algos"
LOSSES = "verl.workers.utils.losses"
PENALTIES = ("kl", "abs", "mse", "low_var_kl")
STRAIGHT = ("kl+", "abs+", "low_var_kl+")
"""with the gradient of mse in the place of their own"""
MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)  # fmt: skip
POLICY = (
    "gspo", "sapo", "gpg", "geo_mean", "cispo", "dppo_tv", "dppo_kl", "dro", "clip_cov", "kl_cov",
)  # fmt: skip
GROUPED: dict[str, tuple[Combine, float]] = {
    "grpo": ("std", 1e-6),
    "grpo_vectorized": ("std", 1e-6),
    "rloo": ("leave-one-out", 0.0),
    "rloo_vectorized": ("leave-one-out", 0.0),
    "gpg": ("mean", 0.0),
    "opo": ("mean", 0.0),
    "reinforce_plus_plus_baseline": ("std", 0.0),
}
"""estimators of whole responses; opo weighs its mean by lengths, which are the same in its test"""
TO_GO = ("gae", "reinforce_plus_plus")
"""of what is still to come from each token on: their baseline and scale move nothing"""
OVER_TOKENS = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
"""those that whiten the tokens of a batch"""
DEFAULT = {"adv_estimator": "gae", "use_kl_loss": False, "use_kl_in_reward": False}
NAME = f"{LOSSES}.ppo_loss"
INSTEAD = Instead(
    NAME,
    {"adv_estimator": "grpo", "use_kl_loss": False, "use_kl_in_reward": True, "kl_penalty": "kl"},
    'set algorithm.use_kl_in_reward=True, algorithm.kl_penalty="kl" and algorithm.kl_ctrl.kl_coef='
    "beta, with actor.use_kl_loss=False: no kl_loss_type is the gradient of the KL of whole "
    "responses, since each sees its own token only",
)


def rows(case: Case) -> list[Row]:
    """What is shipped; then one thing after another, the rest as in its examples of GRPO."""
    in_loss: dict[str, Any] = {"adv_estimator": "grpo", "use_kl_loss": True}
    in_reward: dict[str, Any] = {
        "adv_estimator": "grpo", "use_kl_loss": False, "use_kl_in_reward": True,
    }  # fmt: skip
    others = [*list(GROUPED)[1:], *TO_GO]
    low, plain = {"kl_loss_type": "low_var_kl"}, {"norm_adv_by_std_in_grpo": False}
    asked = [
        DEFAULT,
        *(in_loss | {"kl_loss_type": k} for k in (*PENALTIES, *STRAIGHT)),
        *(in_loss | {"kl_loss_type": k} | plain for k in (*PENALTIES, *STRAIGHT)),
        *(in_loss | low | {"loss_agg_mode": m} for m in MODES[1:]),
        *(in_loss | low | {"loss_mode": m} for m in POLICY),
        *(in_loss | low | {"adv_estimator": a} for a in (*others, "grpo_passk")),
        *(in_reward | {"kl_penalty": k} for k in PENALTIES),
        *(in_reward | {"kl_penalty": "kl", "adv_estimator": a} for a in others),
    ]  # fmt: skip
    return [_row(case, options) for options in asked]


def _row(case: Case, options: dict[str, Any]) -> Row:
    unknown = _unknown(case, options)
    return Row(
        NAME,
        options,
        "policy-gradient",
        loss_of(actor(case, options)),
        Advantages() if unknown else _advantages(case, options),
        default=options == DEFAULT,
        instead=INSTEAD,
        unknown=unknown,
    )


def _unknown(case: Case, options: dict[str, Any]) -> str | None:
    """Why there is no limit of large batches, or none that needs no critic."""
    estimator = options["adv_estimator"]
    if options.get("loss_mode") in ("clip_cov", "kl_cov"):
        return "it picks tokens of a batch by chance or by rank: no large batch"
    if estimator == "grpo_passk":
        return "it pays the best of a group alone: no large group"
    if not options["use_kl_loss"]:
        return None
    if estimator == "gae":
        return "its scale is how much a critic leaves over, and the KL loss has none"
    if estimator in OVER_TOKENS and (case.prompts > 1 or not case.fixed_length):
        return "its scale is a deviation over the tokens of all prompts, and the KL loss has none"
    return None


def actor(case: Case, options: dict[str, Any]) -> Any:
    """verl's own configuration of an actor."""
    config = part("verl.workers.config", "ActorConfig")
    policy = part("verl.workers.config", "PolicyLossConfig")
    keys = ("use_kl_loss", "kl_loss_type", "loss_agg_mode")
    return config(
        strategy="fsdp",
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=1,
        kl_loss_coef=case.beta,
        policy_loss=policy(loss_mode=options.get("loss_mode", "vanilla"), dro_beta=case.beta),
        **{k: options[k] for k in keys if k in options},
    )


def batch_of(log_pi: Tensor, mask: Bool[Tensor, "B T"], **more: Tensor) -> tuple[Any, Any]:
    """(model output, data) as a worker has them, after a prompt of one token."""
    tensordict = part("tensordict", "TensorDict")
    one = torch.ones(len(mask), 1, dtype=torch.bool)
    attention = torch.cat([one, mask.bool()], 1)
    # The output before each token, packed: the last of a row predicts what comes after its end.
    packed = torch.cat([log_pi, log_pi.new_zeros(len(mask), 1)], 1)[attention]
    zeros = torch.zeros_like(mask, dtype=torch.long)
    given = {
        "prompts": zeros[:, :1],
        "responses": zeros,
        "attention_mask": attention.long(),
        "response_mask": mask.bool(),
        **more,
    }
    data = tensordict(given, batch_size=len(mask))
    for name, value in {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}.items():
        data.set_non_tensor(name, value)
    return {"log_probs": packed}, data


def loss_of(config: Any) -> Callable[..., Tensor]:
    """The actor's loss as a function of the contract."""
    ppo_loss = part(LOSSES, "ppo_loss")

    def loss(
        log_pi: Tensor, log_pi_old: Tensor, log_ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        output, data = batch_of(
            log_pi, mask, old_log_probs=log_pi_old, ref_log_prob=log_ref, advantages=advantages
        )
        found = ppo_loss(config, output, data)[0]
        assert isinstance(found, Tensor)
        return found

    return loss


def _advantages(case: Case, options: dict[str, Any]) -> Advantages:
    """Of an estimator, its KL in the reward or not, once it is seen to be the same."""
    estimator = options["adv_estimator"]
    token_rewards = _token_rewards(case, options)
    if estimator in TO_GO:
        found = Advantages(lambda *given: _to_go(token_rewards(*given)), "none")
        if not options.get("use_kl_in_reward"):  # the same at each token, and whitened
            found = Advantages(None, "std")
    else:
        combine, epsilon = GROUPED[estimator]
        if options.get("norm_adv_by_std_in_grpo") is False:
            combine, epsilon = "mean", 0.0
        returns: Returns | None = None
        if options.get("use_kl_in_reward"):
            returns = lambda *given: token_rewards(*given).sum(1)  # noqa: E731
        found = Advantages(returns, combine, epsilon)
    _agree(found, token_rewards, options)
    return found


def _token_rewards(case: Case, options: dict[str, Any]) -> Returns:
    """The reward at the last token of each response, less the penalty of each token."""
    penalty = part(CORE, "kl_penalty")

    def paid(
        reward: Float[Tensor, "B"], log_pi_old: Tensor, log_ref: Tensor, mask: Tensor
    ) -> Tensor:
        last = mask.long().cumsum(1) == mask.long().sum(1, keepdim=True)
        found = torch.where(last & mask.bool(), reward[:, None], 0.0)
        if options.get("use_kl_in_reward"):
            found = found - case.beta * penalty(log_pi_old, log_ref, options["kl_penalty"]) * mask
        return found

    return paid


def _to_go(token_rewards: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return token_rewards.flip(1).cumsum(1).flip(1)


def _agree(said: Advantages, token_rewards: Returns, options: dict[str, Any]) -> None:
    """Call verl's estimator on six responses of three tokens, and compare up to a scale.

    Raises:
        FrameworkError: it does something else in this release.
    """
    generator = torch.Generator().manual_seed(0)
    reward, *rest = torch.randn(3, 6, 3, generator=generator, dtype=torch.float64).unbind()
    given = (reward[:, 0], *rest, torch.ones(6, 3, dtype=torch.bool))
    theirs = _theirs(token_rewards(*given), given[3], options)
    mine = said.of_each(*given)
    mine = mine[:, None].expand(6, 3) if mine.ndim == 1 else mine
    mine, theirs = mine - mine.mean(), theirs - theirs.mean()
    off = torch.linalg.vector_norm(mine / mine.norm() - theirs / theirs.norm())
    if float(off) > 1e-4:
        raise FrameworkError(
            f"verl {version_of('verl')} is not the release that this adapter knows: "
            f"adv_estimator={options['adv_estimator']} was expected in {CORE} to be "
            f"{said.combine!r} of the returns, up to a scale"
        )


def _theirs(token_rewards: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    name = options["adv_estimator"]
    floats = mask.to(token_rewards.dtype)
    if name == "gae":
        whitened = part(CORE, "compute_gae_advantage_return")(
            token_rewards, torch.zeros_like(token_rewards), floats, 1.0, 1.0
        )[0]
        assert isinstance(whitened, Tensor)
        return whitened
    config = part("verl.trainer.config", "AlgoConfig")()
    scaled = {"norm_adv_by_std_in_grpo": options.get("norm_adv_by_std_in_grpo", True)}
    more = scaled if name in ("grpo", "grpo_vectorized") else {}
    found = part(CORE, "get_adv_estimator_fn")(name)(
        token_level_rewards=token_rewards,
        response_mask=floats,
        index=np.zeros(len(mask), dtype=np.int64),
        config=config,
        **more,
    )[0]
    assert isinstance(found, Tensor)
    return found
