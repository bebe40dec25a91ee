r"""The responses that were seen, as a prefix tree with exact sums of their weights.

Every reward that was paid is a fact. Below each prefix s the tree keeps

    W(s) = sum of exp(r_t + r_{t+1} + ...) over the seen responses below s,
    U(s) = what the policy gives to the responses below s that nobody saw,

both backed up exactly from children to parents,

    W(s) = sum_a exp(r(s, a)) W(s+a),    U(s) = sum_a pi(a|s) U(s+a),

with W = 0 and U = 1 for a child that nobody saw, and W = 1 and U = 0 for the end of a response.
W never fades: it is of rewards alone. U is of the policy as it was at the last visit. Where all
below s was seen U(s) is 0, and log W(s) is the soft value V*(s) itself.

Nodes are rows of columns, parents before their children, the roots of the prompts first. A child
is found by the key of its edge, parent * A + token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.agents.shared.key_table import KeyTable
from rl_ebm.automata.logspace import segment_logsumexp
from rl_ebm.tokens import Batch

NOBODY = -1
"""no node, and no key"""
KEPT = 0.75
"""share of the room that is used after :meth:`SeenTree.forget`"""
_COLUMNS = ("r", "pi", "log_w", "u", "reward")


class Backup(NamedTuple):
    """What the tree has below the states of responses.

    Attributes:
        log_w: r(s, a) + log W(s+a), nats; -inf where nothing was seen.
        u: U(s+a), in [0, 1]; 1 where nothing was seen.
        root_log_w: log W of each row's prompt.
        root_u: U of each row's prompt.
    """

    log_w: Float[Tensor, "B T A"]
    u: Float[Tensor, "B T A"]
    root_log_w: Float[Tensor, "B"]
    root_u: Float[Tensor, "B"]


class SeenTree:
    """A prefix tree of the responses to each prompt.

    Args:
        num_prompts: P.
        vocab_size: A.
        room: nodes kept, at most; a batch may go beyond it until the next one.
        device: where the columns live.
    """

    def __init__(
        self, num_prompts: int, vocab_size: int, room: int, device: torch.device | str = "cpu"
    ) -> None:
        self.num_prompts, self.vocab_size, self.room = num_prompts, vocab_size, room
        self.device = torch.device(device)
        self._start(torch.full((num_prompts,), NOBODY, device=self.device))

    def _start(self, keys: Int64[Tensor, "n"]) -> None:
        """Nodes with these keys, the roots' among them, and nothing below them."""
        self.keys = keys
        self.columns = {
            name: torch.zeros(len(keys), dtype=torch.float64, device=self.device)
            for name in _COLUMNS
        }
        self.columns["log_w"].fill_(-torch.inf)
        self.columns["u"].fill_(1.0)
        self.size, self.responses = len(keys), 0
        self.table = KeyTable(self.device, max(1024, len(keys)))
        edges = torch.arange(self.num_prompts, len(keys), device=self.device)
        self.table.add(keys[edges], edges)

    def _append(self, keys: Int64[Tensor, "n"], ends: Bool[Tensor, "n"]) -> Int64[Tensor, "n"]:
        """New nodes; those that are ends of responses are whole."""
        need = self.size + len(keys)
        if need > len(self.keys):
            more = max(need - len(self.keys), len(self.keys), 1024)
            self.keys = torch.cat([self.keys, self.keys.new_full((more,), NOBODY)])
            for name, column in self.columns.items():
                self.columns[name] = torch.cat([column, column.new_zeros(more)])
        ids = torch.arange(self.size, need, device=self.device)
        self.keys[ids] = keys
        self.columns["log_w"][ids] = torch.where(ends, 0.0, -torch.inf).double()
        self.columns["u"][ids] = torch.where(ends, 0.0, 1.0).double()
        self.table.add(keys, ids)
        self.size, self.responses = need, self.responses + int(ends.sum())
        return ids

    # Responses ------------------------------------------------------------------------------------

    def path(self, batch: Batch) -> Int64[Tensor, "B T1"]:
        """The nodes of each response, from its root on; -1 past its end, and where nobody was."""
        nodes = [batch.prompt_ids]
        for t in range(batch.tokens.shape[1]):
            nodes.append(self.table.find(self._edge(nodes[-1], batch, t)))
        return torch.stack(nodes, 1)

    def add(
        self,
        batch: Batch,
        path: Int64[Tensor, "B T1"],
        r: Float[Tensor, "B T"],
        log_pi: Float[Tensor, "B T"],
    ) -> Int64[Tensor, "B T1"]:
        """Keep responses, each once, and carry them up to the roots; their nodes as :meth:`path`.

        Args:
            batch: scored responses.
            path: what :meth:`path` says of them.
            r: immediate log-weights of their tokens, 0 past the end.
            log_pi: log pi(a_t|s_t) of their tokens, 0 past the end.
        """
        nodes = [batch.prompt_ids]
        fresh = torch.zeros_like(batch.lengths, dtype=torch.bool)
        for t in range(batch.tokens.shape[1]):
            key, node = self._edge(nodes[-1], batch, t), path[:, t + 1].clone()
            end, new = batch.lengths == t + 1, (key >= 0) & (node < 0)
            if bool(new.any()):
                keys, rows = key[new].unique(return_inverse=True)
                ends = torch.zeros_like(keys, dtype=torch.bool)
                ends[rows] = end[new]
                node[new] = self._append(keys, ends)[rows]
                fresh |= new & end
            there = node[key >= 0]
            self.columns["r"][there] = r[key >= 0, t].double()
            self.columns["pi"][there] = log_pi[key >= 0, t].double().exp()
            self.columns["reward"][node[end]] = batch.rewards()[end].double()
            nodes.append(node)
        path = torch.stack(nodes, 1)
        ends = path.gather(1, batch.lengths[:, None])[:, 0]
        rows = fresh.nonzero()[:, 0]
        leaves, same = ends[rows].unique(return_inverse=True)
        first = rows.new_full((len(leaves),), len(batch)).scatter_reduce(0, same, rows, "amin")
        self._carry(path[first], r[first].double(), log_pi[first].double())
        return path

    def _carry(
        self, path: Int64[Tensor, "n T1"], r: Float[Tensor, "n T"], log_pi: Float[Tensor, "n T"]
    ) -> None:
        """Let all states above new responses have their weights and their mass."""
        log_w, u = self.columns["log_w"], self.columns["u"]
        below, mass = (x.flip(1).cumsum(1).flip(1) for x in (r, log_pi))
        for t in range(r.shape[1]):
            real = path[:, t + 1] >= 0
            nodes, segment = path[real, t].unique(return_inverse=True)
            more = segment_logsumexp(below[real, t][None], segment, len(nodes))[0]
            log_w[nodes] = torch.logaddexp(log_w[nodes], more)
            gone = torch.zeros_like(more).index_add(0, segment, mass[real, t].exp())
            # What rounding leaves where nothing is left is put right by the next backup.
            u[nodes] = (u[nodes] - gone).clamp(min=0.0)

    def rewards(self, batch: Batch) -> Float[Tensor, "B"]:
        """R of responses that were seen; NaN of others."""
        ends = self.path(batch).gather(1, batch.lengths[:, None])[:, 0]
        return torch.where(ends >= 0, self.columns["reward"][ends.clamp(min=0)], torch.nan)

    def _edge(self, node: Int64[Tensor, "B"], batch: Batch, t: int) -> Int64[Tensor, "B"]:
        """Keys of the edges out of nodes by token t, -1 past the end."""
        key = node * self.vocab_size + batch.tokens[:, t]
        return key.masked_fill((batch.lengths <= t) | (node < 0), NOBODY)

    # Values ---------------------------------------------------------------------------------------

    def backup(self, path: Int64[Tensor, "B T1"], log_pi: Float[Tensor, "B T A"]) -> Backup:
        """Back values up along paths, from their ends to the roots.

        Args:
            path: of :meth:`path`.
            log_pi: log pi(.|s_t) of the policy as it is, without gradient.
        """
        states, pi = path[:, :-1], log_pi.double().exp()
        tokens = torch.arange(self.vocab_size, device=self.device)
        child = torch.full(pi.shape, NOBODY, device=self.device)
        there = states >= 0  # of large vocabularies most were never seen: they are not looked up
        child[there] = self.table.find(states[there][:, None] * self.vocab_size + tokens)
        seen, at = child >= 0, child.clamp(min=0)
        r_of, pi_of, log_w_of, u_of = (self.columns[k] for k in ("r", "pi", "log_w", "u"))
        pi_of[at[seen]] = pi[seen]
        log_w = torch.full_like(pi, -torch.inf)
        u = torch.ones_like(pi)
        for t in reversed(range(states.shape[1])):
            here, below = seen[:, t], at[:, t]
            log_w[:, t] = torch.where(here, r_of[below] + log_w_of[below], -torch.inf)
            u[:, t] = torch.where(here, u_of[below], 1.0)
            # A node without children is an end, whose W is 1, or one that nobody was below yet.
            inner = here.any(1)
            nodes = states[inner, t]
            log_w_of[nodes] = log_w[inner, t].logsumexp(-1)
            u_of[nodes] = (pi[inner, t] * u[inner, t]).sum(-1)
        roots = path[:, 0]
        return Backup(log_w, u, log_w_of[roots], u_of[roots])

    # Memory ---------------------------------------------------------------------------------------

    def forget(self, nodes: int, log_z: Float[Tensor, "P"]) -> None:
        """Make room for so many nodes, where there is none, by what it costs.

        A response that is forgotten is taken for one that weighs what the policy gives it: its
        cost is |p_ref(y|x) exp(R / beta) / Z(x) - pi(y|x)|, as of its last visit.

        Args:
            log_z: what is known of log Z of each prompt.
        """
        if self.size + nodes <= self.room:
            return
        levels = self._levels()
        log_w, log_pi, root = self._of_prefixes(levels)
        parents = self.keys[self.num_prompts : self.size] // self.vocab_size
        leaf = torch.ones(self.size, dtype=torch.bool, device=self.device)
        leaf[parents] = leaf[: self.num_prompts] = False
        leaves = leaf.nonzero()[:, 0]
        cost = ((log_w - log_z[root]).exp() - log_pi.exp()).abs()
        order = leaves[cost[leaves].argsort(descending=True, stable=True)]
        most = max(self.num_prompts, int(KEPT * self.room) - nodes)
        count = len(order)
        while True:
            count = count * 3 // 4
            kept = self._with_parents(order[:count])
            if int(kept.sum()) <= most:
                break
        self._keep(kept, order[:count])

    def _levels(self) -> list[Tensor]:
        """The nodes at each depth below the roots."""
        parents = self.keys[: self.size] // self.vocab_size
        parents[: self.num_prompts] = NOBODY
        on = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        on[: self.num_prompts] = True
        levels: list[Tensor] = []
        while len(level := ((parents >= 0) & on[parents.clamp(min=0)]).nonzero()[:, 0]):
            levels.append(level)
            on.zero_()
            on[level] = True
        return levels

    def _of_prefixes(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the way from the root to each node: sum of r, sum of log pi, and the root."""
        log_w, log_pi = (
            self.columns["r"][: self.size].clone(),
            self.columns["pi"][: self.size].log(),
        )
        root = torch.arange(self.size, device=self.device)
        log_w[: self.num_prompts] = log_pi[: self.num_prompts] = 0.0
        for level in levels:
            above = self.keys[level] // self.vocab_size
            log_w[level] += log_w[above]
            log_pi[level] += log_pi[above]
            root[level] = root[above]
        return log_w, log_pi, root

    def _with_parents(self, nodes: Int64[Tensor, "n"]) -> Bool[Tensor, "size"]:
        kept = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        kept[: self.num_prompts] = True
        while len(nodes):
            kept[nodes] = True
            nodes = self.keys[nodes] // self.vocab_size
            nodes = nodes[~kept[nodes]].unique()
        return kept

    def _keep(self, kept: Bool[Tensor, "size"], leaves: Int64[Tensor, "n"]) -> None:
        """Keep these nodes alone, and back everything up anew."""
        ids = kept.cumsum(0) - 1
        old, columns = self.keys[: self.size], self.columns
        keys = ids[old // self.vocab_size] * self.vocab_size + old % self.vocab_size
        keys[: self.num_prompts] = NOBODY
        self._start(keys[kept])
        for name in ("r", "pi", "reward"):
            self.columns[name] = columns[name][: len(kept)][kept]
        log_w, u = self.columns["log_w"], self.columns["u"]
        log_w[ids[leaves]], u[ids[leaves]] = 0.0, 0.0
        self.responses = len(leaves)
        for level in reversed(self._levels()):
            above = self.keys[level] // self.vocab_size
            parents, segment = above.unique(return_inverse=True)
            below = (self.columns["r"][level] + log_w[level])[None]
            log_w[parents] = segment_logsumexp(below, segment, len(parents))[0]
            gone = self.columns["pi"][level] * (u[level] - 1)
            u[parents] = u[parents].index_add(0, segment, gone).clamp(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        first, end = self.num_prompts, self.size
        columns = {name: column[first:end].clone() for name, column in self.columns.items()}
        roots = {f"root_{name}": self.columns[name][:first].clone() for name in ("log_w", "u")}
        return {"keys": self.keys[first:end].clone()} | columns | roots

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The nodes of :meth:`state_dict`.

        Raises:
            ValueError: columns of several lengths, or keys that are not those of a tree.
        """
        first, keys = self.num_prompts, state["keys"].to(self.device)
        ids = torch.arange(first, first + len(keys), device=self.device)
        parents = keys // self.vocab_size
        whole = all(state[name].shape == keys.shape for name in _COLUMNS)
        if not whole or not bool(((keys >= 0) & (parents < ids)).all()):
            raise ValueError("the tree of seen responses has a node without a parent or a column")
        if len(keys.unique()) != len(keys):
            raise ValueError("the tree of seen responses has a node twice")
        shares = [state[name] for name in ("u", "root_u", "pi")]
        if any(not bool(((x >= 0) & (x <= 1 + 1e-6)).all()) for x in shares) or any(
            bool(state[name].isnan().any()) for name in ("r", "log_w", "root_log_w", "reward")
        ):
            raise ValueError("the tree of seen responses has a NaN, or a share outside [0, 1]")
        self._start(torch.cat([keys.new_full((first,), NOBODY), keys]))
        for name in _COLUMNS:
            self.columns[name][first:] = state[name]
        for name in ("log_w", "u"):
            self.columns[name][:first] = state[f"root_{name}"]
        self.responses = len(keys) - len(parents[parents >= first].unique())
