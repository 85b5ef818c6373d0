"""The device's own page in a real browser, before a real server: what it shows is what the API says.

With COSTEER_SCREENSHOTS=docs/images the picture of the documentation is made anew.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from costeer_vllm.demo.task import EVENTS
from costeer_vllm.processes import Running, edge_worker, free_port, wait_until

from .conftest import EDGE_OPTIONS, Deployment

pytestmark = pytest.mark.parametrize("deployment", ["v1"], indirect=True, scope="session")

KEY = "a-gateway-key-that-no-log-may-hold"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip


@dataclass
class Device:
    """An edge worker with its gateway and ledger, and an edge-fused and a cloud-fused answer."""

    deployment: Deployment
    url: str
    edge: Running
    ledger: Path
    edge_fused: Any = None
    cloud_fused: Any = None

    def chat(self, event: int = 2, **costeer: Any) -> Any:
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return client.chat.completions.create(
                model=self.deployment.model,
                messages=[{"role": "user", "content": f"Write an invitation to the {EVENTS[event].name}."}],
                max_tokens=96,
                temperature=0,
                extra_body={"costeer": costeer} if costeer else None,
            )

    def state(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/costeer/state", trust_env=False).json())


@contextlib.contextmanager
def gateway(deployment: Deployment, folder: Path, name: str = "laptop", **environment: str) -> Iterator[Device]:
    """A device of its own before the deployment."""
    port = free_port()
    ledger = folder / "ledger.jsonl"
    options = (*EDGE_OPTIONS, "--gateway", f"127.0.0.1:{port}", "--server", deployment.server.url, "--ledger", str(ledger))
    small, context = deployment.folder / "small", deployment.contexts()[2]
    with edge_worker(deployment.server.hub, name, small, context, folder, options, environment) as edge:
        yield Device(deployment, f"http://127.0.0.1:{port}", edge, ledger)


@pytest.fixture(scope="module")
def device(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with gateway(deployment, tmp_path_factory.mktemp("page")) as found:
        found.cloud_fused = found.chat(fusion="cloud", T=1)
        found.edge_fused = found.chat(fusion="edge", T=1)
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert executable is not None, f"no browser: none of {', '.join(BROWSERS)} is on the PATH (make chromium)"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, is_quiet: bool = True, **options: Any) -> Iterator[Page]:
    """The page, which must ask nobody but the gateway; ``is_quiet``: nor complain in the browser's console."""
    complaints: list[str] = []
    asked: list[str] = []
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 1080}, "color_scheme": "light", **options})
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{url}/")
    yield page
    context.close()
    assert asked
    assert [address for address in asked if not address.startswith((f"{url}/", "data:"))] == []
    assert not is_quiet or complaints == []


def answers(page: Page) -> Locator:
    return page.locator("details.answer")


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\.?\d+", text)]


def test_it_shows_what_is_attached_and_both_answers_as_the_api_does(device: Device, browser: Browser) -> None:
    with opened(browser, device.url) as page:
        expect(page.locator("#attached")).to_have_text("Attached")
        facts = page.locator("#facts").inner_text()
        server = device.deployment.server
        for fact in (f"ws://{server.hub}", server.url, "small", "tokens and deltas", "none set"):
            assert fact in facts
        expect(answers(page)).to_have_count(2)
        for i, (answer, fusion) in enumerate(((device.edge_fused, "edge"), (device.cloud_fused, "cloud"))):
            found, shown = answer.costeer, answers(page).nth(i)
            head, text = shown.locator(".line"), shown.locator(".tokens")
            expect(head.locator(".fusion")).to_have_text(f"{fusion.capitalize()} fusion")
            content = answer.choices[0].message.content
            # The last token of a cloud-fused answer is nobody's business here: the server does not ask about what follows it.
            expect(text.locator("span")).to_have_count(found["tokens_steered"] - (fusion == "cloud"))
            assert (text.text_content() or "").removesuffix("<|im_end|>") == content
            told = numbers(head.locator(".left").inner_text())
            assert told == [round(found["disclosed_bits"], 2), found["bytes_up"]] if fusion == "edge" else [found["bytes_up"]]
            assert f"{found['tokens_steered']} tokens at strength {found['strength']:.3f}" in shown.locator(".about").inner_text()
        edge, cloud = device.edge_fused.costeer, device.cloud_fused.costeer
        assert numbers(page.locator("#bits").inner_text()) == [round(edge["disclosed_bits"], 2)]
        assert numbers(page.locator("#edge-bytes").inner_text()) == [edge["bytes_up"]]
        assert numbers(page.locator("#cloud-bytes").inner_text()) == [cloud["bytes_up"]]
        assert numbers(page.locator("#all-bytes").inner_text()) == [edge["bytes_up"] + cloud["bytes_up"]]
        assert page.locator("#plot svg circle").count() == 1
    assert len(device.ledger.read_text().splitlines()) == 2


def test_a_token_tells_how_far_it_was_moved_under_the_mouse_and_by_the_keyboard(device: Device, browser: Browser) -> None:
    signature = (device.edge_fused.choices[0].message.content or "").split()[-1]  # the private first name
    with opened(browser, device.url) as page:
        tip = page.locator("#tip")
        for i, model in enumerate(("Large model", "Small model")):
            answer = answers(page).nth(i)
            token = answer.locator(".tokens span:has(b[class^=up])", has_text=signature[:3]).first
            token.hover()
            expect(tip).to_be_visible()
            plain, personal = (numbers(row.split("\n")[1])[0] for row in tip.locator(".row").all_inner_texts())
            assert personal > plain
            assert tip.locator(".row").first.inner_text().startswith(model)
            assert "times likelier" in tip.inner_text()
            stream = device.state()["answers"][i]["stream"]
            told = httpx.get(f"{device.url}/costeer/answers/{stream}", trust_env=False).json()["tokens"]
            near = pytest.approx([plain / 100, personal / 100], abs=0.0006)
            assert any(signature[:3] in each["text"] and [each["plain"], each["personal"]] == near for each in told)
        page.mouse.move(5, 5)
        expect(tip).to_be_hidden()
        first = answers(page).first.locator(".tokens span").first
        first.focus()
        page.keyboard.press("ArrowRight")
        expect(answers(page).first.locator(".tokens span").nth(1)).to_be_focused()
        expect(tip).to_be_visible()
        page.keyboard.press("Escape")
        expect(tip).to_be_hidden()


def test_the_slider_sets_the_strength_of_the_next_request(device: Device, browser: Browser) -> None:
    with opened(browser, device.url) as page:
        expect(page.locator("#shown")).to_have_text("1.783")
        expect(page.locator("#reset")).to_be_disabled()
        page.locator("#strength").fill("0.5")
        expect(page.locator("#shown")).to_have_text("0.500")
        expect(page.locator("#reset")).to_be_enabled()
        wait_until(lambda: device.state()["strength"] == 0.5, device.edge, 10)
        assert device.chat(fusion="edge").costeer["strength"] == 0.5
        expect(answers(page).first.locator(".about")).to_contain_text("at strength 0.500")
        assert device.chat(fusion="edge", strength=2).costeer["strength"] == 2
        page.get_by_role("button", name="T = 1", exact=False).first.click()
        wait_until(lambda: device.state()["strength"] == 0.476, device.edge, 10)
        assert device.chat().costeer["strength"] == 0.476
        page.locator("#strength").press("ArrowRight")
        wait_until(lambda: device.state()["strength"] == 0.49, device.edge, 10)
        page.locator("#reset").click()
        wait_until(lambda: device.state()["strength"] is None, device.edge, 10)
        assert device.chat().costeer["strength"] == pytest.approx(1.783, abs=1e-3)
        expect(page.locator("#shown")).to_have_text("1.783")


@pytest.mark.parametrize(("name", "scheme", "width", "height"), [("local-page", "light", 1280, 1150), ("dark", "dark", 1400, 900),
                                                                ("narrow", "light", 400, 1600)])  # fmt: skip
def test_it_looks_well(device: Device, browser: Browser, tmp_path: Path, name: str, scheme: str, width: int, height: int) -> None:
    folder = Path(os.environ.get("COSTEER_SCREENSHOTS", tmp_path)) if name == "local-page" else tmp_path
    for event in range(3, 8) if name == "local-page" else ():
        device.chat(event, fusion="edge", T=1)
    device.chat(fusion="cloud", T=1)
    answer = device.chat(fusion="edge", T=1)
    with opened(browser, device.url, viewport={"width": width, "height": height}, color_scheme=scheme) as page:
        expect(page.locator("#none")).to_be_hidden()
        hobby = answer.choices[0].message.content.partition("If you enjoy ")[2].split()[0]
        page.locator("details[open] .tokens span", has_text=hobby[:4]).first.hover()
        expect(page.locator("#tip")).to_be_visible()
        expect(page.locator(".preview:empty")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        picture = page.screenshot(path=folder / f"{name}.png")
        assert len(picture) > 20_000


def test_with_a_key_it_asks_for_it_and_when_the_gateway_is_gone_it_says_so(
    deployment: Deployment, browser: Browser, tmp_path: Path
) -> None:
    with (
        gateway(deployment, tmp_path, "other", COSTEER_GATEWAY_KEY=KEY) as device,
        opened(browser, device.url, is_quiet=False) as page,
    ):
        expect(page.get_by_label("The gateway's key")).to_be_focused()
        expect(page.locator("#main")).to_be_hidden()
        for key, is_right in (("wrong", False), (KEY, True)):
            page.get_by_label("The gateway's key").fill(key)
            page.keyboard.press("Enter")
            expect(page.locator("#main") if is_right else page.get_by_text("That is not the gateway's key.")).to_be_visible()
        assert page.evaluate("JSON.stringify([localStorage.length, document.cookie, Object.values(sessionStorage)])") == (
            f'[0,"",["{KEY}"]]'
        )
        expect(page.locator("#none")).to_contain_text(f"{device.url}/v1")
        device.edge.process.terminate()
        expect(page.locator("#notice")).to_contain_text("The gateway does not answer")
        expect(page.locator("#attached")).to_have_text(re.compile("^(Attached$|Not attached: )"))  # as it said last
        assert KEY not in device.edge.log_text
