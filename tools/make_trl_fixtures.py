"""What trl makes of given log probabilities: losses and gradients of DPO and its relatives, ORPO, KTO and GRPO.

    pip install trl && python tools/make_trl_fixtures.py

Writes tests/fixtures/alignment/trl.json: for each case the inputs, the loss and the gradient of the loss by the
policy's log probabilities. The trainers' own loss functions are called, each with a stand-in for a trainer that holds
the settings and a stand-in for a model that gives the log probabilities drawn here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

TARGET = Path(__file__).parents[1] / "tests" / "fixtures" / "alignment" / "trl.json"
ROWS, LENGTH, PROMPT = 6, 7, 2
Case = dict[str, Any]


def drawn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Log probabilities below 0."""
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(shape, generator=generator) - 0.01


def stand_in(**settings: Any) -> MagicMock:
    """A trainer that has these settings, takes any metric and gathers what it is given."""
    trainer = MagicMock(**settings)
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather_for_metrics = lambda value: value
    trainer.accelerator.gather = lambda value: value
    trainer.accelerator.reduce = lambda value, *_, **__: value
    trainer.accelerator.num_processes = 1
    trainer.model.training = True
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    return trainer


def outputs_of(leaf: torch.Tensor) -> MagicMock:
    """What the stand-in for a model gives: log probabilities, and for the trainer's metrics zeros."""
    none = torch.zeros_like(leaf)
    return MagicMock(log_probs=leaf, entropy=none, mean_logits=none, is_top1=none.bool())


def answers(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask (ROWS, LENGTH) of answers of different lengths after prompts, and log probabilities (ROWS, LENGTH - 1)."""
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    for row in range(ROWS):
        mask[row, PROMPT : LENGTH - row % 4] = 1
    return mask, drawn(ROWS, LENGTH - 1, seed=seed, scale=2.0) * mask[:, 1:]


def made(name: str, loss: torch.Tensor, leaf: torch.Tensor, inputs: Case) -> Case:
    """A case as it is kept."""
    loss.backward()
    plain = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    return {"name": name, "inputs": plain, "loss": loss.item(), "gradient": leaf.grad.tolist()}


def dpo(name: str, loss_type: str, beta: float, label_smoothing: float = 0.0) -> Case:
    """A loss of DPOTrainer; the leaf is (ROWS, LENGTH - 1), chosen answers first."""
    mask, leaf = answers(1)
    leaf = leaf.clone().requires_grad_()
    reference = (drawn(ROWS, LENGTH - 1, seed=2, scale=2.0) * mask[:, 1:]).sum(1)
    trainer = stand_in(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, use_weighting=False,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": reference[: ROWS // 2], "ref_rejected_logps": reference[ROWS // 2 :],
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, MagicMock(return_value=outputs_of(leaf)), inputs, False)
    return made(name, loss, leaf, {"leaf": leaf.detach(), "mask": mask[:, 1:], "reference": reference, "beta": beta,
                                   "label_smoothing": label_smoothing})  # fmt: skip


def of_means(name: str, function: Callable[..., torch.Tensor], **settings: Any) -> Case:
    """A loss of mean log probabilities (2, P), chosen ones first."""
    leaf = drawn(2, 5, seed=3, scale=2.0).requires_grad_()
    return made(name, function(leaf).mean(), leaf, {"leaf": leaf.detach(), **settings})


def orpo(beta: float) -> Case:
    """The odds-ratio loss of ORPOTrainer, which has the sign of a gain."""
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    return of_means("orpo", lambda leaf: -ORPOTrainer.odds_ratio_loss(trainer, *leaf)[0], beta=beta)


def simpo(beta: float, gamma: float) -> Case:
    """The loss of CPOTrainer with loss_type "simpo", without its term of imitation."""
    trainer = SimpleNamespace(
        beta=beta, simpo_gamma=gamma, alpha=0.0, loss_type="simpo", label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    return of_means("simpo", lambda leaf: CPOTrainer.cpo_loss(trainer, *leaf)[0], beta=beta, gamma=gamma)


def kto(beta: float, good: float, bad: float) -> Case:
    """The loss of KTOTrainer, with a divergence above 0."""
    mask, leaf = answers(4)
    leaf = leaf.clone().requires_grad_()
    reference = (drawn(ROWS, LENGTH - 1, seed=5, scale=2.0) * mask[:, 1:]).sum(1)
    other, other_reference = drawn(ROWS, seed=6), drawn(ROWS, seed=7, scale=3.0)
    desirable = torch.tensor([True, False, True, True, False, False])
    trainer = stand_in(
        aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=beta,
        desirable_weight=good, undesirable_weight=bad,
    )  # fmt: skip
    trainer._compute_kl_logps = lambda *_: other
    inputs = {
        "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "label": desirable, "ref_logps": reference, "ref_KL_logps": other_reference,
    }  # fmt: skip
    loss = KTOTrainer._compute_loss(trainer, MagicMock(return_value=outputs_of(leaf)), inputs, False)
    return made("kto", loss, leaf, {
        "leaf": leaf.detach(), "mask": mask[:, 1:], "reference": reference, "other": other,
        "other_reference": other_reference, "desirable": desirable, "beta": beta, "good": good, "bad": bad,
    })  # fmt: skip


def grpo(loss_type: str, beta: float, low: float, high: float) -> Case:
    """A loss of GRPOTrainer."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    for row in range(ROWS):
        mask[row, LENGTH - row % 4 :] = 0
    leaf = drawn(ROWS, LENGTH, seed=8).requires_grad_()
    old, reference = drawn(ROWS, LENGTH, seed=9), drawn(ROWS, LENGTH, seed=10)
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.5, 0.75, 2.0])
    trainer = stand_in(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta,
        importance_sampling_level="token", loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False,
        max_completion_length=LENGTH, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
    )  # fmt: skip
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    prompt = torch.ones(ROWS, PROMPT, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return made(loss_type, loss, leaf, {
        "leaf": leaf.detach(), "mask": mask, "old": old, "reference": reference, "advantages": advantages,
        "beta": beta, "low": low, "high": high,
    })  # fmt: skip


def main() -> None:
    """Write the file."""
    cases = [
        dpo("dpo", "sigmoid", 0.3), dpo("ipo", "ipo", 0.3), simpo(2.0, 1.0), orpo(0.1), kto(0.2, 1.0, 1.5),
        grpo("grpo", 0.05, 0.2, 0.2), grpo("dr_grpo", 0.0, 0.2, 0.2), grpo("dapo", 0.0, 0.2, 0.28),
    ]  # fmt: skip
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(cases, indent=1) + "\n")
    print(f"{len(cases)} cases in {TARGET}")


if __name__ == "__main__":
    main()
