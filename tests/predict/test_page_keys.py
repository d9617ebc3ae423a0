"""The report's scripts in a browser: keys, sorting and filtering, under the page's own policy."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from raybrats.phantom.phantom import make_phantom
from raybrats.predict.evaluate import evaluation_of
from raybrats.predict.page.page import Report, render
from raybrats.predict.page.slices import Shown

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
STEPS = """
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const box = document.querySelector(".slices"), seen = {};
document.addEventListener("securitypolicyviolation", () => (seen.refused = true));
const place = () => document.querySelector(".place").textContent;
const press = (key) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const rows = () => [...document.querySelectorAll("#cases tbody tr")]
  .filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
(async () => {
  for (let n = 0; n < 100 && !place(); n++) await pause(50);
  seen.first = place();
  press("ArrowUp"); seen.up = place();
  press("p"); press("ArrowDown"); seen.coronal = place();
  press("m"); await pause(500); seen.modality = place();
  const canvas = document.querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  seen.colours = [...Array(data.length / 4).keys()]
    .filter((n) => data[4 * n] > data[4 * n + 2] + 120).length;
  seen.rows = rows();
  document.querySelector("#cases thead button").click(); seen.sorted = rows();
  const below = document.getElementById("filter-dice");
  below.value = "0.5"; below.dispatchEvent(new Event("input")); seen.filtered = rows();
  document.title = JSON.stringify(seen);
})();
"""


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome")
def test_keys_sorting_and_filtering(tmp_path):
    image, labels = make_phantom(0, shape=(48, 40, 36))
    images = {"flair": image[0], "t2": image[3]}
    shown = Shown("a", images, (4.0, 4.0, 4.0), labels, {"m": np.roll(labels, 1, 0)})
    rows = [
        {"case_id": case_id, "region": "WT", "dice": dice}
        for case_id, dice in (("a", 0.75), ("b", 0.25), ("c", 1.0))
    ]
    html = render(Report("x", {}, {}, {"m": evaluation_of("brats2023", rows, [])}, [shown]))
    allowed = base64.b64encode(hashlib.sha256(STEPS.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"<script>{STEPS}</script></body>"))
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user")
    command = [BROWSER, *flags, "--virtual-time-budget=20000", "--window-size=1000,3000"]
    ended = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    (title,) = re.findall(r"<title>(.*?)</title>", ended.stdout)
    seen = json.loads(title)
    assert "refused" not in seen
    axial = int(labels.astype(bool).sum(axis=(0, 1)).argmax())
    coronal = int(labels.astype(bool).sum(axis=(0, 2)).argmax())
    assert seen["first"] == f"FLAIR, axial {axial}"
    assert seen["up"] == f"FLAIR, axial {axial + 1}"
    assert seen["coronal"] == f"FLAIR, coronal {coronal - 1}"
    assert seen["modality"] == f"T2, coronal {coronal - 1}"
    assert seen["colours"] > 20  # outlines in vermilion or yellow on a grey image
    assert (seen["rows"], seen["sorted"]) == (["b", "a", "c"], ["a", "b", "c"])
    assert seen["filtered"] == ["b"]
