"""torchrl's losses of language models, each a LossModule over a student that replays log pi.

``GRPOLoss`` and its kin by their ``forward``, its KL added to its objective, as its scripts do.
Their ``entropy_bonus``, which is shipped, wants the entropies of whole rows of logits, where a
policy gradient has those of tokens: it is off here.

Advantages are ``MCAdvantage``'s: of each step with ``trajectory_return=None``, which is shipped, or
of the sum or mean of a trajectory's, less the mean and over the standard deviation. A KL in the
reward is ``KLComputation``'s (``RetrieveKL(add_to_reward=True)``), called once and compared: coeff
times log pi - log ref off the reward of each token. A reward of shape (1, 1), which torchrl's own
have, is thereby paid at every token; one of shape (T, 1) where it says, here at the last.

``SFTLoss`` fits samples of the EBM; its KL is a mean over all tokens that it is given, here those
of the responses.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.studies.frameworks.rows import (
    Case,
    FrameworkError,
    Instead,
    Row,
    family,
    part,
    version_of,
)
from rl_ebm.studies.losses.advantages import Advantages

LLM = "torchrl.objectives.llm"
KL = "torchrl.envs.llm.transforms.kl"
CLASSES = ("GRPOLoss", "DAPO", "CISPOLoss")
EPSILON = 1e-6
"""below which MCAdvantage takes no standard deviation"""
AGGREGATIONS = ("token_mean", "prompt_mean")
REWARDS = (
    ("(1, 1)", None), ("(1, 1)", "sum"), ("(1, 1)", "mean"), ("(T, 1)", None), ("(T, 1)", "sum"),
)  # fmt: skip
NAME = f"{LLM}.GRPOLoss"
IN_REWARD = {"entropy_bonus": False, "add_to_reward": True}
INSTEAD = Instead(
    NAME,
    {**IN_REWARD, "reward": "(T, 1)", "trajectory_return": "sum"},
    "leave kl_to_ref_coeff=None, give the reward the shape (T, 1) with zeros before the last "
    "token, and use RetrieveKL(..., coeff=beta, add_to_reward=True) with "
    'MCAdvantage(trajectory_return="sum"): kl_to_ref_coeff adds a k3 to each token, whose gradient '
    "is that of the KL from the reference, and a reward of shape (1, 1) is paid at every token",
)


SFT = f"{LLM}.SFTLoss"
FITS: tuple[dict[str, Any], ...] = (
    {"loss_function": "sft"},
    {"loss_function": "sft", "kl_to_ref_coeff": "beta"},
    {"loss_function": "minor_sft", "beta": "beta"},
)
FITTED = Instead(
    SFT,
    {"normalize_by_seq_length": False, "loss_function": "sft"},
    'set normalize_by_seq_length=False with loss_function="sft" and kl_to_ref_coeff=None: a '
    "response then counts once, whatever its length, and nothing but the samples' law is fitted",
)


def rows(case: Case) -> list[Row]:
    """GRPO and its kin with the KL in the loss; GRPO with it in the reward; what fits samples."""
    _agree(case.beta)
    found = [_row(case, "GRPOLoss", {"entropy_bonus": False})]
    for name, aggregation in product(CLASSES, AGGREGATIONS):
        options = {"aggregation": aggregation, "entropy_bonus": False, "kl_to_ref_coeff": "beta"}
        found.append(_row(case, name, options))
    for shape, reduced in REWARDS:
        paid = {**IN_REWARD, "reward": shape, "trajectory_return": reduced}
        found.append(_row(case, "GRPOLoss", paid, _in_reward(case.beta, shape, reduced)))
    found += [_sft_row(case, normalised, more) for normalised in (True, False) for more in FITS]
    return [*found, *family(f"{LLM}.distillation", _distillation_rows)]


def _row(
    case: Case, name: str, options: dict[str, Any], advantages: Advantages | None = None
) -> Row:
    given: dict[str, Any] = {"entropy_bonus": False}
    if "kl_to_ref_coeff" in options:
        given |= {"aggregation": options["aggregation"], "kl_to_ref_coeff": case.beta}
    return Row(
        f"{LLM}.{name}",
        options,
        "policy-gradient",
        loss_of(part(LLM, name)(_Student(), **given)),
        advantages or Advantages(None, "std", EPSILON),
        instead=INSTEAD,
    )


def _in_reward(beta: float, shape: str, reduced: str | None) -> Advantages:
    """What MCAdvantage makes of the rewards of KLComputation; a scale and a mean move no limit."""

    def of_each_token(
        reward: Tensor, log_pi_old: Tensor, log_ref: Tensor, mask: Tensor
    ) -> Float[Tensor, "B T"]:
        last = mask.long().cumsum(1) == mask.long().sum(1, keepdim=True)
        at = mask.bool() if shape == "(1, 1)" else last & mask.bool()
        return torch.where(at, reward[:, None], 0.0) - beta * (log_pi_old - log_ref) * mask

    def of_each(
        reward: Tensor, log_pi_old: Tensor, log_ref: Tensor, mask: Tensor
    ) -> Float[Tensor, "B"]:
        found = of_each_token(reward, log_pi_old, log_ref, mask).sum(1)
        return found / mask.sum(1) if reduced == "mean" else found

    return (
        Advantages(of_each_token, "none")
        if reduced is None
        else Advantages(of_each, "std", EPSILON)
    )


def loss_of(module: Any) -> Callable[..., Tensor]:
    """A GRPO of torchrl as a function of the contract."""
    tensordict = part("tensordict", "TensorDict")

    def loss(
        log_pi: Tensor, log_pi_old: Tensor, log_ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        module.actor_network.given = _Distribution(log_pi, mask.bool())
        data = tensordict(
            {
                "advantage": advantages[..., None],
                ("tokens", "full"): torch.zeros_like(mask, dtype=torch.long),
                ("log_probs", "full"): log_pi_old,
                ("next", "ref_log_probs", "full"): log_ref,
            },
            batch_size=len(mask),
        )
        found = module(data)
        parts = [found.loss_objective, found.loss_kl_to_ref]
        total = torch.stack([x.reshape(()) for x in parts if x is not None]).sum()
        assert isinstance(total, Tensor)
        return total

    return loss


class _Distribution:
    """Of tokens whose log-probabilities are known."""

    def __init__(self, log_pi: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> None:
        self.log_pi, self.mask = log_pi, mask

    def log_prob(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return self.log_pi


class _Ragged:
    """Log-probabilities of responses, each as long as it is: what an actor returns of them."""

    def __init__(self, log_pi: list[Tensor]) -> None:
        self.log_pi = log_pi

    def get(self, *_: Any, **__: Any) -> list[Tensor]:
        return self.log_pi


class _Student(torch.nn.Module):
    """A policy that says what it was given."""

    given: Any = None
    tokenizer: Any = object()

    def get_dist(self, *_: Any, **__: Any) -> Any:
        return self.given

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.given


def _agree(beta: float) -> None:
    """Call KLComputation on two responses, and compare.

    Raises:
        FrameworkError: it does something else in this release.
    """
    transform = part(KL, "KLComputation")(
        gen_log_probs_full_key=("gen", "full"),
        ref_log_probs_full_key=("ref", "full"),
        add_to_reward=True,
        coeff=beta,
    )
    tensordict, lazy_stack = part("tensordict", "TensorDict"), part("tensordict", "lazy_stack")
    log_pi, log_ref = -torch.arange(1.0, 13.0, dtype=torch.float64).view(2, 2, 3)
    reward = torch.tensor([1.0, 2.0], dtype=torch.float64)
    each = [
        tensordict({("gen", "full"): p, ("ref", "full"): q, "reward": r.view(1, 1)}, [])
        for p, q, r in zip(log_pi, log_ref, reward, strict=True)
    ]
    paid = torch.stack([x[:, 0] for x in transform(lazy_stack(each)).get("reward", as_list=True)])
    if not torch.allclose(paid, reward[:, None] - beta * (log_pi - log_ref)):
        raise FrameworkError(
            f"torchrl {version_of('torchrl')} is not the release that this adapter knows: "
            f"KLComputation in {KL} was expected to take coeff * (log pi - log ref) off each token"
        )


def _sft_row(case: Case, normalised: bool, more: dict[str, Any]) -> Row:
    options = {"normalize_by_seq_length": normalised, **more}
    given = {k: case.beta if v == "beta" else v for k, v in options.items()}
    return Row(
        SFT,
        options,
        "policy-gradient",
        _sft_loss(part(LLM, "SFTLoss")(_Student(), **given)),
        sampler="teacher",
        default=normalised and more == FITS[0],
        instead=FITTED,
    )


def _sft_loss(module: Any) -> Callable[..., Tensor]:
    """SFTLoss as a function of the contract; each response as long as it is, as torchrl's are."""
    tensordict, lazy_stack = part("tensordict", "TensorDict"), part("tensordict", "lazy_stack")

    def loss(
        log_pi: Tensor, log_pi_old: Tensor, log_ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        kept = [m.bool() for m in mask]
        module.actor_network.given = _Ragged([p[m] for p, m in zip(log_pi, kept, strict=True)])
        each = [
            tensordict(
                {
                    ("history", "full"): torch.zeros(1, dtype=torch.long),  # for the actor
                    ("next", "ref_log_probs", "full"): q[m],
                    ("masks", "all_assistant_mask"): m[m],
                    ("masks", "all_attention_mask"): m[m],
                }
            )
            for q, m in zip(log_ref, kept, strict=True)
        ]
        found = module(lazy_stack(each))
        parts = (found.loss_sft, found.loss_kl_to_ref)
        total = torch.stack([x.reshape(()) for x in parts if x is not None]).sum()
        assert isinstance(total, Tensor)
        return total

    return loss


def _distillation_rows() -> list[Row]:
    """DistillationLoss in its two directions, each with the responses that it is meant for."""
    module_of = part(f"{LLM}.distillation", "DistillationLoss")
    found = []
    for direction, sampler in (("reverse", "student"), ("forward", "teacher")):
        for normalised in (True, False):
            options = {"kl_direction": direction, "normalize_by_seq_length": normalised}
            module = module_of(_Student(), tokenizer=None, **options)
            found.append(
                Row(
                    f"{LLM}.DistillationLoss",
                    options,
                    "distillation",
                    _distillation_loss(module),
                    sampler=sampler,
                    default=direction == "reverse" and normalised,
                )
            )
    return found


def _distillation_loss(module: Any) -> Callable[..., Tensor]:
    tensordict = part("tensordict", "TensorDict")

    def loss(
        student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        log_pi, log_q = (
            x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].masked_fill(~mask.bool(), 0.0)
            for x in (student_logits, teacher_logits)
        )
        size = len(mask)
        module.actor_network.given = tensordict({("log_probs", "full"): log_pi}, batch_size=size)
        data = tensordict(
            {
                ("history", "full"): tokens,
                ("next", "teacher_log_probs", "full"): log_q,
                ("masks", "all_assistant_mask"): mask.bool(),
                ("masks", "all_attention_mask"): mask.bool(),
            },
            batch_size=size,
        )
        found = module(data).loss_distill
        assert isinstance(found, Tensor)
        return found

    return loss
