"""The flags of `mlxlm convert`. None stands for "not given": defaults live in the library."""

from __future__ import annotations

from mlxlm.cli.flags import Flag

RESULT, ROUNDING, CALIBRATION, GGUF, CHECKING, UPLOAD = (
    "The result", "Quantizing for MLX", "Calibration", "GGUF", "Checking", "Upload",
)  # fmt: skip

RESULT_FLAGS = (
    Flag(("--to",), str, RESULT, "hf: floats; mlx: quantized; gguf: one file; default as the other options ask for."),
    Flag(("--dtype",), str, RESULT, "Of floats: float32, float16, bfloat16; default as they are."),
    Flag(("--max-shard-size",), float, RESULT, "Of one safetensors file, in GB; default 5."),
)
QUANTIZING_FLAGS = (
    Flag(("--bits",), int, ROUNDING, "2, 3, 4, 5, 6 or 8 bits a weight; default 4."),
    Flag(("--group-size",), int, ROUNDING, "Weights that share a scale."),
    Flag(("--mode",), str, ROUNDING, "affine, mxfp4, mxfp8 or nvfp4."),
    Flag(("--layer",), list[str], ROUNDING, "As '*.down_proj=6', '*.up_proj=4:32' or '...=none'.", "PATTERN=BITS"),
    Flag(("--recipe",), str, ROUNDING, "JSON with default, layers, embeddings, head.", "FILE"),
    Flag(("--keep",), bool, ROUNDING, "Keep a quantized source's weights as they are."),
    Flag(("--embeddings/--no-embeddings",), bool, ROUNDING, "Quantize the table of tokens; default yes."),
    Flag(("--head/--no-head",), bool, ROUNDING, "Quantize the head; default yes."),
    Flag(
        ("--target-bits",), float, ROUNDING,
        "Bits where they matter: a recipe by sensitivity, of this mean over all weights.",
    ),
    Flag(("--method",), str, ROUNDING, "round (default), gptq, awq or awq+gptq."),
)  # fmt: skip
CALIBRATION_FLAGS = (
    Flag(
        ("--text",), str, CALIBRATION, "To calibrate on and judge by; default the Python language reference.", "FILE"
    ),
    Flag(("--rows",), int, CALIBRATION, "Rows of tokens for calibration, and again for judging; default 16."),
    Flag(("--length",), int, CALIBRATION, "Tokens of a row, default 256."),
)  # fmt: skip
GGUF_FLAGS = (
    Flag(("--type",), str, GGUF, "Of matrices: F16 (the default), Q8_0, Q4_0, ..."),
    Flag(("--embeddings-type",), str, GGUF, "Of the table and the head; default as the others."),
)
CHECKING_FLAGS = (
    Flag(("--perplexity",), bool, CHECKING, "Measure it before and after."),
    Flag(("--verify",), bool, CHECKING, "Compare with the source layer by layer."),
    Flag(("--dry-run",), bool, CHECKING, "Print what becomes of every tensor, write nothing."),
)
UPLOAD_FLAGS = (
    Flag(("--upload",), str, UPLOAD, "Put the result on the hub; asks before.", "OWNER/NAME"),
    Flag(("--private",), bool, UPLOAD, "Make a new repository on the hub private."),
    Flag(("--yes",), bool, UPLOAD, "Upload without asking."),
)
CONVERT_FLAGS = (
    *RESULT_FLAGS, *QUANTIZING_FLAGS, *CALIBRATION_FLAGS, *GGUF_FLAGS, *CHECKING_FLAGS, *UPLOAD_FLAGS,
)  # fmt: skip
