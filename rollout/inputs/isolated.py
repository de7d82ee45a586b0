"""Decode strangers' images in processes of their own, with limits of memory and time: both ends.

A decoder that takes too long or too much is killed and replaced; whoever asked gets a PromptError. It is not a
sandbox: a decoder that is taken over may do what its user may.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any, BinaryIO

from rollout.inputs.images import PromptError, check_decodes, read_size

TIMEOUT_S = 20.0
MEMORY_BYTES = 2 << 30  # of address space; numpy and Pillow take about 0.3 GiB of it
ALONE_S = 120  # a process whose other end has died is ended after this
_HEAD = struct.Struct(">QQ")


class IsolatedDecoders:
    """Up to `num_processes` decoders, started when they are needed. Thread-safe."""

    def __init__(self, num_processes: int, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._idle: queue.LifoQueue[_Decoder | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._idle.put(None)

    def check(self, content: bytes, max_pixels: int) -> tuple[int, int]:
        """Decode an image and drop the pixels; return its (height, width). More than `max_pixels` are not decoded.

        Raises:
            PromptError: it cannot be decoded within the limits.
        """
        decoder = self._idle.get()
        try:
            if decoder is None or not decoder.is_alive():
                decoder = _Decoder(self._memory_bytes)
            reply = decoder.ask(content, max_pixels, self._timeout_s)
            if reply is None:
                decoder.close()
                decoder = None
                raise PromptError(f"the image took more memory or time than an image may (over {self._timeout_s:g} s?)")
        finally:
            self._idle.put(decoder)
        if "error" in reply:
            raise PromptError(str(reply["error"]))
        return reply["height"], reply["width"]

    def close(self) -> None:
        """End the processes that are idle; those at work end with this process."""
        with suppress(queue.Empty):
            while True:
                if decoder := self._idle.get_nowait():
                    decoder.close()


class _Decoder:
    """Our end of one process."""

    def __init__(self, memory_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rollout.inputs.isolated", str(memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, content: bytes, max_pixels: int, timeout_s: float) -> dict[str, Any] | None:
        """Return the reply; None if the process had to be killed or died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = threading.Timer(timeout_s, self._process.kill)
        deadline.start()
        try:
            self._process.stdin.write(_HEAD.pack(len(content), max_pixels) + content)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            reply: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
            return reply
        except OSError:
            return None
        finally:
            deadline.cancel()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer until the other end is closed; if it is gone, an image that takes too long ends this process."""
    while len(head := requests.read(_HEAD.size)) == _HEAD.size:
        num_bytes, max_pixels = _HEAD.unpack(head)
        reply: dict[str, object]
        try:
            content = requests.read(num_bytes)
            signal.alarm(ALONE_S)
            height, width = read_size(content)
            if height * width <= max_pixels:
                check_decodes(content)
            reply = {"height": height, "width": width}
        except PromptError as error:
            reply = {"error": str(error)}
        signal.alarm(0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def main() -> None:
    """Run one decoder: requests on stdin, replies on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end decides
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
