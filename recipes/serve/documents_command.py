"""`recipes.retrieve serve`: a store over HTTP, with the options of the app and the door of `recipes.serve`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from contextlib import closing

from recipes.answers.options import add_options, port
from recipes.retrieval.answers.library import LibrarySettings
from recipes.retrieval.command_line import add_answerer, add_encoder, add_search_options, open_library
from rsgrpo.errors import InputError
from rsgrpo.records.console import Console

SHUTDOWN_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


def add_serve_command(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.description = (
        "Search, ask and keep documents over HTTP: GET /docs shows how. Without --answer-model or --endpoint, pages "
        "are found and not read. Changes of the store by other programs are followed."
    )
    add_encoder(command)
    add_search_options(command)
    add_answerer(command)
    command.set_defaults(max_tries=3)  # someone is waiting
    where = command.add_argument_group("where to listen, and what to accept")
    listening = "0.0.0.0 lets other machines in; set RSGRPO_SERVE_TOKEN for a bearer token"
    where.add_argument("--host", default="127.0.0.1", help=listening)
    where.add_argument("--allow-host", action="append", default=[], help="a further name that clients may call it by")
    where.add_argument("--port", type=port, default=8001, help="0: any free port")
    where.add_argument("--max-connections", type=int, default=256, help="further ones are closed at once")
    where.add_argument("--max-requests", type=int, default=32, help="waiting ones included; further ones get 429")
    where.add_argument("--max-upload-mb", type=int, default=1_024, help="of all files of an upload")
    add_options(where, LibrarySettings)
    command.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from recipes.serve.chat_request import MIB  # the other commands do without a web server
    from recipes.serve.documents import DocumentServer, DocumentServerConfig
    from recipes.serve.door import TOKEN_VARIABLE, Door, is_loopback, listen

    token = os.environ.get(TOKEN_VARIABLE, "")
    door = Door(token, (options.host, *options.allow_host), options.max_connections)
    config = DocumentServerConfig(
        options.setting, options.k, options.max_requests, options.max_files, options.max_file_mb * MIB,
        options.max_upload_mb * MIB, door,
    )  # fmt: skip
    if not is_loopback(options.host) and not token:
        log.warning("anyone who reaches %s can read, add and remove documents: set %s", options.host, TOKEN_VARIABLE)
    here = f"serving {options.store} at http://{options.host}:{options.port} (how: /docs)"
    with Console(sys.stderr) as console:
        library = open_library(options, console)
    with closing(library):
        try:
            asyncio.run(
                listen(
                    lambda: DocumentServer(library, config).app, options.host, options.port, door=door,
                    shutdown_timeout_s=SHUTDOWN_TIMEOUT_S, on_ready=lambda: print(here, flush=True),
                )
            )  # fmt: skip
        except OSError as error:
            place = f"{options.host}:{options.port}"
            raise InputError(f"cannot listen on {place}: {error}; choose another --port") from error
