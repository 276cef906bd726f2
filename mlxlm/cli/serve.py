"""`mlxlm serve`: a server that speaks the protocol of OpenAI's API."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlxlm.cli import options as opt
from mlxlm.errors import UsageError


def serve(
    model: opt.ModelOrShipped = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; default this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any free one.")] = 8080,
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="What clients call the model; default the last part of --model.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="MLXLM_API_KEY", show_envvar=True, help="Key that clients must send."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="A further host name that is answered; * for any. May be repeated."),
    ] = None,
    max_rows: Annotated[int, typer.Option("--max-rows", help="Answers made at once.")] = 16,
    max_waiting: Annotated[int, typer.Option("--max-waiting", help="Answers that may wait; more get 429.")] = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens of one answer.")] = 4096,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", help="Of one request; default what the context holds.")
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", help="Most bytes of a request.")] = 4 * 2**20,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds of a request, waiting included.")] = 600.0,
    grace: Annotated[float, typer.Option("--grace", help="Seconds for running requests at the end.")] = 30.0,
    adapter_path: opt.AdapterPath = None,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
) -> None:
    """Serve a model to programs that speak OpenAI's API, and to people on a page of its own.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /health, /metrics, and the page at /.
    Ctrl-C or SIGTERM lets running requests finish.
    """
    _check_installed()
    from mlxlm.server import ServerSettings, Service
    from mlxlm.server import serve as run
    from mlxlm.server.running import listen

    given = model or opt.shipped_model()
    hosts = (*ServerSettings.hosts, *(allowed_host or ()))
    settings = ServerSettings(
        name=model_name or served_name(given),
        api_key=api_key,
        hosts=hosts if _is_loopback(host) or allowed_host else ("*",),
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_body=max_body,
        timeout=timeout,
        grace=grace,
    )
    listening = listen(host, port)  # refuses before the model is loaded
    if not _is_loopback(host) and api_key is None:
        print("warning: whoever reaches this machine can use the model; set --api-key", file=sys.stderr)
    network, tokenizer = opt.load(given, dtype, revision, adapter_path)

    def ready(url: str) -> None:
        print(f"{settings.name} at {url} (page) and {url}/v1 (API)", file=sys.stderr, flush=True)

    run(Service(network, tokenizer, settings), listening, ready)


def _check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"serve needs {error.name}: pip install starlette uvicorn anyio") from None


def served_name(model: str) -> str:
    """What clients call a model unless they are told otherwise: the last part of its path or hub id."""
    path = Path(model)
    return (path.resolve() if path.exists() else path).name


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
