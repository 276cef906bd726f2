"""The flags of `mlxlm finetune`, as a table: they are the names of `FinetuneSettings`, which needs imports that help
must not wait for; a test compares the two.
"""

from __future__ import annotations

from mlxlm.cli.flags import Flag

DATA, METHOD, LEARNING, MEASURING, MEMORY = "Data", "Method", "Learning", "Measuring and saving", "Memory"

FLAGS = (
    Flag(
        ("--data",),
        str,
        DATA,
        "A folder with train.jsonl (and valid, test), a .jsonl, .txt, .csv or .parquet file, or hub:OWNER/NAME; behind "
        "a colon its splits, as :train[:10%].",
        "PATH",
    ),
    Flag(
        ("--columns",),
        list[str],
        DATA,
        "Rename columns of the data, as completion=response; may be repeated.",
        "NAME=COLUMN",
    ),
    Flag(("--max-seq-length",), int, DATA, "Tokens of an example; default the model's context, at most 2048."),
    Flag(
        ("--truncation",),
        str,
        DATA,
        "Of longer ones: cut-right (default), cut-left, drop or error. It is counted and said.",
    ),
    Flag(
        ("--loss-on",),
        str,
        DATA,
        "assistant (default): completions and all assistant turns; completion: the last turn alone; all.",
    ),
    Flag(("--mask-prompt/--no-mask-prompt",), bool, DATA, "mlx-lm's words for --loss-on completion and --loss-on all."),
    Flag(("--chat-template-config",), str, DATA, "Variables of the chat template.", "JSON"),
    Flag(("--packing/--no-packing",), bool, DATA, "Several examples a row, which don't see each other."),
    Flag(("--valid-fraction",), float, DATA, "Rows held out where there is no validation file, default 0.1."),
    Flag(
        (
            "--method",
            "--fine-tune-type",
        ),
        str,
        METHOD,
        "lora (default), full, dora, qlora, prompt, prefix, p-tuning, p-tuning-v2, houlsby, "
        "pfeiffer, parallel-adapter, ia3, bitfit or last-layers.",
    ),
    Flag(("--rank",), int, METHOD, "Of low-rank methods, default 8."),
    Flag(("--alpha",), float, METHOD, "Low-rank changes count alpha / rank times, default 16."),
    Flag(("--dropout",), float, METHOD, "Of low-rank methods, default 0."),
    Flag(
        ("--targets",), list[str], METHOD, "Layers that are adapted, by name, or all-linear; may be repeated.", "NAME"
    ),
    Flag(("--num-tokens",), int, METHOD, "Virtual tokens of prompt and prefix methods, default 20."),
    Flag(("--num-layers",), int, METHOD, "Only the last n layers; default all."),
    Flag(
        ("--set",),
        list[str],
        METHOD,
        "Any setting of the method, as rank_stabilized=true; may be repeated.",
        "NAME=VALUE",
    ),
    Flag(("--resume-adapter-file",), str, METHOD, "Begin with this adapter (a folder, or its file)."),
    Flag(("--iters",), int, LEARNING, "Updates of the weights."),
    Flag(("--epochs",), int, LEARNING, "Passes over the data, default 3."),
    Flag(("--batch-size",), int, LEARNING, "Rows of one pass, default 8."),
    Flag(("--grad-accumulation-steps",), int, LEARNING, "Passes of one update, default 1."),
    Flag(("--learning-rate",), float, LEARNING, "At the peak; default the method's."),
    Flag(("--schedule",), str, LEARNING, "cosine (default), linear, constant, inverse-sqrt or wsd."),
    Flag(("--warmup-steps",), int, LEARNING, "Updates in which the rate rises; default a twentieth, at most 100."),
    Flag(("--optimizer",), str, LEARNING, "adamw (default), adafactor, lion, muon or sgd."),
    Flag(("--weight-decay",), float, LEARNING, "Of matrices, default 0."),
    Flag(("--clip-norm",), float, LEARNING, "Largest norm of the gradient, default 1."),
    Flag(("--label-smoothing",), float, LEARNING, "Default 0."),
    Flag(("--ema-decay",), float, LEARNING, "Average the weights over time; default off."),
    Flag(("--patience",), int, LEARNING, "Stop after so many evaluations without better weights; default 0, never."),
    Flag(("--seed",), int, LEARNING, "Of order, new weights and dropout, default 0."),
    Flag(("--best-by",), str, MEASURING, "What tells the best weights: loss (default), and of labels accuracy or f1."),
    Flag(("--val-batches",), int, MEASURING, "Batches of an evaluation; default -1, all."),
    Flag(("--steps-per-report",), int, MEASURING, "Updates between reports, default 10."),
    Flag(
        ("--steps-per-eval",), int, MEASURING, "Updates between evaluations; default a tenth of the run, at least 10."
    ),
    Flag(("--save-every",), int, MEASURING, "Updates between checkpoints, besides those of evaluations."),
    Flag(("--test/--no-test",), bool, MEASURING, "Measure on test.jsonl at the end; default if there is one."),
    Flag(("--samples",), int, MEASURING, "Rows answered before, while and after training, default 3."),
    Flag(("--sample-tokens",), int, MEASURING, "Most tokens of such an answer, default 48."),
    Flag(
        ("--exact-match",),
        int,
        MEASURING,
        "Rows answered at the end to count right answers; default 100 where answers are short.",
    ),
    Flag(("--format",), str, MEASURING, "Of the adapter: peft (default where it has a form), mlx, adapters or mlxlm."),
    Flag(("--report-to",), list[str], MEASURING, "tensorboard or wandb; may be repeated.", "NAME"),
    Flag(
        ("--memory",),
        str,
        MEMORY,
        "check: refuse a run that can't fit (default); auto: choose what fits; low: least of all; off.",
    ),
    Flag(
        ("--grad-checkpoint/--no-grad-checkpoint",), bool, MEMORY, "Compute all layers again instead of keeping them."
    ),
    Flag(("--recompute-layers",), int, MEMORY, "The same for so many layers."),
    Flag(("--loss-chunk",), int, MEMORY, "Words of the loss at once."),
    Flag(("--cache-limit",), int, MEMORY, "Bytes of freed buffers to keep."),
    Flag(
        ("--quantized/--dequantized",), bool, MEMORY, "Keep quantized weights as they are; default as the method needs."
    ),
    Flag(("--dtype",), str, MEMORY, "float32, float16 or bfloat16; default the checkpoint's, float32 on the CPU."),
)
