"""The web page: what is served, and what a browser makes of it."""

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser

import httpx2 as httpx
import pytest

from ddit.runtime import Pipeline
from ddit.runtime.serving.static import FILES, POLICY
from served import Served, serving

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PHONE = {"width": 320, "height": 640}
STEPS = "fixed:2x3,8x2,4x3"
LOOKS = ["level level-0"] * 3 + ["level level-2"] * 2 + ["level level-1"] * 3


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


@pytest.fixture(scope="module")
def server(pipeline) -> Iterator[Served]:
    with serving(pipeline) as served:
        yield served


class References(HTMLParser):
    """What a page refers to, and what it has inline."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.fields: set[str] = set()
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href") if values.get(name)]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "label" and "for" in values:
            self.labelled.add(values["for"])
        if tag in ("input", "textarea", "select") and "id" in values:
            self.fields.add(values["id"])
        self.inline += [name for name in values if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in values):
            self.inline.append(tag)


@pytest.fixture(scope="module")
def references() -> References:
    return References((FILES / "index.html").read_text())


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.iterdir()))
def test_files_come_with_their_types_and_the_policy(server, name):
    paths = [f"/page/{name}"] + (["/"] if name == "index.html" else [])
    for path in paths:
        response = httpx.get(server.url + path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(TYPES[FILES.joinpath(name).suffix])
        assert response.headers["content-security-policy"] == POLICY
        assert response.content == (FILES / name).read_bytes()


def test_nothing_inline_that_the_policy_forbids(references):
    assert not references.inline


def test_what_the_page_refers_to_is_there(server, references):
    assert "page/app.js" in references.links
    for link in references.links:
        assert httpx.get(f"{server.url}/{link}").status_code == 200, link
    for script in FILES.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', script.read_text()):
            assert (FILES / name).is_file(), f"{script.name} imports {name}"


def test_scripts_ask_for_elements_that_are_there(references):
    assert len(references.ids) == len(set(references.ids))
    assert set(re.findall(r'\$\("([^"]+)"\)', (FILES / "app.js").read_text())) <= set(references.ids)


def test_every_field_has_a_label(references):
    assert references.fields == references.labelled


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\(", text)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # a container's root has no sandbox; the page under test is our own
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; the test fails at whatever the browser complains of."""
    complaints, contexts = [], []

    def opened(server: Served, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: outside(request.url))

        def outside(url: str) -> None:
            if not url.startswith((server.url, "data:", "blob:")):
                complaints.append(f"asked for {url}")

        page.goto(server.url)
        return page

    opened.complaints = complaints
    yield opened
    for context in contexts:
        context.close()
    assert not complaints


def fill(page, *, schedule: str = STEPS, steps: int = 8, size: tuple[int, int] = (128, 64), seed="7") -> None:
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_label("Width", exact=True).fill(str(size[0]))
    page.get_by_label("Height", exact=True).fill(str(size[1]))
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Seed", exact=True).fill(seed)
    page.get_by_label("Schedule", exact=True).select_option("written")
    page.get_by_label("As --schedule").fill(schedule)


def finished(page, text: str = "Done in") -> None:
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text(text, timeout=20_000)


def cells(page) -> list[str]:
    return page.locator("#strip span").evaluate_all("cells => cells.map((cell) => cell.className)")


def pixels(page, selector: str) -> str:
    """What an image shows, at its own size."""
    return page.locator(selector).evaluate("""image => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return `${canvas.width}x${canvas.height} ${canvas.toDataURL()}`;
    }""")


def test_the_form_knows_what_the_bundle_offers(server, open_page):
    page = open_page(server)
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    page.get_by_text(f"{model['id']}: flux on cpu, levels 2, 4, 8").wait_for()
    assert page.get_by_label("Steps", exact=True).input_value() == str(model["ddit"]["steps"])
    assert page.get_by_label("Width", exact=True).input_value() == str(model["ddit"]["size"]["width"])
    assert page.get_by_label("Width", exact=True).get_attribute("step") == str(
        model["ddit"]["size"]["multiple_of"]["width"]
    )
    assert page.get_by_label("Prompt", exact=True).get_attribute("maxlength") == str(model["ddit"]["limits"]["prompt"])


def test_a_slow_answer_leaves_what_was_typed_before_it(server, open_page):
    page, held = open_page(server), []
    page.route("**/v1/models", lambda route: held.append(route))
    with page.expect_request("**/v1/models"):
        page.reload()
    page.get_by_label("Steps", exact=True).fill("9")
    page.get_by_label("Width", exact=True).fill("64")
    held.pop().continue_()
    page.get_by_text("flux on cpu").wait_for()
    assert page.get_by_label("Steps", exact=True).input_value() == "9"
    assert page.get_by_label("Width", exact=True).input_value() == "64"
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert page.get_by_label("Height", exact=True).input_value() == str(model["ddit"]["size"]["height"])


def test_a_picture_its_steps_and_native_beside_it(server, open_page):
    """By keyboard alone, from the form to the slider."""
    page, bodies = open_page(server), []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    fill(page, seed="")
    page.get_by_role("button", name="Make the picture").press("Enter")
    finished(page)
    assert cells(page) == LOOKS
    summary = "8 of 8 steps: 3 at level 2, 3 at level 4, 2 at level 8"
    assert page.locator("#strip").get_attribute("aria-label") == summary
    assert summary in page.locator("#announcement").text_content()
    assert page.locator("#legend").inner_text().split("\n")[0].strip() == "2 level 2"
    scheduled = pixels(page, "#picture")
    assert scheduled.startswith("128x64 ")
    assert page.locator("#plot circle.filled").count() == 8

    page.get_by_label("where", exact=True).press("Space")
    assert page.locator("#map").is_visible()
    where = page.locator("#map").evaluate("map => map.toDataURL()")
    page.get_by_label("where", exact=True).press("ArrowRight")
    assert page.get_by_label("when", exact=True).is_checked()
    assert page.locator("#map").evaluate("map => map.toDataURL()") != where
    page.get_by_label("off", exact=True).press("Space")
    assert page.locator("#map").is_hidden()

    page.get_by_role("button", name="Compare with native").press("Enter")
    finished(page, "The native steps took")
    assert pixels(page, "#picture") == scheduled, "the first picture stays"
    assert pixels(page, "#native").startswith("128x64 ")
    assert pixels(page, "#native") != scheduled
    assert "seed" not in bodies[0]
    assert bodies[1]["seed"] == int(page.locator("#facts dt:text('Seed') + dd").text_content())
    assert bodies[1]["schedule"] == "native"
    slider = page.get_by_role("slider")
    assert slider.evaluate("slider => slider === document.activeElement")
    clip = page.locator("#native").evaluate("image => getComputedStyle(image).clipPath")
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "51"
    assert slider.get_attribute("aria-valuetext") == "51 % native"
    assert page.locator("#native").evaluate("image => getComputedStyle(image).clipPath") != clip
    page.keyboard.press("End")
    assert slider.input_value() == "100"


def test_the_picture_is_that_of_the_api(server, open_page):
    page = open_page(server)
    fill(page)
    page.get_by_role("button", name="Make the picture").click()
    finished(page)
    body = {"prompt": "a red circle", "size": "128x64", "seed": 7, "steps": 8, "schedule": STEPS}
    options = {"output_format": "webp", "output_compression": 95}
    answer = httpx.post(f"{server.url}/v1/images/generations", json={**body, **options}, timeout=60).json()
    assert page.locator("#picture").get_attribute("src") == f"data:image/webp;base64,{answer['data'][0]['b64_json']}"


def test_the_picture_appears_while_it_is_made(server, open_page):
    page = open_page(server)
    page.locator("#picture").evaluate("""image => {
        window.seen = [];
        const note = () => seen.push(`${image.src.split(";")[0]} ${image.checkVisibility()}`);
        new MutationObserver(note).observe(image, { attributeFilter: ["src"] });
    }""")
    fill(page, schedule="native", steps=30, size=(256, 256))
    page.get_by_role("button", name="Make the picture").click()
    finished(page)
    seen = page.evaluate("seen")
    assert "data:image/jpeg true" in seen, "a preview"
    assert seen.count("data:image/webp true") == 2, "a partial image and the whole one"
    assert seen[-1] == "data:image/webp true"


def test_a_time_instead_of_a_schedule(server, open_page):
    page = open_page(server)
    fill(page)
    page.get_by_label("Schedule", exact=True).select_option("budget")
    assert page.get_by_label("As --schedule").is_hidden()
    page.get_by_label("Seconds").fill("100")
    with page.expect_request("**/v1/images/generations") as asked:
        page.get_by_role("button", name="Make the picture").click()
    finished(page)
    assert asked.value.post_data_json["budget"] == 100
    assert "schedule" not in asked.value.post_data_json


def test_predicted_steps(server, open_page):
    page = open_page(server)
    fill(page, schedule="native+taylorseer:interval=3,first=2", steps=8)
    page.get_by_role("button", name="Make the picture").click()
    finished(page)
    body = {"prompt": "a", "size": "128x64", "steps": 8, "schedule": "native+taylorseer:interval=3,first=2"}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
    predicted = answer["data"][0]["ddit"]["predicted_steps"]
    assert predicted > 0
    assert cells(page).count("predicted") == page.locator("#plot circle.hollow").count() == predicted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(server, open_page, scheme):
    page = open_page(server, viewport=PHONE, color_scheme=scheme, has_touch=True)
    fill(page, schedule="dynamic:warmup=3+adaptive", steps=40)
    page.get_by_role("button", name="Make the picture").tap()
    finished(page)
    page.get_by_role("button", name="Compare with native").tap()
    finished(page, "The native steps took")
    page.get_by_label("where", exact=True).check()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    colours = "body => [getComputedStyle(body).backgroundColor, getComputedStyle(body).color]"
    ground, text = (brightness(colour) for colour in page.locator("body").evaluate(colours))
    assert (ground > text) == (scheme == "light")
    low, high = sorted((ground, text))
    assert (high + 0.05) / (low + 0.05) > 7, "contrast (WCAG AAA)"


def brightness(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 has it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_cancel(server, open_page):
    page = open_page(server)
    fill(page, schedule="native", steps=100, size=(256, 256))
    page.locator("#strip").evaluate("""strip => {
        const atTheFirstStep = () => strip.querySelector(".level") && document.getElementById("cancel").click();
        new MutationObserver(atTheFirstStep).observe(strip, { subtree: true, attributes: true });
    }""")
    page.get_by_role("button", name="Make the picture").click()
    finished(page, "Cancelled.")
    assert cells(page).count("") > 50, "steps that never came"
    assert page.locator("#result").is_hidden()
    assert page.get_by_role("alert").text_content() == ""
    page.reload()
    fill(page)
    page.get_by_role("button", name="Make the picture").click()
    finished(page)


def test_an_error_is_one_line(server, open_page):
    page = open_page(server)
    fill(page)
    page.get_by_role("button", name="Make the picture").click()
    finished(page)
    page.get_by_label("As --schedule").fill("fixed:3x8")
    page.get_by_role("button", name="Make the picture").click()
    alert = page.get_by_role("alert")
    alert.get_by_text("the schedule asks for level 3; the bundle has 2, 4, 8").wait_for()
    forget_refusals(open_page)
    assert page.locator("#picture").is_visible(), "the last picture stays"
    assert cells(page) == LOOKS
    page.get_by_label("As --schedule").fill(STEPS)
    page.get_by_role("button", name="Make the picture").click()
    finished(page)
    assert alert.text_content() == ""


def test_a_key(pipeline, open_page):
    with serving(pipeline, token="secret") as server:
        page = open_page(server)
        field = page.get_by_label("This server asks for a key")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_role("alert").get_by_text("key").wait_for()
        field.fill("secret")
        field.press("Enter")
        field.wait_for(state="hidden")
        forget_refusals(open_page)
        fill(page)
        page.get_by_role("button", name="Make the picture").click()
        finished(page)
        page.reload()
        page.get_by_text("flux on cpu").wait_for()
        assert field.is_hidden(), "kept for the tab"
        assert page.evaluate("localStorage.length") == 0


def forget_refusals(open_page) -> None:
    """Chromium logs a refused request as an error of its own."""
    open_page.complaints[:] = [one for one in open_page.complaints if not one.startswith("Failed to load resource")]
