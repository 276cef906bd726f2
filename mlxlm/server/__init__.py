"""A server that speaks the protocol of OpenAI's API, over the continuous-batching engine. Needs the extra `serve`."""

from mlxlm.server.app import make_app
from mlxlm.server.running import serve
from mlxlm.server.service import Service
from mlxlm.server.settings import ServerSettings

__all__ = ["ServerSettings", "Service", "make_app", "serve"]
