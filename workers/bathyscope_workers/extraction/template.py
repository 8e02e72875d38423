"""Chat templates, rendered in a process of their own.

A template is Jinja from whoever published the model. jinja2's sandbox keeps it from the process it runs in but
does not bound its time or memory, and neither an endless loop nor one huge string operation can be interrupted
safely from within. So a small child renders (`template_child`, which uses transformers' own sandboxed helper
and no torch): it is kept warm, bounds its own memory, and is killed when it misses a deadline.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import orjson

_START_SECONDS = 60.0
"""For the child's imports on a busy machine."""


class TemplateFault(Exception):
    """Why a conversation could not be rendered, as a sentence for whoever sent it."""

    def __init__(self, reason: str, *, bounds: bool = False) -> None:
        super().__init__(reason)
        self.bounds = bounds
        """It took too long or ended its process: the next conversation would most likely do the same."""


class ChatRenderer:
    """Renders conversations, one at a time. `close()` ends the child."""

    def __init__(
        self, *, seconds: float = 5.0, memory_bytes: int = 512 * 2**20, max_characters: int = 8_000_000
    ) -> None:
        self.seconds = seconds
        """Deadline of one rendering."""
        self.memory_bytes = memory_bytes
        """What a rendering may take beyond the child's own needs."""
        self.max_characters = max_characters
        """Of one rendered conversation."""
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._ready = False

    def warm(self) -> None:
        """Start the child without waiting for it, so that the first rendering finds it ready."""
        if self._child is not None and self._child.poll() is None:
            return
        self.close()
        command = [sys.executable, "-m", "bathyscope_workers.extraction.template_child"]
        limits = [str(self.memory_bytes), str(self.max_characters)]
        self._child = subprocess.Popen(
            [*command, *limits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, close_fds=True
        )

    def render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        *,
        special_tokens: Mapping[str, Any],
        add_generation_prompt: bool,
    ) -> str:
        """The conversation as the text that `tokenizer.apply_chat_template(tokenize=False)` gives.

        Raises TemplateFault: the template refused the conversation, or missed its bounds.
        """
        request = {
            "template": template,
            "messages": messages,
            "special_tokens": special_tokens,
            "add_generation_prompt": add_generation_prompt,
        }
        line = orjson.dumps(request) + b"\n"
        for attempt in (1, 2):
            self.warm()
            try:
                if not self._ready:
                    self._read_line(_START_SECONDS)
                    self._ready = True
                self._write(line)
                answer = orjson.loads(self._read_line(self.seconds))
                break
            except (BrokenPipeError, EOFError):
                # The child died between two renderings, or of this one: once more, in a fresh one.
                self.close()
                if attempt == 2:
                    raise TemplateFault("the chat template ended the process it is rendered in", bounds=True) from None
            except TimeoutError:
                self.close()
                raise TemplateFault(
                    f"the chat template did not finish within {self.seconds:g} seconds", bounds=True
                ) from None
        if "error" in answer:
            raise TemplateFault(str(answer["error"]))
        return str(answer["text"])

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        self._buffer, self._ready = b"", False
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _write(self, data: bytes) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        view = memoryview(data)
        while view:
            view = view[os.write(self._child.stdin.fileno(), view) :]

    def _read_line(self, seconds: float) -> bytes:
        assert self._child is not None
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + seconds
        parts = [self._buffer]
        while b"\n" not in parts[-1]:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise EOFError
            parts.append(data)
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        return line
