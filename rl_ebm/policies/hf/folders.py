"""Folders of models that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

EXTRAS = "rl_ebm.json"
ADAPTER = "adapter_config.json"


def write_model(model: Any, folder: Path, extras: dict[str, Any]) -> None:
    """Write a model and what the policy knows besides it, beside ``folder``, and move it there.

    A folder of ours is replaced. A process that is killed between the two moves leaves the old
    model whole in ``<folder>.old``.

    Raises:
        ValueError: ``folder`` holds something else.
        OSError: of the file system; what was in ``folder`` is then as it was.
    """
    part, old = (folder.with_name(folder.name + end) for end in (".part", ".old"))
    theirs = folder.exists() and not (folder / EXTRAS).exists()
    if theirs and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} holds no policy of ours, and would be lost: choose another")
    shutil.rmtree(part, ignore_errors=True)  # of a write that was cut short
    try:
        model.save_pretrained(part)
        (part / EXTRAS).write_text(json.dumps(extras, indent=1) + "\n")
        for path in part.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        try:
            os.replace(part, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_model(folder: Path, base: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """The model in a folder, in the precision it was saved in, and what the policy knew besides.

    Args:
        folder: of :func:`write_model`, or of transformers or peft.
        base: the model of an adapter; None for the one that the adapter names.

    Raises:
        ValueError: no model there, one whose code came with it and would have to be run, or an
            adapter whose model has to be given.
    """
    adapted = (folder / ADAPTER).exists()
    if not adapted and not (folder / "config.json").exists():
        old = folder.with_name(folder.name + ".old")
        kept = f"; a write was cut short, and the model before it is in {old}"
        raise ValueError(f"{folder} holds no model{kept if old.exists() else ''}")
    extras = folder / EXTRAS
    known: dict[str, Any] = json.loads(extras.read_text()) if extras.exists() else {}
    if not adapted:
        if base is not None:
            raise ValueError(f"{folder} holds a whole model, no adapter: leave base out")
        from transformers import AutoModelForCausalLM

        with _no_code_of(folder):
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=False
            ), known
    from peft import AutoPeftModelForCausalLM, PeftModel

    if base is not None:
        return PeftModel.from_pretrained(base, folder, is_trainable=True), known
    if not json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path"):
        raise ValueError(
            f"{folder} holds an adapter, and not the name of its model: pass the model, base=..."
        )
    with _no_code_of(folder):
        return AutoPeftModelForCausalLM.from_pretrained(
            folder, is_trainable=True, dtype="auto", trust_remote_code=False
        ), known


@contextmanager
def _no_code_of(folder: Path) -> Iterator[None]:
    """Let a model whose code would have to be run be one sentence; by default one is asked."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{folder} needs code that came with the model, and none of that is run: load the "
            "model yourself, and pass it to HuggingFace(model, space)"
        ) from None
