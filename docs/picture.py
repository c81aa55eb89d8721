"""Write docs/report.png, the picture in README.md, from runs/toy/report.html. Needs Chromium."""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
    page = browser.new_page(viewport={"width": 1200, "height": 1050}, color_scheme="light")
    page.goto((ROOT / "runs/toy/report.html").as_uri() + "#lengths")
    page.screenshot(path=ROOT / "docs/report.png")
