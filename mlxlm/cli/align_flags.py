"""The flags of `mlxlm align`: those of `mlxlm finetune` that have a meaning here, and those of the methods.

They are the names of `AlignSettings`, which needs imports that help must not wait for; a test compares the two.
"""

from __future__ import annotations

from mlxlm.cli.finetune_flags import FLAGS, METHOD
from mlxlm.cli.flags import Flag

ALIGNMENT, ROLLOUTS, VALUES = "Alignment", "Rollouts: ppo, grpo, dr-grpo, dapo", "Values and texts: ppo"
# Flags of fine-tuning that have no meaning here, or another one.
_NOT_HERE = ("method", "label_smoothing", "loss_on", "mask_prompt", "packing", "exact_match", "sample_tokens", "test",
             "loss_chunk", "chat_template_config", "best_by")  # fmt: skip

_OWN = (
    Flag(
        ("--method",), str, ALIGNMENT,
        "reward (a reward model), dpo, ipo, simpo, orpo (from pairs), kto (from answers that are good or bad), ppo, "
        "grpo, dr-grpo or dapo (from rewards of the model's own answers).",
    ),
    Flag(
        ("--reward",), str, ALIGNMENT,
        "arithmetic, regex:PATTERN, json-schema:FILE, model:FOLDER (or model:ADAPTER@MODEL) or MODULE:FUNCTION; with "
        "pairs it is measured only.", "REWARD",
    ),
    Flag(("--beta",), float, ALIGNMENT, "How strongly the model is held to the reference; of orpo lambda."),
    Flag(("--label-smoothing",), float, ALIGNMENT, "dpo, simpo: share of pairs taken to be wrong, default 0."),
    Flag(("--reference-free/--with-reference",), bool, ALIGNMENT, "dpo: without the reference."),
    Flag(("--gamma",), float, ALIGNMENT, "simpo: margin of the rewards, default 1."),
    Flag(("--means/--sums",), bool, ALIGNMENT, "ipo: log probabilities a token (default) or of whole answers."),
    Flag(("--desirable-weight",), float, ALIGNMENT, "kto: of good answers, default 1."),
    Flag(("--undesirable-weight",), float, ALIGNMENT, "kto: of bad answers, default 1."),
    Flag(("--centering",), float, ALIGNMENT, "reward: keep rewards around 0, default 0."),
    Flag(("--reference-cache",), str, ALIGNMENT, "Folder of the reference's log probabilities; default the run's."),
    Flag(("--answers",), int, ALIGNMENT, "Held-out prompts answered at each evaluation, default 16."),
    Flag(("--prompts-per-iteration",), int, ROLLOUTS, "Prompts answered before each round of learning."),
    Flag(("--answers-per-prompt",), int, ROLLOUTS, "Answers to each, default 8; with ppo 1."),
    Flag(("--max-tokens",), int, ROLLOUTS, "Most tokens of an answer, default 64."),
    Flag(("--temperature", "--temp"), float, ROLLOUTS, "Sampling temperature, default 1."),
    Flag(("--passes",), int, ROLLOUTS, "Over the answers of an iteration, default 1; with ppo 4."),
    Flag(("--clip-low",), float, ROLLOUTS, "How far a token may become less likely, default 0.2."),
    Flag(("--clip-high",), float, ROLLOUTS, "How far more likely, default 0.2; with dapo 0.28."),
    Flag(("--kl-target",), float, ROLLOUTS, "Nats an answer to which beta is steered; default 0, beta is constant."),
    Flag(("--normalisation",), str, ROLLOUTS, "Of the loss: sequence (grpo), token (ppo, dapo) or constant (dr-grpo)."),
    Flag(
        ("--scale-advantages/--no-scale-advantages",), bool, ROLLOUTS,
        "Divide by a group's deviation; default but with dr-grpo.",
    ),
    Flag(("--overlong",), str, ROLLOUTS, "Answers without an end: keep (default), filter (dapo) or penalise."),
    Flag(("--overlong-buffer",), int, ROLLOUTS, "Tokens before the most from which on length costs, default 16."),
    Flag(("--dynamic-sampling",), int, ROLLOUTS, "Rounds to replace prompts whose answers are worth the same."),
    Flag(("--discount",), float, VALUES, "Of later rewards, default 1."),
    Flag(("--lam",), float, VALUES, "Of generalised advantages, default 0.95."),
    Flag(("--value-weight",), float, VALUES, "Of the value's loss, default 0.1."),
    Flag(("--value-clip",), float, VALUES, "How far values may move at once, default 0.2."),
    Flag(("--whiten-rewards/--plain-rewards",), bool, VALUES, "Divide rewards by their deviation."),
    Flag(("--ptx-data",), str, VALUES, "Rows that are learned beside (PPO-ptx).", "PATH"),
    Flag(("--ptx-weight",), float, VALUES, "Of their mean loss, default 27.8."),
)  # fmt: skip
FINE_TUNE_TYPE = Flag(
    ("--fine-tune-type",), str, METHOD,
    "How weights are trained: lora (default), full, or any method of mlxlm finetune.",
)  # fmt: skip
ALIGN_FLAGS = (*_OWN, FINE_TUNE_TYPE, *(flag for flag in FLAGS if flag.setting not in _NOT_HERE))
