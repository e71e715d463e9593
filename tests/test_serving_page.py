"""The page in a real browser: upload, play, switch, slider, blind test, microphone, errors."""

import io
import shutil

import numpy as np
import pytest
import soundfile
from served import noise, serving

from dac_fast.cli import commands

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
if not CHROMIUM:
    pytest.skip("needs chromium on PATH", allow_module_level=True)
expect = playwright.expect

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]
SLOW = 30_000  # ms


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served():
    with serving(max_requests=4) as served:
        yield served


@pytest.fixture
def tab(browser):
    """A page in which nothing goes wrong unseen, and from which nothing is asked of elsewhere."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    tab = context.new_page()
    errors, addresses = [], []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: addresses.append(request.url))
    yield tab
    context.close()
    assert errors == []
    local = ("http://127.0.0.1:", "blob:", "data:", "file:")
    assert [address for address in addresses if not address.startswith(local)] == []


@pytest.fixture
def opened(tab, served):
    tab.goto(served.url)
    expect(tab.locator("#choose")).to_be_enabled()
    return tab


def sound(seconds=1.0, seed=0, rate=8000):
    """A wav file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, noise(seconds, 1, seed, rate).T, rate, format="WAV")
    return file.getvalue()


def upload(tab, data=None, name="noise.wav"):
    payload = {"name": name, "mimeType": "audio/wav", "buffer": data or sound()}
    tab.locator("#file").set_input_files(payload)


def restored(tab, kbps="12.00 kbit/s"):
    expect(tab.locator("#kbps")).to_have_text(kbps, timeout=SLOW)


def position(tab):
    return tab.evaluate("player.position")


def test_upload_play_switch_and_slider(opened):
    tab = opened
    upload(tab)
    restored(tab)
    expect(tab.locator("#status")).to_have_text("noise.wav, 1.0 s.")
    expect(tab.locator("#ratio")).to_have_text("11 ×")
    expect(tab.locator("#si-sdr")).to_contain_text("dB")
    # Something is drawn, and A is not B.
    pictures = [
        tab.evaluate("(side) => canvases[side].spectrum.toDataURL()", side) for side in "ab"
    ]
    assert pictures[0] != pictures[1]

    tab.keyboard.press("Space")
    expect(tab.locator("#play")).to_have_text("Pause")
    expect(tab.locator("#time")).not_to_contain_text("0.0 of")
    tab.keyboard.press("x")
    expect(tab.locator("#hear-b")).to_have_attribute("aria-pressed", "true")
    expect(tab.locator("#hear-a")).to_have_attribute("aria-pressed", "false")
    assert tab.evaluate("player.running !== null")
    tab.keyboard.press("x")
    expect(tab.locator("#hear-a")).to_have_attribute("aria-pressed", "true")
    tab.locator("#play").click()
    expect(tab.locator("#play")).to_have_text("Play")
    stopped = position(tab)
    tab.wait_for_timeout(100)
    assert position(tab) == stopped
    tab.locator("figure.a .wave").click(position={"x": 1, "y": 5})
    assert position(tab) < 0.05

    # One codebook is 4 kbit/s; by keys, then by the slider.
    tab.locator("body").press("[")
    tab.locator("body").press("[")
    expect(tab.locator("#codebooks-value")).to_contain_text("1 · 4.00 kbit/s")
    restored(tab, "4.00 kbit/s")
    tab.locator("#codebooks").focus()
    tab.keyboard.press("ArrowRight")
    restored(tab, "8.00 kbit/s")
    with tab.expect_download() as download:
        tab.locator("#save").click()
    audio, rate = soundfile.read(download.value.path())
    assert (len(audio), rate) == (8000, 8000)


def test_the_switch_keeps_the_position_and_has_no_gap(opened):
    """Both sides hold the same ramp: wherever one switches, a ramp comes out."""
    heard = opened.evaluate("""async () => {
        const context = new OfflineAudioContext(1, 8000, 8000);
        const ramp = Float32Array.from({ length: 8000 }, (_, i) => i / 8000);
        const buffer = context.createBuffer(1, 8000, 8000);
        buffer.copyToChannel(ramp, 0);
        const resume = context.resume.bind(context);
        context.resume = () => {};
        const player = new Player(context);
        player.set(0, buffer);
        player.set(1, buffer);
        player.play();
        for (const [time, side] of [[0.25, 1], [0.5, 0], [0.53, 1]]) {
            context.suspend(time).then(() => { player.hear(side); resume(); });
        }
        return Array.from((await context.startRendering()).getChannelData(0));
    }""")
    begun = np.flatnonzero(heard)[0]
    steps = np.diff(np.array(heard[begun:]))
    np.testing.assert_allclose(steps, 1 / 8000, atol=2e-6)


def test_the_blind_test(opened):
    tab = opened
    upload(tab)
    restored(tab)
    tab.locator("#abx-start").click()
    expect(tab.locator("#abx-x")).to_have_attribute("aria-pressed", "true")
    # Nothing shows which one it is.
    for place in (".pictures", "#hear-a", "#hear-b"):
        expect(tab.locator(place).first).to_be_hidden()
    tab.keyboard.press("b")
    expect(tab.locator("#abx-b")).to_have_attribute("aria-pressed", "true")
    tab.keyboard.press("x")
    # Eight right answers by someone who knows.
    for _ in range(8):
        tab.keyboard.press("2" if tab.evaluate("test.x") else "1")
    expect(tab.locator("#abx-result")).to_have_text("8 of 8 right, p = 0.004")
    tab.keyboard.press("1" if tab.evaluate("test.x") else "2")
    expect(tab.locator("#abx-result")).to_have_text("8 of 9 right, p = 0.020")
    tab.locator("#abx-stop").click()
    expect(tab.locator("#abx-result")).to_contain_text("You hear a difference.")
    expect(tab.locator("#hear-a")).to_be_visible()
    # X is drawn anew, and is not always the same.
    drawn = tab.evaluate("Array.from({ length: 60 }, () => new BlindTest().x)")
    assert set(drawn) == {0, 1}
    assert tab.evaluate("binomialTail(5, 10)") == pytest.approx(0.623046875)
    assert tab.evaluate("binomialTail(0, 0)") == 1


def test_microphone_recorded_and_live(opened):
    tab = opened
    tab.locator("#record").click()
    expect(tab.locator("#status")).to_contain_text("Recording: 0.", timeout=SLOW)
    expect(tab.locator("#status")).to_contain_text("Recording: 1.", timeout=SLOW)
    tab.locator("#record").click()
    restored(tab)
    expect(tab.locator("#status")).to_contain_text("A recording of 1.")

    tab.locator("#live-start").click()
    expect(tab.locator("#live-latency")).to_contain_text("ms", timeout=SLOW)
    expect(tab.locator("#live-status")).to_have_text("You hear yourself through the codec.")
    shown = int(tab.locator("#live-latency").inner_text().split()[0])
    assert shown >= int(tab.locator("#live-ahead").inner_text().split()[0]) > 0
    tab.locator("#live-start").click()
    expect(tab.locator("#live-start")).to_have_text("Start")


def test_errors_show(tab, served, browser):
    tab.goto(served.url)
    expect(tab.locator("#choose")).to_be_enabled()
    message = tab.locator("#message")
    upload(tab, b"no audio", "letter.txt")
    expect(message).to_have_text("letter.txt is no audio file that this browser can read.")
    # A busy server is asked again, and what it then gives is shown.
    with served.busy():
        upload(tab)
        expect(tab.locator("#busy")).to_be_visible()
    restored(tab)
    expect(message).to_be_hidden()
    served.service.draining = True
    try:
        tab.keyboard.press("[")
        expect(message).to_have_text("the server is ending; try again", timeout=SLOW)
        tab.locator("#live-start").click()
        expect(message).to_contain_text("the server is ending", timeout=SLOW)
        expect(tab.locator("#live-start")).to_have_text("Start")
    finally:
        served.service.draining = False
    tab.context.set_offline(True)
    tab.keyboard.press("[")
    expect(message).to_have_text("The server does not answer.", timeout=SLOW)
    tab.context.set_offline(False)
    tab.keyboard.press("]")
    restored(tab, "8.00 kbit/s")
    expect(message).to_be_hidden()


def test_a_long_file_is_cut(opened):
    upload(opened, sound(61.0))
    expect(opened.locator("#status")).to_have_text("The first 60 s of noise.wav.", timeout=SLOW)


def test_the_token_is_asked_for(tab):
    with serving(token="open sesame") as served:
        tab.goto(served.url)
        expect(tab.locator("#message")).to_have_text("the token is missing or wrong")
        expect(tab.locator("#choose")).to_be_disabled()
        tab.locator("#token").fill("open sesame")
        tab.keyboard.press("Enter")
        expect(tab.locator("#choose")).to_be_enabled()
        upload(tab)
        restored(tab)
        tab.locator("#live-start").click()
        expect(tab.locator("#live-latency")).to_contain_text("ms", timeout=SLOW)


def test_the_reference_lists_the_endpoints(tab, served):
    tab.goto(f"{served.url}/docs")
    expect(tab.locator("h2", has_text="POST /v1/encode")).to_be_visible()
    expect(tab.locator("pre")).to_contain_text("no slot is free")


def test_the_page_as_a_file(tab, tmp_path):
    """`dac-fast evaluate --listen` writes it, and it needs no server."""
    recordings, report = tmp_path / "recordings", tmp_path / "report.html"
    for domain, seed in (("music", 0), ("music", 1), ("</script><script>alert(1)", 2)):
        folder = recordings / domain.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed}.wav").write_bytes(sound(0.4, seed, 44100))
    (recordings / "music" / "broken.wav").write_bytes(b"nothing")
    command = ["evaluate", recordings, "-o", tmp_path / "numbers", "--device", "cpu", "-j", "1"]
    command += ["--codebooks", "1,9", "--no-plot", "--no-visqol", "--listen", report]
    with pytest.raises(SystemExit) as ended:
        commands.app([str(part) for part in command])
    # One file cannot be read, which is said.
    assert ended.value.code == 1
    tab.goto(report.as_uri())
    restored(tab, "7.88 kbit/s")
    expect(tab.locator("#model")).to_have_text("tiny")
    for place in ("#live", "#input"):
        expect(tab.locator(place)).to_be_hidden()
    expect(tab.locator("#mel-distance")).not_to_have_text("–")
    tab.keyboard.press("Space")
    expect(tab.locator("#play")).to_have_text("Pause")
    # One of each domain before the second of any.
    names = tab.locator("#clip option").all_inner_texts()
    assert [name.split("/")[0] for name in names] == ["<_script><script>alert(1)", "music", "music"]
    tab.locator("#clip").select_option(index=1)
    restored(tab, "7.88 kbit/s")
    tab.locator("body").press("[")
    restored(tab, "0.88 kbit/s")
