"""`nudging-hf serve`: a pair of models behind OpenAI's API, or a base that runs elsewhere and a nudging model."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import TYPE_CHECKING, Any

from ..chats import turn_template
from ..core.config import NudgingConfig
from .arguments import (
    add_base_template,
    add_gate,
    add_models,
    add_number,
    command_parser,
    count,
    drafts,
    load_named,
    load_pair,
    parameters_of,
    positive,
)

if TYPE_CHECKING:
    from ..server.engine import Engine

KEY_VARIABLE = "NUDGING_HF_API_KEY"


def add_command(commands: Any) -> None:
    parser = command_parser(commands, "serve", run)
    models = add_models(parser)
    models.add_argument(
        "--base-url",
        metavar="URL",
        help="the base runs elsewhere, behind this OpenAI-compatible API, such as http://localhost:8000/v1 of vLLM; "
        "--base then names its tokenizer and configs. A key for it is read from OPENAI_API_KEY. It needs the extra "
        "[openai]; see docs/remote.md",
    )
    models.add_argument("--base-model", metavar="NAME", help="the base's name there (default: what --base says)")
    models.add_argument(
        "--retry-for",
        type=count,
        metavar="SECONDS",
        help="how long an answer waits for a base elsewhere that is busy, broken or gone (default: 600)",
    )
    models.add_argument(
        "--stops-when-unsure",
        action="store_true",
        default=None,
        help="the engine there runs the logits processor StopWhenUnsure",
    )
    served = parser.add_argument_group("server")
    served.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    served.add_argument("--port", type=_port, default=8000, metavar="N", help="default: %(default)s")
    served.add_argument("--served-model-name", metavar="NAME", help="the model's name (default: that of --base)")
    served.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients must send; better in the environment variable {KEY_VARIABLE}, which other users of the "
        "machine cannot see",
    )
    add_number(served, "--max-requests", 8, "how many answers are written at once")
    add_number(
        served, "--max-queue", 64, "how many more may wait for a place; further ones are told to come back later", 0
    )
    add_number(served, "--max-new-tokens", 1024, "the limit on an answer, in tokens, where a request names none")
    add_number(served, "--grace", 30, "how many seconds running answers have to finish when the server ends", 0)
    served.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="how many tokens a prompt and its answer may have (default: what the base was trained on)",
    )
    add_base_template(parser.add_argument_group("prompts"))
    nudging = parser.add_argument_group("nudging, where a request does not say")
    add_gate(nudging)
    nudging.add_argument(
        "--num-draft-tokens",
        type=drafts,
        metavar="N",
        help="how many tokens of the nudging model the base verifies in a pass, which changes the speed and never the "
        f"answer (default: {NudgingConfig.num_draft_tokens})",
    )


def run(args: argparse.Namespace) -> None:
    """Serves a nudged base to clients of OpenAI's API: chat completions and completions, streamed or not. Many
    requests are answered at once. With --base-url another engine runs the base. It needs the extra [serve];
    docs/server.md describes the fields of a request."""
    from ..server.app import ServerSettings, create_app
    from ..server.serving import GracefulServer

    turn_template(args.base_template)  # A bad one is refused now, not after the models have been loaded.
    parameters = parameters_of(args)
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    engine = _in_process(args, parameters) if args.base_url is None else _remote(args, parameters)
    settings = ServerSettings(
        served_name=args.served_model_name or args.base,
        base_template=args.base_template,
        default_max_tokens=args.max_new_tokens,
        max_answers=args.max_requests + args.max_queue,
        api_key=key,
    )
    GracefulServer(create_app(engine, settings), engine, args.host, args.port, args.grace).run()


def _in_process(args: argparse.Namespace, parameters: dict[str, Any]) -> Engine:
    from ..server.in_process import InProcessEngine

    for option in ("base_model", "retry_for", "stops_when_unsure"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} is for a base that runs elsewhere: give --base-url too.")
    return InProcessEngine(load_pair(args), args.max_requests, args.max_queue, parameters, args.max_context)


def _remote(args: argparse.Namespace, parameters: dict[str, Any]) -> Engine:
    from ..integrations.openai import EngineError, RemoteBase
    from ..server.remote import RemoteEngine

    if args.num_draft_tokens is not None:
        raise ValueError("--num-draft-tokens: a base that runs elsewhere is not sent drafts. Leave it out.")
    options = {"max_concurrency": args.max_requests, "stops_when_unsure": bool(args.stops_when_unsure)}
    if args.retry_for is not None:
        options["retry_for"] = args.retry_for
    base = RemoteBase(args.base_url, args.base_model or args.base, args.base, **options)
    gate = NudgingConfig.resolve([parameters, base.described.generation_config.to_dict()]).nudge_gate

    async def tried() -> Any:
        async with base:
            return await base.check(gate, waits=True)

    try:
        abilities = asyncio.run(tried())
    except EngineError as error:
        raise ValueError(f"{base!r}: {error}") from error
    context_length = args.max_context or abilities.context_length
    return RemoteEngine(base, *load_named(args, "nudging_model"), args.max_queue, parameters, context_length)


def _port(text: str) -> int:
    number = count(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return number
