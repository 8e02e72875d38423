"""A real Chromium, and an installation with keys and a worker for it to look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from bathyscope.datasets import capitals
from tests.service.test_adapters_live import archive
from tests.service.test_keys import make_key
from tests.stack import Stack

HOSTILE = '<img src=x onerror="window.hurt=1"><script>window.hurt=2</script>\'"&amp;{{7*7}}'
"""A name that would run in a page that does not escape it."""


def chromium() -> str | None:
    """Debian's, or what else is on the PATH."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ended with its module: while its driver lives its loop runs in this thread, and no other test's loop could."""
    found = chromium()
    if found is None:
        assert "CI" not in os.environ, "CI installs Chromium: .ci/run"
        pytest.skip("there is no Chromium on the PATH: apt-get install chromium")
    with sync_playwright() as driver:
        # A root without user namespaces, as in containers, has no sandbox.
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@dataclass
class Shown:
    """An installation with something of each kind in it."""

    stack: Stack
    key: str
    admin: str
    client: httpx2.Client
    made: dict[str, str] = field(default_factory=dict)

    def make(self, path: str, body: Any) -> str:
        """The id of what a job made."""
        answer = self.client.post(path, json=body, headers={"Prefer": "wait=60"})
        assert answer.status_code in (200, 202), answer.text
        job = answer.json()
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            job = self.client.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=60"}).json()
        assert job["status"] == "succeeded", job
        return str(job["resource"].rpartition("/")[2])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Shown]:
    stack = Stack(tmp_path_factory.mktemp("shown"), models=models)
    try:
        key, admin = make_key(stack, HOSTILE), make_key(stack, "admin", "--scope", "admin")
        stack.up()
        with httpx2.Client(base_url=stack.url, timeout=90, headers={"Authorization": f"Bearer {key}"}) as client:
            found = Shown(stack, key, admin, client)
            statements = capitals()[:60]
            found.made["extraction"] = found.make(
                "/v1/extractions",
                {
                    "model": "smollm2",
                    "inputs": [one.text for one in statements],
                    "layers": "every:10",
                    "metadata": {"note": HOSTILE},
                },
            )
            found.made["probe"] = found.make(
                "/v1/probes",
                {
                    "name": HOSTILE,
                    "extraction": found.made["extraction"],
                    "labels": [one.label for one in statements],
                    "groups": [one.group for one in statements],
                    "folds": 3,
                    "bootstrap": 100,
                    "baselines": ["length"],
                    "calibration": "platt",
                },
            )
            sent = client.post(
                "/v1/adapters",
                files={"file": archive(1, "tinker")},
                data={"base_model": "tiny", "name": HOSTILE},
                headers={"Prefer": "wait=60"},
            )
            assert sent.json()["status"] == "succeeded", sent.text
            found.made["adapter"] = sent.json()["resource"].rpartition("/")[2]
            found.made["comparison"] = found.make(
                "/v1/comparisons",
                {
                    "name": HOSTILE,
                    "model": "tiny",
                    "variants": ["base", found.made["adapter"]],
                    "inputs": [one.text for one in statements],
                    "labels": [one.label for one in statements],
                    "groups": [one.group for one in statements],
                    "layers": [0, 2, -1],
                    "folds": 3,
                    "bootstrap": 50,
                },
            )
            found.made["experiment"] = found.make(
                "/v1/experiments",
                {
                    "experiment": {"name": "capitals"},
                    "model": {"name": "tiny", "adapter": found.made["adapter"]},
                    "dataset": {"name": "capitals", "limit": 80},
                    "extraction": {"layers": [1, 2]},
                    "evaluation": {"bootstrap": 50},
                },
            )
            yield found
    finally:
        stack.down()


@dataclass
class Watched:
    """A page, and whatever it complained of."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def sign_in(self, key: str) -> None:
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("navigation").wait_for()


@pytest.fixture
def watched(browser: Browser, shown: Shown, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """A page at the sign-in; anything that the browser reports of it, as a breach of the policy, fails the test."""
    options = getattr(request, "param", {})
    context = browser.new_context(base_url=shown.stack.url, **options)
    context.set_default_timeout(60_000)
    page = context.new_page()
    found = Watched(page)
    page.on("console", lambda said: said.type in ("error", "warning") and found.complaints.append(said.text))
    page.on("pageerror", lambda fault: found.complaints.append(str(fault)))
    page.add_init_script(
        "window.breaches = []; addEventListener('securitypolicyviolation', "
        "event => window.breaches.push(`${event.violatedDirective} ${event.blockedURI}`))"
    )
    page.goto("/")
    page.get_by_label("API key").wait_for()
    found.complaints.clear()  # asking without a key is answered 401, which the console shows
    try:
        yield found
        assert page.evaluate("window.breaches") == []
        assert page.evaluate("window.hurt") is None
        assert found.complaints == []
    finally:
        context.close()
