"""The page in headless Chromium: a user reads figures, asks tenants side by side, and loses the server."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace

import pytest

from benchmarks.browser import CHROMIUM, Browser
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.zoo.manifest import EquivalenceRecord
from blockzoo.zoo.sharing_page import sharing_page
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import equivalence_text, human_bytes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: chromium)")
FAST = CompileOptions(verify=False, profile=False)
KEYS = {"alice": "ka", "bob": "kb", "nobody": "kn-é"}
REFUSED = "Failed to load resource: the server responded with a status of 401"
PROMPT = "Let a = 3.\nLet b = a + 5.\nQ: b?\nA:"  # base goes on for as long as it may
ANSWER = "document.querySelector('#answers article:nth-child({}) {}').textContent"


@pytest.fixture(scope="module")
def zoo(demo_family, chat_family, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "small-zoo"
    compile_models({"base": demo_family["base"], "solver": demo_family["solver"]}, path, FAST)
    compile_models({"chat": chat_family["chat"]}, path, FAST)
    return path


@pytest.fixture(scope="module")
def endpoint(serve_openai, zoo, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    keys.write_text(
        f"alice {digests['alice']}\nbob {digests['bob']} models=solver\n"
        f"nobody {digests['nobody']} models=none\n"
    )
    return serve_openai(zoo, "--api-keys", str(keys), "--enable-lora")


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture
def page(browser, endpoint):
    """The page as alice sees it; nothing may have gone wrong in it at the end, nor been asked of others."""
    tab = browser.open(f"{endpoint.served.openai}/")
    give_key(tab, KEYS["alice"])
    yield tab
    assert tab.problems == []
    assert {url for url in tab.requests if not url.startswith((endpoint.served.openai, "data:"))} == set()
    tab.close()


def give_key(tab, key):
    tab.wait_for("!document.getElementById('key-form').hidden")
    tab.type("#key", key)
    tab.press("Enter", 13)
    tab.wait_for("!document.getElementById('main').hidden || document.getElementById('key-said').textContent")


def figure(tab, name):
    return tab.evaluate(f"document.querySelector('[data-f={name}]').textContent")


def choose(tab, *names):
    tab.evaluate(
        "document.querySelectorAll('#choices input').forEach(box => { "
        f"if (box.checked !== {json.dumps(names)}.includes(box.value)) box.click(); }})"
    )


def ask(tab, prompt, max_tokens):
    tab.type("#prompt", prompt)
    tab.type("#max-tokens", str(max_tokens))
    tab.click("#send")


def test_one_prompt_is_answered_by_several_side_by_side(page, endpoint):
    before = endpoint.served.metrics()["blockzoo_generated_tokens_total"]
    choose(page, "chat", "solver")
    ask(page, PROMPT, 40)
    page.wait_for("document.getElementById('asked').textContent === '2 answered'")
    client = endpoint.client.with_options(api_key=KEYS["alice"])
    settings = {"max_tokens": 40, "temperature": 0}
    chat = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": PROMPT}], **settings
    )
    text = client.completions.create(model="solver", prompt=PROMPT, **settings)
    shown = {
        page.evaluate(ANSWER.format(n, "h3")): [
            page.evaluate(ANSWER.format(n, part)) for part in ("pre", ".said", "header .soft")
        ]
        for n in (1, 2)
    }
    assert shown["chat"][0] == chat.choices[0].message.content
    assert shown["solver"][0] == text.choices[0].text
    assert (shown["chat"][2], shown["solver"][2]) == ("chat", "completion")
    for name, usage in (("chat", chat.usage), ("solver", text.usage)):
        assert shown[name][1].startswith("first token ")
        assert f" tokens/s, {usage.completion_tokens} tokens" in shown[name][1]
    sent = {"/v1/chat/completions", "/v1/completions"}
    assert sent <= {url.removeprefix(endpoint.served.openai) for url in page.requests}

    generated = before + 2 * (chat.usage.completion_tokens + text.usage.completion_tokens)
    page.wait_for(f"document.querySelector('[data-f=generated]').textContent === '{generated:,.0f} so far'")
    assert figure(page, "running") == "0"
    assert figure(page, "hits").endswith(" %")
    assert page.evaluate("document.getElementById('spark').getAttribute('d')").startswith("M")


def test_answers_come_piece_by_piece_and_stop(page, endpoint):
    aborted = endpoint.aborted()
    choose(page, "base", "chat")
    ask(page, PROMPT, 8000)
    page.wait_for(f"{ANSWER.format(1, 'pre')}.length > 40 && {ANSWER.format(2, 'pre')}.length > 40")
    assert page.evaluate(
        "[document.getElementById('send').disabled, document.getElementById('stop').disabled]"
    ) == [
        True,
        False,
    ]
    page.wait_for("document.querySelector('[data-f=running]').textContent === '2'")
    page.wait_for("document.querySelector('#map tbody tr:nth-child(1) .busy').textContent === '1'")
    page.wait_for("parseFloat(document.querySelector('[data-f=rate]').textContent) > 0")
    page.wait_for("parseFloat(document.querySelector('[data-f=batch]').textContent) > 1")
    page.click("#stop")
    page.wait_for("document.getElementById('asked').textContent === 'stopped'")
    assert page.evaluate(ANSWER.format(1, ".said")).endswith("tokens/s, stopped")
    endpoint.wait_until_idle()
    assert endpoint.aborted() == aborted + 2


def test_more_tenants_than_connections_take_turns(page):
    """Six connections are all that a browser opens: the figures need one."""
    held = page.evaluate(
        """(async () => {
          let most = 0, now = 0;
          const run = Card.prototype.run;
          Card.prototype.run = async function () {
            most = Math.max(most, ++now);
            await run.apply(this, arguments);
            now -= 1;
          };
          const models = playground.models;
          playground.models = Array.from({length: 12}, () => models[0]);
          playground.chosen = new Set([models[0].name]);
          document.getElementById("prompt").value = "x";
          document.getElementById("max-tokens").value = 8;
          await sendPrompt();
          playground.models = models;
          return [most, document.querySelectorAll("#answers article").length,
                  document.getElementById("asked").textContent];
        })()"""
    )
    assert held == [5, 12, "12 answered"]


def test_what_is_refused_is_said_and_others_answer(page):
    choose(page, "chat", "solver")
    ask(page, "x " * 20_000, 4)
    page.wait_for("document.getElementById('asked').textContent === '0 answered, 2 failed'")
    said = page.evaluate(ANSWER.format(1, ".said"))
    assert "tokens" in said
    assert "400" in page.problems[0]
    page.problems.clear()
    ask(page, "x", 4)
    page.wait_for("document.getElementById('asked').textContent === '2 answered'")


def test_texts_are_texts(page):
    """Whatever a model or a server says, it makes no elements."""
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
    shown = page.evaluate(
        f"""(async () => {{
          const text = {json.dumps(hostile)};
          const card = new Card({{name: text, chat: false}});
          const count = {{began: 0, first: null, last: null, tokens: 0}};
          card.take({{choices: [{{text, finish_reason: null}}]}}, count);
          card.draw(count);
          card.say(text);
          say("well", text);
          document.getElementById("answers").append(card.root);
          const made = card.root.querySelectorAll("img, script").length;
          const title = card.root.querySelector("h3").textContent;
          const state = document.querySelector("#state span").innerHTML;
          return [made, card.box.textContent, card.said.textContent, title, state];
        }})()"""
    )
    escaped = "&lt;img src=x onerror=alert(1)&gt;&lt;script&gt;alert(2)&lt;/script&gt;&amp;amp;"
    assert shown == [0, hostile, hostile, hostile, escaped]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_layout_is_wider_than_its_screen_and_texts_stand_out(page, dark):
    choose(page, "base", "solver")
    ask(page, PROMPT + "x" * 300, 30)
    page.wait_for("document.getElementById('asked').textContent === '2 answered'")
    name = "n" * 128  # the longest
    page.evaluate(
        f"document.querySelectorAll('#title, h3, #choices span, #map .name > span').forEach("
        f"e => {{ e.textContent = '{name}'; }})"
    )
    for width in (320, 390, 768, 1280, 1920):
        page.look(width, 800, dark)
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate("document.documentElement.scrollWidth") == width
    low = page.evaluate(
        """(() => {
          const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
          const light = colour => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map(value => linear(value / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ground = e => {
            const colour = getComputedStyle(e).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" ? ground(e.parentElement) : colour;
          };
          const contrast = e => {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
          };
          const texts = "h1 span, small, a, #state, dt, dd, b, th, p, pre, label, legend, button, summary";
          return [...document.querySelectorAll(texts)].filter(e => contrast(e) < 4.5).map(e => e.outerHTML);
        })()"""
    )
    assert low == []


def test_a_field_and_a_button_have_names(page):
    """As assistive technology sees them."""
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"textbox", "searchbox", "spinbutton", "button", "checkbox", "link", "region"}
    named = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert all(name for _, name in named)
    assert {
        ("textbox", "Prompt"),
        ("spinbutton", "Temperature"),
        ("spinbutton", "Max tokens"),
        ("checkbox", "base"),
        ("region", "Tenants and what they share"),
    } <= set(named)


def test_a_server_that_is_gone_is_told_and_found_again(page):
    page.wait_for("document.getElementById('state').className === 'well'")
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.call("Network.emulateNetworkConditions", offline=True, **offline)
    page.wait_for("document.getElementById('state').className === 'gone'")
    said = page.evaluate("document.querySelector('#state span').textContent")
    assert said.startswith("The server does not answer. Trying again every ")
    page.call("Network.emulateNetworkConditions", offline=False, **offline)
    page.wait_for("document.getElementById('state').className === 'well'")
    assert page.evaluate("document.querySelector('#state span').textContent") == "live"
    assert all("ERR_INTERNET_DISCONNECTED" in problem for problem in page.problems)
    page.problems.clear()


def test_a_page_that_nobody_sees_asks_nothing(page):
    page.wait_for("document.getElementById('state').className === 'well'")
    hide = (
        "Object.defineProperty(document, 'hidden', {{get: () => {}, configurable: true}}); "
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.evaluate(hide.format("true"))
    page.wait_for("live.looking === null")
    count = len(page.requests)
    time.sleep(2.5)
    page.evaluate("1")  # what came is read
    assert len(page.requests) == count
    assert page.evaluate(hide.format("false") + "; live.looking !== null")


def test_keys_are_asked_for_kept_and_forgotten(browser, endpoint):
    tab = browser.open(f"{endpoint.served.openai}/")
    assert not [url for url in tab.requests if "/page/" in url]  # it knows that it needs one
    assert tab.evaluate("document.getElementById('map').textContent") == ""
    give_key(tab, "wrong")
    assert tab.evaluate("document.getElementById('key-said').textContent") == "The API key is not known here."
    give_key(tab, KEYS["bob"])
    names = "[...document.querySelectorAll('#choices input')].map(box => box.value)"
    assert tab.evaluate(names) == ["solver"]
    tab.call("Page.reload")
    tab.wait_for(f"document.readyState === 'complete' && String({names}) === 'solver'")
    assert tab.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"
    tab.click("#forget")
    assert tab.evaluate("[document.getElementById('main').hidden, sessionStorage.length]") == [True, 0]
    give_key(tab, KEYS["nobody"])
    tab.wait_for("document.getElementById('map').textContent === 'There are no models here.'")
    assert tab.evaluate("document.getElementById('send').disabled")
    assert [problem for problem in tab.problems if not problem.startswith(REFUSED)] == []
    tab.close()


def test_a_model_that_is_added_appears_and_goes(page, endpoint, zoo, demo_family):
    names = "[...document.querySelectorAll('#choices input')].map(box => box.value).sort().join()"
    page.wait_for(f"{names} === 'base,chat,solver'")
    choose(page, "solver")
    compile_models({"notes": demo_family["notes"]}, zoo, FAST)
    page.wait_for(f"{names} === 'base,chat,notes,solver'")
    assert page.evaluate("[...playground.chosen]") == ["solver"]
    assert page.evaluate("document.querySelectorAll('#map i.adapter').length") == 12
    choose(page, "notes")
    ask(page, "x", 4)
    page.wait_for("document.getElementById('asked').textContent === '1 answered'")
    compile_models({}, zoo, FAST, remove=["notes"])
    page.wait_for(f"{names} === 'base,chat,solver'")
    assert page.evaluate("[...playground.chosen]") == []


def test_the_map_of_zoo_inspect_is_drawn_by_the_same_script(browser, zoo, tmp_path):
    manifest = Zoo.open(zoo).manifest
    near = EquivalenceRecord({3: "own"}, 0.9, 0.95, 0.01, 0.99, 300, "built-in")
    record = replace(manifest.models["chat"], equivalence=near)
    manifest = replace(manifest, models={**manifest.models, "chat": record})
    (tmp_path / "map.html").write_text(sharing_page(manifest, "zoo & <co>"), "utf-8")
    tab = browser.open((tmp_path / "map.html").as_uri())
    assert tab.evaluate("document.querySelector('h1').firstChild.data") == "zoo & <co>"
    assert tab.evaluate(
        "[...document.querySelectorAll('tbody .name')].map(e => e.textContent).sort()"
    ) == sorted(manifest.models)
    own = sum(manifest.blocks[block_id].num_bytes for block_id in manifest.models["solver"].chain[9:13])
    shared = sum(block.num_bytes for block in manifest.blocks.values()) - 2 * own
    tiles = sum(len(record.chain) for record in manifest.models.values())
    assert tab.evaluate("document.querySelectorAll('i[data-block]').length") == tiles
    assert tab.evaluate("document.querySelectorAll('i.own').length") == 4  # solver's last two layers
    tab.evaluate(
        "document.querySelector('i.own').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    assert tab.evaluate("document.querySelectorAll('i.lit').length") == 1
    said = tab.evaluate("document.querySelector('.pointed').innerText")
    assert said.startswith("attention, layer 4")
    assert said.endswith("only in solver")
    assert tab.evaluate("[...document.querySelectorAll('li')].map(e => e.textContent)") == [
        f"chat {equivalence_text(record)}"
    ]
    tab.click("summary")
    words = "[...document.querySelectorAll('details[open] li')].map(e => e.textContent)"
    assert tab.wait_for(words + ".length && " + words) == [
        f"all models 10 blocks, {human_bytes(shared)}",
        f"base, chat 4 blocks, {human_bytes(own)}",
        f"only solver 4 blocks, {human_bytes(own)}",
    ]
    for width in (320, 1280):
        tab.look(width, 800)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.problems == []
    tab.close()
