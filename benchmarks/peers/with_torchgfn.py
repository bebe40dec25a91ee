"""GFlowNets of torchgfn: trajectory, sub-trajectory and detailed balance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from benchmarks.peers.contender import TARGET, Contender
from benchmarks.peers.policies import PrefixPolicy, count, one_hot
from benchmarks.peers.watch import Watch
from rl_ebm import EBM
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies import Policy, Transformer

Loss = Literal["TB", "SubTB", "DB"]
Network = Literal["its MLP", "Transformer", "its Transformer"]
LR, LR_LOG_Z, CLIP = 1e-3, 1e-1, 1.0
SIMPLE = "`tutorials/examples/train_hypergrid_simple.py`"
FULL = "`tutorials/examples/train_hypergrid.py`"
RECURRENT = "`tutorials/examples/train_bitsequence_recurrent.py`"


def networks(ebm: EBM, network: Network, flow: bool) -> tuple[Any, Any, Policy]:
    """The estimators of P_F and of log F (None where none is needed), and the policy to verify."""
    from gfn.estimators import (
        DiscretePolicyEstimator,
        RecurrentDiscretePolicyEstimator,
        ScalarEstimator,
    )
    from gfn.preprocessors import IdentityPreprocessor
    from gfn.utils.modules import MLP, TransformerDiscreteSequenceModel

    from benchmarks.peers.torchgfn_parts import CarryPolicy, LastRow, OneHot, steps_read

    space, size = ebm.space, TransformerConfig()
    actions = space.vocab_size + 1
    if network == "its Transformer":
        model = TransformerDiscreteSequenceModel(
            vocab_size=actions,
            embedding_dim=size.dim,
            num_heads=size.heads,
            ff_hidden_dim=size.hidden,
            num_layers=size.layers,
            max_position_embeddings=steps_read(space.max_length),
        )
        policy: Policy = CarryPolicy(model, space)
        return RecurrentDiscretePolicyEstimator(model, actions), None, policy
    if network == "Transformer":
        transformer = Transformer(space, size)
        plain = IdentityPreprocessor(output_dim=None)
        pf = DiscretePolicyEstimator(LastRow(transformer), actions, preprocessor=plain)
        head = LastRow(transformer, torch.nn.Linear(size.dim, 1))
        log_f = ScalarEstimator(head, preprocessor=plain) if flow else None
        return pf, log_f, transformer
    hot = OneHot(space)
    mlp = MLP(hot.output_dim, actions)
    pf = DiscretePolicyEstimator(mlp, actions, preprocessor=hot)
    log_f = ScalarEstimator(MLP(hot.output_dim, 1), preprocessor=hot) if flow else None

    def rows(prefixes: torch.Tensor) -> torch.Tensor:
        return mlp(one_hot(prefixes, space.vocab_size))[:, : space.vocab_size]

    return pf, log_f, PrefixPolicy(space, rows)


def gflownet(loss: Loss, pf: Any, log_f: Any) -> Any:
    """Its class for a loss; no backward policy, since the environment is a tree."""
    from gfn.gflownet import DBGFlowNet, SubTBGFlowNet, TBGFlowNet

    if loss == "TB":
        return TBGFlowNet(pf=pf, pb=None, init_logZ=0.0, constant_pb=True)
    if loss == "DB":
        return DBGFlowNet(pf=pf, pb=None, logF=log_f, constant_pb=True)
    return SubTBGFlowNet(
        pf=pf, pb=None, logF=log_f, weighting="geometric_within", lamda=0.9, constant_pb=True
    )


def trainer(loss: Loss, network: Network, batch: int) -> Callable[[EBM, int, Watch], None]:
    """What trains a GFlowNet on responses of its own."""

    def train(ebm: EBM, seed: int, watch: Watch) -> None:
        from gfn.utils.common import set_seed

        from benchmarks.peers.torchgfn_parts import Sequences

        set_seed(seed)
        env = Sequences(ebm)
        pf, log_f, policy = networks(ebm, network, flow=loss != "TB")
        model = gflownet(loss, pf, log_f)
        rest = [p for name, p in model.named_parameters() if name != "logZ"]
        optimizer = torch.optim.Adam(rest, lr=LR)
        if loss == "TB":
            optimizer.add_param_group({"params": [model.logZ], "lr": LR_LOG_Z})
        reduction = "sum" if loss == "SubTB" else "mean"
        updates = 0
        watch.start(count(model))
        while True:
            # On-policy: the probabilities of the sampling pass are those of the loss.
            trajectories = model.sample_trajectories(env, n=batch, save_logprobs=True)
            samples = model.to_training_samples(trajectories)
            optimizer.zero_grad()
            value = model.loss(env, samples, recalculate_all_logprobs=False, reduction=reduction)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            updates += 1
            watch(policy, updates, updates * batch)

    return train


def contender(
    loss: Loss, network: Network, source: str, batch: int = 16, note: str = ""
) -> Contender:
    rates = f"Adam {LR}" + (f", {LR_LOG_Z} for log Z" if loss == "TB" else "")
    extra = "; geometric_within weights, lambda 0.9, summed" if loss == "SubTB" else ""
    return Contender(
        name=f"torchgfn {loss} ({network}){note}",
        package="torchgfn",
        module="gfn",
        extra="peers-torchgfn",
        network=network,
        settings=f"`{loss}GFlowNet`, constant backward policy (a tree), on-policy, {batch} "
        f"responses a step, {rates}, gradients clipped at {CLIP:g}{extra}",
        source=source,
        fixed_point=TARGET,
        train=trainer(loss, network, batch),
        one_length=True,
    )


CONTENDERS = (
    contender("TB", "its MLP", SIMPLE),
    contender("SubTB", "its MLP", FULL),
    contender("DB", "its MLP", SIMPLE),
    contender("TB", "its Transformer", f"{RECURRENT}, with its Transformer for its LSTM"),
    contender("TB", "Transformer", f"{SIMPLE}, with a network of ours"),
    contender("SubTB", "Transformer", f"{FULL}, with a network of ours"),
    contender("DB", "Transformer", f"{SIMPLE}, with a network of ours"),
    contender(
        "TB",
        "its Transformer",
        f"{RECURRENT}, with its Transformer for its LSTM, and as many responses as our agents",
        2048,
        ", 2048 responses",
    ),
)
