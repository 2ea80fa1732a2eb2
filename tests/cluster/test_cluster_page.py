"""What a person sees: the MLflow UI of a real server in a real browser, after a real run."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from helpers import tiny_config, write_shards
from mlflow_server import Server

pytestmark = pytest.mark.cluster

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120  # seconds; the UI is some MB of JavaScript, and machines are slow


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """The address of a finished run's page, and what the run left."""
    folder = tmp_path_factory.mktemp("page")
    server = Server(folder)
    server.start()
    try:
        write_shards(folder / "data", n=100)
        config = tiny_config(folder, tracking={"uri": server.endpoint, "log_every": 1})
        (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "eiwtrain.run", "tiny.yaml"]
        subprocess.run(command, cwd=folder, check=True, timeout=300, stdout=subprocess.DEVNULL)
        summary = json.loads((folder / "runs" / "tiny" / "summary.json").read_text())
        yield f"{server.endpoint}/#/experiments/1/runs/{summary['mlflow_run_id']}", summary
    finally:
        server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs a browser: apt install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--window-size=1600,6000",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def open_page(browser, url):
    browser.get("about:blank")  # the UI's addresses differ in their fragment alone, which loads nothing
    browser.get(url + "?workflowType=machine_learning")


def wait_for(browser, script, what, meanwhile=lambda: None):
    """What the JavaScript expression gives, once it is neither null nor false nor empty."""
    end = time.monotonic() + PATIENCE
    while not (found := browser.execute_script(f"return {script}")):
        text = browser.execute_script("return document.body.innerText")
        assert time.monotonic() < end, f"no {what} in the page:\n{text}"
        meanwhile()
        time.sleep(0.25)
    return found


def to_an_image(browser):
    """Move each slider that is at step 0, where the UI begins, to the first step with an image."""
    for thumb in browser.find_elements("css selector", "[role=slider][aria-valuenow='0']"):
        thumb.send_keys("\ue014")  # the right arrow


def wait_for_text(browser, *texts):
    for text in texts:
        wait_for(browser, f"document.body.innerText.includes({json.dumps(text)})", repr(text))


def screenshot(browser, name):
    """Kept where EIWTRAIN_SCREENSHOTS says, for the docs."""
    if folder := os.environ.get("EIWTRAIN_SCREENSHOTS"):
        browser.save_screenshot(f"{folder}/{name}.png")


def test_the_page_of_a_run_shows_what_it_is_and_how_it_ended(browser, run_page):
    url, _ = run_page
    open_page(browser, url)
    wait_for_text(browser, "tiny", "Finished", "train.global_batch", "eval/bits_per_dim")
    screenshot(browser, "overview")


def test_charts_have_the_curves_in_groups_and_images_under_their_steps(browser, run_page):
    url, _ = run_page
    open_page(browser, f"{url}/model-metrics")
    wait_for_text(browser, "eval\n(", "flow\n(", "time\n(", "train\n(", "(train/bits_per_dim)", "(eval/bits_per_dim)")
    drawn = "document.querySelectorAll('.js-plotly-plot .trace').length > 10"
    wait_for(browser, drawn, "drawn curves")
    image = "[...document.images].find(i => i.src.includes('samples') && i.complete && i.naturalWidth > 100)?.src"
    source = wait_for(browser, image, "image of samples", meanwhile=lambda: to_an_image(browser))
    assert "step%2B6%2B" in source
    screenshot(browser, "charts")
