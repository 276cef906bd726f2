"""The flags of the verbs that answer prompts. None stands for "not given": defaults live in the library."""

from __future__ import annotations

from mlxlm.cli.flags import Flag

WORDS, END, FORM, SEARCH, AHEAD, CACHE, PROMPT, LOADING = (
    "Choosing words", "Ending an answer", "Form of an answer", "Searching and leaning", "Guessing ahead",
    "What is remembered", "Prompt", "Loading",
)  # fmt: skip

SAMPLING_FLAGS = (
    Flag(("--temp",), float, WORDS, "Sampling temperature; default 0, which takes the likeliest token."),
    Flag(("--top-p",), float, WORDS, "Sample from the likeliest tokens of this joint probability."),
    Flag(("--top-k",), int, WORDS, "Sample from the k likeliest tokens; 0, the default, is off."),
    Flag(("--min-p",), float, WORDS, "Drop tokens below this share of the likeliest one."),
    Flag(("--repetition-penalty",), float, WORDS, "Above 1 avoids repetition."),
    Flag(("--logit-bias",), str, WORDS, 'As {"TOKEN_ID": BIAS, ...}.', "JSON"),
    Flag(("--seed",), int, WORDS, "Of the random numbers; default drawn anew."),
)
ENDING_FLAGS = (
    Flag(("--stop",), list[str], END, "A string that ends an answer; may be repeated.", "TEXT"),
    Flag(("--extra-eos-token",), list[str], END, "A further token that ends an answer; may be repeated.", "TOKEN"),
)
FORM_FLAGS = (
    Flag(("--json-schema",), str, FORM, "Answer in JSON of this schema: a file, or the schema.", "FILE|JSON"),
    Flag(("--regex",), str, FORM, "Answer with a text that matches this regular expression as a whole."),
)
SEARCH_FLAGS = (
    Flag(("--num-beams",), int, SEARCH, "Search the likeliest answer as a whole, with that many beams."),
    Flag(("--length-penalty",), float, SEARCH, "Of a beam search; more favours longer answers, default 1."),
    Flag(("--early-stopping",), str, SEARCH, "Of a beam search: true, false or never; default false."),
    Flag(("--best-of",), int, SEARCH, "Draw that many answers and print the likeliest; give --temp too."),
    Flag(
        ("--num-return-sequences",), int, SEARCH,
        "Answers of a beam search or of --best-of to print: score, tab, text; default 1, without its score.",
    ),
    Flag(
        ("--contrastive-alpha",), float, SEARCH,
        "Contrastive search: weight of the penalty for repetition, 0 to 1, such as 0.6; among --top-k tokens (4).",
    ),
    Flag(
        ("--guidance-scale",), float, SEARCH,
        "Lean away from what --negative-prompt would give: 1 not at all, more than 1 the more.",
    ),
    Flag(("--negative-prompt",), str, SEARCH, "Stands where the prompt does, for --guidance-scale."),
)  # fmt: skip
GUESSING_FLAGS = (
    Flag(("--draft-model",), str, AHEAD, "A smaller model with the same tokenizer that guesses ahead.", "PATH_OR_ID"),
    Flag(("--num-draft-tokens",), int, AHEAD, "Tokens to guess at once; default 3."),
    Flag(("--prompt-lookup",), int, AHEAD, "Guess what followed the last N tokens (or fewer) earlier in the text."),
    Flag(("--early-exit",), int, AHEAD, "Guess with the first N layers of the model itself."),
)
CACHE_FLAGS = (
    Flag(("--kv-bits",), int, CACHE, "Hold keys and values in 8 or 4 bits; default as they are."),
    Flag(("--kv-group-size",), int, CACHE, "Values that share a scale with --kv-bits: 32, 64 or 128; 64."),
    Flag(("--max-kv-size",), int, CACHE, "Tokens to remember: the first 4 and the last ones; default all of them."),
)
SYSTEM_FLAGS = (Flag(("--system-prompt",), str, PROMPT, "The system message."),)
TEMPLATE_FLAGS = (
    *SYSTEM_FLAGS,
    Flag(("--ignore-chat-template",), bool, PROMPT, "Take the prompt as it is, without the chat template."),
)
PROMPT_FLAGS = (
    *TEMPLATE_FLAGS,
    Flag(("--chat-template-config",), str, PROMPT, "Variables for the chat template.", "JSON"),
    Flag(
        ("--prompt-cache-file",), str, PROMPT, "A file of mlxlm cache-prompt; --prompt continues its text.", "FILE"
    ),
)  # fmt: skip
LOADING_FLAGS = (
    Flag(
        ("--adapter-path",), list[str], LOADING,
        "An adapter to use (of PEFT, mlx-lm, adapters, mlxlm); several, as FOLDER=WEIGHT, are added up.", "FOLDER",
    ),
    Flag(("--dtype",), str, LOADING, "float32, float16 or bfloat16; default the checkpoint's, float32 on the CPU."),
    Flag(("--revision",), str, LOADING, "Branch, tag or commit of a hub id."),
)  # fmt: skip
