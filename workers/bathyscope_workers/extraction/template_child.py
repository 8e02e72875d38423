"""The process in which chat templates are rendered; see `template`.

Reads JSON lines `{"template", "messages", "special_tokens", "add_generation_prompt"}`, answers each with
`{"text"}` or `{"error"}`. Arguments: bytes of memory beyond its own needs, most characters of an answer.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import orjson

from bathyscope_backplane import logs
from bathyscope_workers.engine.process import die_with_parent


def main() -> None:
    """Render until the input ends."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory_bytes, max_characters = int(sys.argv[1]), int(sys.argv[2])
    from transformers.utils import chat_template_utils

    logs.configure("warning", process="template")
    render: Callable[..., Any] = chat_template_utils.render_jinja_template

    _bound_memory(memory_bytes)
    answers = sys.stdout.buffer
    # What a template or library prints must not land among the answers.
    sys.stdout = sys.stderr
    answers.write(b"{}\n")
    answers.flush()
    for line in sys.stdin.buffer:
        try:
            request = orjson.loads(line)
            rendered = render(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=request["add_generation_prompt"],
                **request["special_tokens"],
            )
            text = rendered[0][0]
            if len(text) > max_characters:
                raise ValueError(f"the chat template gave {len(text)} characters, the limit is {max_characters}")
            answer = orjson.dumps({"text": text})
        except MemoryError:
            answer = orjson.dumps({"error": "the chat template needs more memory than it may take"})
        except Exception as error:
            reason = str(error).strip()[:500] or type(error).__name__
            answer = orjson.dumps({"error": f"the chat template refused it: {reason}"})
        answers.write(answer + b"\n")
        answers.flush()


def _bound_memory(extra: int) -> None:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: the deadline alone holds
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the engine is gone
        main()
