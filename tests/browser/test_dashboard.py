"""The dashboard in a real browser: what a person does with it, with strings of attackers in every name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import HOSTILE, Shown, Watched

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
VIEWS = ["jobs", "models", "adapters", "extractions", "probes", "try", "comparisons", "experiments", "datasets"]


def heading(page: Page, name: Any) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text(name, timeout=60_000)


def settled(page: Page) -> None:
    """Nothing is being loaded any more."""
    expect(page.get_by_text(re.compile(r"^(Loading|Drawing)…$"))).to_have_count(0, timeout=60_000)


def pictures(page: Page, least: int) -> None:
    shown = page.locator(".picture img")
    expect(shown.nth(least - 1)).to_be_visible(timeout=60_000)
    settled(page)
    for number in range(shown.count()):
        shown.nth(number).scroll_into_view_if_needed()
        page.wait_for_function(
            "image => image.complete && image.naturalWidth > 100", arg=shown.nth(number).element_handle()
        )


def test_from_key_to_plot(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.key)
    heading(page, "Jobs")
    page.get_by_role("link", name="Extractions", exact=True).click()
    page.get_by_label("Model").select_option("smollm2")
    page.get_by_label("Layers").fill("0, 15, -1")
    page.get_by_label("Pooling").select_option("mean")
    page.get_by_label("Texts").fill(f"deep water\n{HOSTILE}\n")
    form = page.get_by_role("form", name="Start an extraction")
    form.get_by_role("button", name="Extract").click()
    expect(form.locator(".badge")).to_have_text("succeeded", timeout=60_000)
    form.get_by_role("link", name="Open it").click()
    heading(page, "Extraction")
    expect(page.locator(".facts")).to_contain_text("2 × 3 × 576")
    with page.expect_download() as saved:
        page.get_by_role("button", name="npy").click()
    assert saved.value.path().read_bytes()[:6] == b"\x93NUMPY"

    page.get_by_role("link", name="Probes", exact=True).click()
    page.get_by_role("link", name=HOSTILE).click()
    heading(page, HOSTILE)
    pictures(page, 3)
    assert "best layer" in (page.locator(".picture img").first.get_attribute("alt") or "")


def test_jobs_are_live(watched: Watched, shown: Shown) -> None:
    """A job that is made elsewhere shows up and ends before one's eyes, without reloading."""
    page = watched.page
    watched.sign_in(shown.key)
    heading(page, "Jobs")
    job = shown.client.post(
        "/v1/extractions", json={"model": "tiny", "inputs": ["seen from afar"], "layers": [0, 1], "pooling": "max"}
    ).json()
    row = page.get_by_role("row").filter(has=page.locator(f'a[href="#/jobs/{job["id"]}"]'))
    expect(row.locator(".badge")).to_have_text("succeeded", timeout=60_000)
    row.get_by_role("link", name="extraction", exact=True).click()
    heading(page, "Job: extraction")
    expect(page.locator("main .badge")).to_have_text("succeeded")


def test_a_broken_stream_is_resumed_after_its_last_event(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.key)
    job = shown.client.get("/v1/jobs", params={"limit": 1, "status": "succeeded"}).json()["data"][0]
    asked: list[str | None] = []
    first = "id: 5-0\nevent: progress\ndata: {}\n\n".format(
        '{"id":"x","kind":"probe","status":"running","progress":{},"timings":{},"request":{}}'
    )

    def cut(route: Any) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        assert route.request.headers["authorization"] == f"Bearer {shown.key}"
        if len(asked) == 1:
            route.fulfill(status=200, content_type="text/event-stream", body=first)
        else:
            route.continue_()

    page.route("**/events", cut)
    page.goto(f"/#/jobs/{job['id']}")
    expect(page.locator("main .badge")).to_have_text("succeeded")
    assert asked == [None, "5-0"]


def test_scores_of_tokens(watched: Watched, shown: Shown) -> None:
    """Every letter of the text stays as it was, hostile ones and those beyond UTF-16's first plane too."""
    page = watched.page
    watched.sign_in(shown.key)
    page.get_by_role("link", name="Try it").click()
    text = f"The capital 🐟 of France {HOSTILE}"
    page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Read it").click()
    tokens = page.locator(".tokens .token")
    expect(tokens.first).to_be_visible()
    assert tokens.count() > 20
    assert page.locator(".tokens").inner_text().replace("·", "") == text
    colours = set(tokens.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)"))
    assert len(colours) > 3
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(page.locator(".scale output")).to_contain_text("=")


def test_adapter_with_effect_and_notes(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.key)
    page.get_by_role("link", name="Adapters").click()
    page.get_by_role("link", name=HOSTILE).click()
    heading(page, HOSTILE)
    of = shown.client.get(f"/v1/adapters/{shown.made['adapter']}").json()
    expect(page.locator(".bars rect")).to_have_count(len(of["effect"]["relative_change"]))
    for note in of["conversion"]:
        expect(page.get_by_text(note)).to_be_visible()


def test_comparison_with_its_pictures_and_matrix(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.key)
    page.get_by_role("link", name="Comparisons").click()
    page.get_by_role("link", name=HOSTILE).click()
    heading(page, HOSTILE)
    pictures(page, 3)
    expect(page.locator(".matrix tbody tr")).to_have_count(2)
    expect(page.locator(".matrix tbody td").first).to_contain_text(re.compile(r"[01]\.\d{3}"))


def test_experiment_with_its_stages(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.key)
    page.get_by_role("link", name="Experiments").click()
    page.get_by_role("link", name="capitals").click()
    heading(page, "capitals")
    pictures(page, 3)
    of = shown.client.get(f"/v1/experiments/{shown.made['experiment']}").json()
    for stage in of["stages"]:
        expect(page.get_by_role("table", name="Stages")).to_contain_text(stage["name"])
    expect(page.get_by_role("table", name="Adapter minus base")).to_contain_text("auroc")
    page.get_by_role("link", name="what comparison made").click()
    heading(page, "capitals")
    expect(page.locator(".matrix tbody tr")).to_have_count(2)


def test_by_keyboard_alone(watched: Watched, shown: Shown) -> None:
    page = watched.page
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(shown.key)
    page.keyboard.press("Enter")
    page.get_by_role("navigation").wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="To the content")).to_be_focused()
    reached: list[str] = []
    while "Extractions" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent"))
        assert len(reached) < 12, reached
    page.keyboard.press("Enter")
    heading(page, "Extractions")
    expect(page.get_by_role("main")).to_be_focused()
    expect(page.get_by_label("Model").locator("option").first).to_be_attached()
    for _ in range(6):
        page.keyboard.press("Tab")
    expect(page.get_by_label("Texts")).to_be_focused()
    page.keyboard.type("typed, not clicked")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("form").locator(".badge")).to_have_text("succeeded", timeout=60_000)


@pytest.mark.parametrize("watched", [PHONE, {**PHONE, "color_scheme": "dark"}], indirect=True, ids=["light", "dark"])
def test_no_page_is_wider_than_a_phone(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.key)
    ones = [f"{kind}s/{shown.made[kind]}" for kind in ("extraction", "probe", "adapter", "comparison", "experiment")]
    for view in [*VIEWS, *ones]:
        page.goto(f"/#/{view}")
        page.get_by_role("heading", level=1).wait_for()
        settled(page)
        width = page.evaluate("document.scrollingElement.scrollWidth")
        assert width <= 360, (view, width)


def test_a_wrong_key_a_forgotten_one_and_where_it_is_kept(watched: Watched, shown: Shown) -> None:
    page = watched.page
    page.get_by_label("API key").fill("bsk_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not valid")
    watched.complaints.clear()
    watched.sign_in(shown.key)
    assert page.evaluate("Object.values(sessionStorage)") == [shown.key]
    assert page.evaluate("[localStorage.length, document.cookie, location.href.includes('bsk_')]") == [0, "", False]
    page.reload()
    heading(page, "Jobs")
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_what_is_refused_is_said(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.key)
    page.goto("/#/extractions")
    page.get_by_label("Texts").fill("text")
    page.get_by_label("Layers").fill("900")
    page.get_by_role("button", name="Extract").click()
    expect(page.get_by_role("alert")).to_contain_text("layers are 0 to")
    page.get_by_label("Layers").fill("some")
    page.get_by_role("button", name="Extract").click()
    expect(page.get_by_role("alert")).to_contain_text("every:4")
    page.goto("/#/probes/prb_none")
    expect(page.get_by_role("alert")).to_be_visible()
    watched.complaints[:] = [said for said in watched.complaints if "422" not in said and "404" not in said]


def test_models_load_by_an_admin_only(watched: Watched, shown: Shown) -> None:
    page = watched.page
    watched.sign_in(shown.admin)
    page.get_by_role("link", name="Models").click()
    card = page.locator(".card").filter(has=page.get_by_role("heading", name="tiny"))
    card.get_by_role("button", name="Load", exact=True).click()
    expect(card.get_by_text("load: succeeded")).to_be_visible(timeout=60_000)
    expect(card.locator("h2 .badge")).to_have_text("hot", timeout=60_000)
    page.get_by_role("button", name="Forget key").click()
    watched.sign_in(shown.key)
    page.goto("/#/models")
    expect(page.locator(".card").first).to_be_visible()
    expect(page.get_by_role("button", name="Load", exact=True)).to_have_count(0)


def test_static_files_are_open_strict_and_whole(shown: Shown) -> None:
    front = shown.stack.client.get("/")
    policy = front.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "<script>" not in front.text
    assert "style=" not in front.text
    for path in ("app.js", "vendor/preact.mjs", "vendor/LICENSE-preact.txt", "vendor/LICENSE-htm.txt"):
        answer = shown.stack.client.get(f"/dashboard/{path}")
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = shown.stack.client.get(f"/dashboard/{path}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("", "none.js", "%2e%2e/endpoints.py", "vendor/%2e%2e/%2e%2e/endpoints.py", "__init__.py"):
        assert shown.stack.client.get(f"/dashboard/{path}").status_code == 404
    assert shown.stack.client.get("/v1/jobs").status_code == 401
