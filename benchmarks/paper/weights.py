"""What the weights hold: the price of a causal mask, ranks, CKA, and a probe for V(s).

    python -m benchmarks.paper.weights [--quick]

Three models of equal size on the same laws: the EBM, the EBM with a causal mask (mean-pooled
all the same), the ARM. Features are those of every layer at every position of every sequence.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import tyro
from jaxtyping import Float64
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor, nn

from benchmarks.paper import laws
from benchmarks.paper.common import Options, Rows, collect, legend_below, publish, select, table
from benchmarks.paper.fit import (
    MAKE,
    SMALL,
    Schedule,
    descend_arm,
    descend_ebm,
    fit,
    flax_init,
    gap,
    log_law,
    make_arm,
)
from rl_ebm import EBM, TokenSpace, solve
from rl_ebm.networks.backbone import causal, everything
from rl_ebm.policies import Transformer
from rl_ebm.policies.scoring import tree_q_values
from rl_ebm.rewards import TransformerReward
from rl_ebm.studies.seeds import geometric_interval, interval

PARTS = (0.2, 0.3, 0.5, 0.7, 1.0)  # of a variance, marked on a logarithmic axis
LAWS = {
    "zipf": "Zipf in order",
    "normal": "softmax(N(0, I) / 0.3)",
    "pairwise": "scores of all pairs",
}
CHECKPOINTS = 12
"""roots of the number of steps at which the weights are looked at; the first few are left out"""
MODELS = {"EBM": "EBM, no mask", "EBM-causal": "EBM, causal mask", "ARM": "ARM"}


@dataclass(frozen=True)
class Weights:
    """One model on one law."""

    model: str
    law: str
    vocab_size: int
    max_length: int
    steps: int
    seed: int


class CausalReward(TransformerReward):
    """The EBM whose positions see earlier ones only; its mean is still over all of them."""

    def forward(self, tokens: Tensor, lengths: Tensor, prompt_ids: Tensor) -> Tensor:
        ids = torch.cat([self.context_ids[prompt_ids], tokens], dim=1)
        features = self.backbone(ids, torch.arange(ids.shape[1]).expand_as(ids), causal)
        out: Tensor = self.head(features.mean(1))[:, 0]
        return out


def law(name: str, space: TokenSpace, seed: int) -> Tensor:
    """log rho of a name of :data:`LAWS`."""
    if name == "zipf":
        return laws.zipf(space)
    return laws.normal(space, 0.3, seed) if name == "normal" else laws.pairwise(space, seed)


@torch.no_grad()
def features(model: nn.Module, space: TokenSpace) -> list[Float64[Tensor, "N L D"]]:
    """After the embedding and after each block, at BOS and the tokens of every sequence."""
    tokens, _ = space.sequences()
    bos = torch.full((len(tokens), 1), space.vocab_size)
    ids = torch.cat([bos, tokens], 1)
    if not isinstance(model, TransformerReward):
        ids = ids[:, :-1]  # the ARM never reads the last token
    bidirectional = isinstance(model, TransformerReward) and not isinstance(model, CausalReward)
    attend = everything if bidirectional else causal
    backbone = model.backbone
    x = backbone.token(ids) + backbone.position(torch.arange(ids.shape[1]))
    found = [x.double()]
    for layer, block in enumerate(backbone.blocks):
        x = block(x, layer, attend)
        found.append(x.double())
    return found


def effective_rank(x: Float64[Tensor, "N D"]) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(x - x.mean(0))
    p = values / values.sum()
    return float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum()))


def cka(x: Float64[Tensor, "N D"], y: Float64[Tensor, "N E"]) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414)."""
    x, y = x - x.mean(0), y - y.mean(0)
    cross = torch.linalg.matrix_norm(x.mT @ y) ** 2
    own = torch.linalg.matrix_norm(x.mT @ x) * torch.linalg.matrix_norm(y.mT @ y)
    return float(cross / own)


def probe(x: Float64[Tensor, "N D"], y: Float64[Tensor, "N"], folds: int = 5) -> float:
    """Share of the variance of y that ridge regression on x leaves unexplained, held out.

    Cross-validated over random folds; 1 is what the mean alone leaves, above 1 is worse. The
    ridge is far below the variance of any direction that a float32 network can use.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    lost = torch.zeros((), dtype=torch.float64)
    for k in range(folds):
        held = torch.arange(len(y)) % folds == k
        a, b = x[~held], y[~held]
        mean, scale = a.mean(0), a.std(0).clamp(min=1e-9)
        a = (a - mean) / scale
        gram = a.mT @ a + 1e-6 * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        w = torch.linalg.solve(gram, a.mT @ (b - b.mean()))
        lost += (y[held] - b.mean() - (x[held] - mean) / scale @ w).square().sum()
    return float(lost / (y - y.mean()).square().sum())


@torch.no_grad()
def looks(model: nn.Module, space: TokenSpace, log_rho: Tensor, v_star: list[Tensor]) -> Rows:
    """Rows of ranks and, for the ARM, of probes: one for each layer."""
    tokens, _ = space.sequences()
    index = space.prefix_indices(tokens)
    log_p = log_law(model)
    rows: Rows = []
    for layer, x in enumerate(features(model, space)):
        row = {
            "layer": layer,
            "gap": gap(log_rho, log_p),
            "rank": effective_rank(x[:, : space.max_length].flatten(0, 1)),
        }
        if isinstance(model, Transformer):
            for t in range(2, space.max_length):
                # Position t has read t tokens; one sequence for each prefix of that depth.
                first = torch.arange(space.num_prefixes(t)) * space.vocab_size ** (
                    space.max_length - t
                )
                assert torch.equal(index[first, t], torch.arange(space.num_prefixes(t)))
                row[f"probe_{t}"] = probe(x[first, t], v_star[t])
                one_hot = nn.functional.one_hot(tokens[first, :t], space.vocab_size)
                row[f"tokens_{t}"] = probe(one_hot.flatten(1).double(), v_star[t])
        rows.append(row)
    return rows


def make(job: Weights, space: TokenSpace) -> nn.Module:
    """A model with Flax's initial weights."""
    if job.model in MAKE:
        return MAKE[job.model](space, SMALL, job.seed)
    torch.manual_seed(job.seed)
    model = CausalReward(space, SMALL)
    flax_init(model)
    return model


def measure(job: Weights) -> Rows:
    space = TokenSpace(job.vocab_size, job.max_length)
    log_rho = law(job.law, space, job.seed)
    q_star = tree_q_values(solve(EBM(space, log_rho)), space)[0]
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    v_star = list(torch.logsumexp(q_star, 1).split(sizes))
    model = make(job, space)
    risk = (descend_arm if job.model == "ARM" else descend_ebm)(model, log_rho)
    rows: Rows = []
    at = {0, *(round(job.steps ** (k / CHECKPOINTS)) for k in range(3, CHECKPOINTS + 1))}
    for step in fit(model, risk, Schedule(job.steps)):
        if step in at:
            rows += [{"step": step, **row} for row in looks(model, space, log_rho, v_star)]
    if job.model == "EBM":
        rows += alike(job, model, log_rho)
    return rows


def alike(job: Weights, ebm: nn.Module, log_rho: Tensor) -> Rows:
    """CKA of all pairs of layers: an ARM with the EBM, with another ARM, with an untrained EBM."""
    space, arms = ebm.space, []
    for seed in (job.seed, job.seed + 100):
        arms.append(make_arm(space, SMALL, seed))
        for _ in fit(arms[-1], descend_arm(arms[-1], log_rho), Schedule(job.steps)):
            pass
    others = {"cka": ebm, "cka_arm": arms[1], "cka_untrained": make(job, space)}
    mine = [at_positions(x, space) for x in features(arms[0], space)]
    rows = [
        {"step": job.steps, "layer": i, "other": j}
        for i in range(len(mine))
        for j in range(len(mine))
    ]
    for name, other in others.items():
        theirs = [at_positions(x, space) for x in features(other, space)]
        for row in rows:
            row[name] = cka(mine[row["layer"]], theirs[row["other"]])
    return rows


def at_positions(x: Float64[Tensor, "N L D"], space: TokenSpace) -> Float64[Tensor, "M D"]:
    """Features at BOS and all tokens but the last, less their mean at each position.

    Without this the position alone would make any two models look alike.
    """
    x = x[:, : space.max_length]
    return (x - x.mean(0)).flatten(0, 1)


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation."""
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def at_end(rows: Rows, key: str, **fields: object) -> list[float]:
    """A column at the last step, where it was measured."""
    found = select(rows, **fields)
    return [float(r[key]) for r in found if r["step"] == r["steps"] and r.get(key, "") != ""]


def by_layer(rows: Rows, key: str, layers: int, **fields: object) -> list[list[float]]:
    """A column at the last step, for each layer."""
    return [at_end(rows, key, layer=k, **fields) for k in range(layers)]


def picture(rows: Rows, names: list[str], layers: int, depth: int) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for colour, name in enumerate(names):
        probes = by_layer(rows, f"probe_{depth}", layers, law=name, model="ARM")
        left.plot(
            range(layers),
            [statistics.median(p) for p in probes],
            marker="o",
            color=f"C{colour}",
            label=LAWS[name],
        )
        tokens = statistics.median(at_end(rows, f"tokens_{depth}", law=name, model="ARM", layer=0))
        left.axhline(tokens, color=f"C{colour}", linestyle=":", linewidth=1)
        arm = [r for r in select(rows, law=name, model="ARM", layer=layers - 1) if r["step"] > 0]
        middle.scatter(
            [float(r["gap"]) for r in arm],
            [float(r[f"probe_{depth}"]) for r in arm],
            s=12,
            color=f"C{colour}",
            label=LAWS[name],
        )
    left.set(
        xlabel="layer (0: embedding)",
        ylabel=f"variance of V(s) unexplained, depth {depth}",
        title="Probe for V(s); dotted: from the tokens",
    )
    left.set_xticks(range(layers))
    legend_below(left, 3)
    middle.set(
        xscale="log",
        xlabel="KL(law, ARM) (nats), every checkpoint",
        ylabel="variance of V(s) unexplained, last layer",
        title="Does the probe's error go with the KL?",
        yscale="log",
    )
    middle.yaxis.set_major_locator(FixedLocator(PARTS))
    middle.yaxis.set_major_formatter("{x:g}")
    middle.yaxis.set_minor_locator(NullLocator())
    grid = torch.tensor(
        [
            [
                statistics.fmean(at_end(rows, "cka", law=names[0], layer=i, other=j))
                for j in range(layers)
            ]
            for i in range(layers)
        ]
    )
    image = right.imshow(grid, vmin=0, vmax=1, origin="lower")
    right.set(xlabel="layer of the EBM", ylabel="layer of the ARM", title=f"CKA, {LAWS[names[0]]}")
    right.set_xticks(range(layers))
    right.set_yticks(range(layers))
    figure.colorbar(image, ax=right)
    return figure


def mask_costs(rows: Rows, names: list[str]) -> list[tuple[str, ...]]:
    """Lines of a table: KL of each model, and that of the causal EBM over that of the EBM."""
    lines = []
    for name in names:
        found = [at_end(rows, "gap", law=name, model=m, layer=0) for m in MODELS]
        cost = [c / e for c, e in zip(found[1], found[0], strict=True)]
        lines.append((LAWS[name], *map(geometric_interval, [*found, cost])))
    return lines


def probed(rows: Rows, names: list[str], layers: int, t: int) -> list[tuple[str, ...]]:
    """Lines of a table: what V of depth t has unexplained, by tokens, layers, and untrained."""
    key, lines = f"probe_{t}", []
    for name in names:
        arm = select(rows, law=name, model="ARM")
        trained = by_layer(arm, key, layers)
        untrained = [float(r[key]) for r in select(arm, layer=layers - 1, step=0)]
        tokens = at_end(arm, f"tokens_{t}", layer=0)
        lines.append((LAWS[name], *map(geometric_interval, [tokens, *trained, untrained])))
    return lines


def similarities(rows: Rows, names: list[str], layers: int) -> list[tuple[str, ...]]:
    """Lines of a table: CKA of each layer of the ARM with that of others."""
    keys = ("cka", "cka_arm", "cka_untrained")
    return [
        (
            LAWS[name],
            str(k),
            *(interval(at_end(rows, key, law=name, layer=k, other=k)) for key in keys),
        )
        for name in names
        for k in range(layers)
    ]


def correlation(rows: Rows, key: str) -> list[float]:
    """Rank correlation of a column with the KL along each run."""
    found = []
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [r for r in select(rows, run=run) if r["step"] > 0]
        found.append(spearman(*([float(r[name]) for r in mine] for name in ("gap", key))))
    return found


def main(options: Options) -> None:
    space, steps, names = TokenSpace(8, 4), 1000, list(LAWS)
    if options.quick:
        space, steps, names = TokenSpace(4, 3), 60, ["normal", "pairwise"]
    jobs = [
        Weights(model, name, space.vocab_size, space.max_length, steps, seed)
        for name in names
        for model in MODELS
        for seed in range(options.seeds)
    ]
    rows = collect("weights", jobs, measure, options)
    layers, depth = SMALL.layers + 1, space.max_length - 1
    ranks = [
        (LAWS[x], MODELS[m], *map(interval, by_layer(rows, "rank", layers, law=x, model=m)))
        for x in names
        for m in MODELS
    ]
    last = {x: select(rows, law=x, model="ARM", layer=layers - 1) for x in names}
    correlations = [
        (LAWS[x], interval(correlation(found, f"probe_{depth}"))) for x, found in last.items()
    ]
    names_of_layers = ["embedding", *(f"block {k}" for k in range(1, layers))]
    probe_head = ["law", "tokens", *names_of_layers, f"{names_of_layers[-1]}, untrained"]
    probe_tables = "\n\n".join(
        f"Depth {t} ({space.vocab_size**t} prefixes):\n\n"
        + table(probe_head, probed(rows, names, layers, t))
        for t in range(2, depth + 1)
    )
    text = f"""
V={space.vocab_size}, T={space.max_length}, N=2 (3,600 to 3,800 parameters at V=8), exact risk, {steps:,} steps at rate {Schedule.lr:g}. **What the mask costs**: KL(law,
model) in nats with the same Transformer, geometric mean over seeds (95% interval); the causal EBM scores whole sequences too, but no position sees later ones:

{table(["law", *MODELS.values(), "causal EBM over EBM"], mask_costs(rows, names))}

**Effective rank** (exp of the entropy of the singular values; at most {SMALL.dim}) of the features at BOS and all tokens but the last:

{table(["law", "model", *names_of_layers], ranks)}

**Is the value of the future in there?** V(s) = log of the sum of exp R over all completions of s; with R = log of the law this is the log-probability
of the prefix s. Ridge regression of V(s) on the ARM's hidden state at s, five-fold cross-validation, every prefix weighing the same: share of the
variance left unexplained (0: it is there linearly; 1: no better than its mean), against the same regression on the prefix's tokens, one-hot,
and on the last layer before training:

{probe_tables}

The exact risk fixes an ARM's logits only up to a constant at each state, and V(s) is that constant: nothing in the loss asks for it at s itself, though the
logits before s hold the differences between V of the children. Does the probe's error go with the KL? Rank correlation between the two
along training ({CHECKPOINTS - 2} checkpoints of a run, last layer, depth {depth}; both have a trend in time), mean over seeds:

{table(["law", "rank correlation"], correlations)}

**CKA** (linear; features less their mean at each position) of a layer of the ARM with the same layer of the EBM, of an ARM from other initial weights,
and of an EBM before training, the level to compare with:

{table(["law", "layer", "EBM", "another ARM", "untrained EBM"], similarities(rows, names, layers))}
"""
    figure = picture(rows, names, layers, depth)
    publish("weights", "Weights, not functions", text, figure, rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
