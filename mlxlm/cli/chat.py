"""`mlxlm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
import time

from mlxlm.cli import caching
from mlxlm.cli import options as opt
from mlxlm.errors import MlxlmError, UnsupportedModelError

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this"


def chat(
    model: opt.Model,
    system_prompt: opt.SystemPrompt = None,
    max_tokens: opt.MaxTokens = 1024,
    temp: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    top_k: opt.TopK = 0,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    logit_bias: opt.LogitBias = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    extra_eos_token: opt.StopToken = None,
    draft_model: caching.DraftModel = None,
    num_draft_tokens: caching.NumDraftTokens = None,
    prompt_lookup: caching.PromptLookup = None,
    early_exit: caching.EarlyExit = None,
    kv_bits: caching.KvBits = None,
    kv_group_size: caching.KvGroupSize = None,
    max_kv_size: caching.MaxKvSize = None,
    adapter_path: opt.AdapterPath = None,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
) -> None:
    """Chat with an instruct model. What was said stays in the cache, so each turn only reads what is new."""
    from mlxlm.generation import Conversation, Sampling

    sampling = Sampling(
        temperature=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logit_bias=opt.parse_logit_bias(logit_bias),
        seed=seed,
    )
    spec = caching.cache_spec(kv_bits, kv_group_size, max_kv_size)
    start = time.perf_counter()
    network, tokenizer = opt.load(model, dtype, revision, adapter_path)
    if tokenizer.chat_template is None:
        raise UnsupportedModelError("this model has no chat template, so it can't chat; mlxlm generate continues text")
    guesses = caching.speculation(tokenizer, draft_model, num_draft_tokens, prompt_lookup, early_exit, dtype)
    conversation = Conversation(network, tokenizer, system_prompt, spec)
    print(f"loaded in {time.perf_counter() - start:.2f} s; {_HELP}", file=sys.stderr)
    answer_options = {
        "max_tokens": max_tokens,
        "stop": stop or (),
        "stop_tokens": opt.token_ids(tokenizer, extra_eos_token),
        "sampling": sampling,
        "speculation": guesses,
    }
    while (text := _read()) is not None:
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            conversation.reset()
            print("the conversation is forgotten", file=sys.stderr)
        elif text == "/help":
            print(_HELP, file=sys.stderr)
        elif text.startswith("/"):
            print(f"unknown command {text.split()[0]}; {_HELP}", file=sys.stderr)
        elif text:
            _answer(conversation, text, answer_options)


def _read() -> str | None:
    """The next line without surrounding blanks, "" for an abandoned one, None at the end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() editing and history
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(f"\n{_HELP}", file=sys.stderr)
        return ""


def _answer(conversation: object, text: str, answer_options: dict[str, object]) -> None:
    piece = None
    try:
        for piece in conversation.ask(text, **answer_options):  # type: ignore[attr-defined]
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except MlxlmError as error:
        # A turn that can't be answered (a full context, say) ends neither the program nor the conversation.
        print(f"error: {error}; /reset starts anew", file=sys.stderr)
    if piece is not None:
        print(flush=True)
    opt.report(piece, 0)
