"""RLOO and GRPO of TRL, on a small language model whose vocabulary is the tokens of the task."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.peers.contender import TARGET, Contender
from benchmarks.peers.policies import count
from benchmarks.peers.watch import Watch
from rl_ebm import EBM
from rl_ebm.networks.backbone import TransformerConfig

Method = Literal["RLOO", "GRPO"]
PAD, START, END = "<pad>", "<s>", "</s>"
NEVER = -1e9
"""logit of the three ids that are no tokens of the task: their probability is exactly 0"""
LR, BATCH, GROUP = 1e-3, 512, 8
GRPO_FIXED_POINT = (
    "its KL stands in the loss, token by token: with the bias correction that is its default, the "
    "gradient has each state's own divergence and none of those that follow; and the rewards of a "
    "group are divided by their standard deviation, which changes their size against beta"
)


class LanguageModel:
    """A Hugging Face model as a policy: the start token, then the response."""

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self.model, self.vocab_size = model, vocab_size

    @torch.no_grad()
    def logits(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
        training = self.model.training
        self.model.eval()
        start = torch.full_like(tokens[:, :1], self.vocab_size + 1)
        ids = torch.cat([start, tokens[:, :-1]], dim=1)
        rows = self.model(input_ids=ids, use_cache=False).logits[..., : self.vocab_size]
        self.model.train(training)
        return rows


def make_tokenizer(vocab_size: int) -> Any:
    """Words "0" to "A - 1", and ids A, A + 1, A + 2 for pad, start and end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [*map(str, range(vocab_size)), PAD, START, END]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        padding_side="left",
    )


def make_model(ebm: EBM) -> Any:
    """A Phi of our Transformer's size that starts uniform: TRL's reference is where it starts.

    Phi's output layer has a bias, and the bias alone takes the ids that are no tokens out of
    sampling and of scoring alike.
    """
    from transformers import PhiConfig, PhiForCausalLM

    a, size = ebm.space.vocab_size, TransformerConfig()
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=a + 3,
            hidden_size=size.dim,
            intermediate_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=ebm.space.max_length + 1,
            tie_word_embeddings=False,
            pad_token_id=a,
            bos_token_id=a + 1,
            eos_token_id=a + 2,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[a:] = NEVER
    return model


def options(ebm: EBM, seed: int, folder: str, own: bool) -> dict[str, Any]:
    """Of its config: on the CPU, for ever, nothing written; our learning rate and batch or its."""
    ours = {
        "learning_rate": LR,
        "per_device_train_batch_size": BATCH,
        "num_generations": GROUP,
    }
    return {
        "output_dir": folder,
        "beta": ebm.beta,
        "max_completion_length": ebm.space.max_length,
        "max_steps": 10**7,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "pad_to_multiple_of": None,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **(ours if own else {}),
    }


def trainer(method: Method, own: bool) -> Callable[[EBM, int, Watch], None]:
    """What trains a model by TRL's own loop, looked at between two of its steps.

    Args:
        own: whether with our learning rate and batch; else with TRL's defaults.
    """

    def train(ebm: EBM, seed: int, watch: Watch) -> None:
        import trl
        from datasets import Dataset
        from transformers import PhiForCausalLM, TrainerCallback
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        torch.manual_seed(seed)
        reward_calls = 0

        def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            nonlocal reward_calls
            tokens = torch.tensor(completion_ids)
            reward_calls += len(tokens)
            lengths = torch.full((len(tokens),), ebm.space.max_length)
            return ebm.reward(tokens, lengths, torch.zeros_like(lengths)).tolist()

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                watch(LanguageModel(model, ebm.space.vocab_size), state.global_step, reward_calls)

        config = {"RLOO": trl.RLOOConfig, "GRPO": trl.GRPOConfig}[method]
        kind = {"RLOO": trl.RLOOTrainer, "GRPO": trl.GRPOTrainer}[method]
        with tempfile.TemporaryDirectory() as folder:
            # TRL loads the reference from where the model is from.
            make_model(ebm).save_pretrained(folder)
            model = PhiForCausalLM.from_pretrained(folder)
            loop = kind(
                model=model,
                reward_funcs=reward,
                args=config(**options(ebm, seed, folder, own)),
                train_dataset=Dataset.from_dict({"prompt": [START] * 4096}),
                processing_class=make_tokenizer(ebm.space.vocab_size),
                callbacks=[Look()],
            )
            watch.start(count(model))
            loop.train()

    return train


def contender(method: Method, own: bool) -> Contender:
    fixed = "float32, no gradient checkpointing, beta that of the task"
    batch = f"{BATCH} responses a step in groups of {GROUP}, AdamW {LR:g}, constant"
    defaults = "8 responses a step in groups of " + ("2" if method == "RLOO" else "8")
    return Contender(
        name=f"TRL {method}" + ("" if own else ", defaults"),
        package="trl",
        module="trl",
        extra="peers-trl",
        network="Transformer (Phi)",
        settings=f"`{method}Trainer`, a Phi of 2 layers, width 64, 4 heads, MLP 256, that starts "
        f"uniform, as its reference; {fixed}; "
        + (batch if own else f"{defaults}, AdamW 1e-6, as its defaults are"),
        source=f"the defaults of `{method}Config`"
        + ("; batch and learning rate by us: its own are for large pretrained models" * own),
        fixed_point=TARGET if method == "RLOO" else GRPO_FIXED_POINT,
        train=trainer(method, own),
        one_length=True,
        uniform=True,
    )


CONTENDERS = tuple(contender(method, own) for method in ("RLOO", "GRPO") for own in (True, False))
