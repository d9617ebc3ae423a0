// Slices of the shown cases: three planes through one voxel, for each model, with outlines.
// Axes are LPS: i runs to the patient's left, j to posterior, k to superior.
const PLANES = {
  axial: { axis: 2, across: 0, down: 1, flipped: false, ends: "RLAP" },
  coronal: { axis: 1, across: 0, down: 2, flipped: true, ends: "RLSI" },
  sagittal: { axis: 0, across: 1, down: 2, flipped: true, ends: "APSI" },
};

async function unzipped(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The voxels (i fastest) of a mosaic of axial slices.
async function voxels(picture, [ni, nj, nk], columns) {
  const image = new Image();
  image.src = picture;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  const found = new Uint8Array(ni * nj * nk);
  for (let k = 0, n = 0; k < nk; k++) {
    const left = (k % columns) * ni, top = Math.floor(k / columns) * nj;
    for (let j = 0; j < nj; j++)
      for (let i = 0; i < ni; i++) found[n++] = data[4 * ((top + j) * image.width + left + i)];
  }
  return found;
}

// A slice of a volume as it is displayed: rows downwards, in radiological convention.
function slice(volume, shape, plane, index) {
  const { axis, across, down, flipped } = PLANES[plane];
  const strides = [1, shape[0], shape[0] * shape[1]];
  const [width, height] = [shape[across], shape[down]];
  const pixels = new Uint8Array(width * height);
  for (let y = 0, n = 0; y < height; y++) {
    const start = index * strides[axis] + (flipped ? height - 1 - y : y) * strides[down];
    for (let x = 0; x < width; x++) pixels[n++] = volume[start + x * strides[across]];
  }
  return { pixels, width, height };
}

function drawGrey(context, { pixels, width, height }, area) {
  const small = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  pixels.forEach((grey, n) => image.data.set([grey, grey, grey, 255], 4 * n));
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, area.x, area.y, area.width, area.height);
}

// Lines along the edges of the voxels of one label, a little inside; `part` of each edge.
function outline(context, { pixels, width, height }, area, label, part) {
  const sx = area.width / width, sy = area.height / height, inset = 0.1, gap = (1 - part) / 2;
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height && pixels[y * width + x] === label;
  const line = (x0, y0, x1, y1) => {
    context.moveTo(area.x + x0 * sx, area.y + y0 * sy);
    context.lineTo(area.x + x1 * sx, area.y + y1 * sy);
  };
  context.beginPath();
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      if (!at(x, y)) continue;
      if (!at(x, y - 1)) line(x + gap, y + inset, x + 1 - gap, y + inset);
      if (!at(x, y + 1)) line(x + gap, y + 1 - inset, x + 1 - gap, y + 1 - inset);
      if (!at(x - 1, y)) line(x + inset, y + gap, x + inset, y + 1 - gap);
      if (!at(x + 1, y)) line(x + 1 - inset, y + gap, x + 1 - inset, y + 1 - gap);
    }
  context.stroke();
}

function drawMarks(context, { ends }, [width, height], pixelsPerMm, unit) {
  context.fillStyle = context.strokeStyle = "#c9d1d9";
  context.font = `600 ${11 * unit}px system-ui, sans-serif`;
  const letters = [[5, height / unit / 2, "left"], [width / unit - 5, height / unit / 2, "right"],
    [width / unit / 2, 14, "center"], [width / unit / 2, height / unit - 6, "center"]];
  letters.forEach(([x, y, align], n) => {
    context.textAlign = align;
    context.fillText(ends[n], x * unit, y * unit);
  });
  context.lineWidth = 1.5 * unit;
  context.strokeRect(width - 8 * unit - 50 * pixelsPerMm, height - 8 * unit, 50 * pixelsPerMm, 0); // 50 mm
}

class Slices {
  constructor(section) {
    this.section = section;
    this.box = section.querySelector(".slices");
    this.case = JSON.parse(section.querySelector("script").textContent);
    this.at = this.case.at;
    this.plane = "axial";
    this.outlined = true;
    this.modality = section.querySelector("select");
    this.canvases = [...section.querySelectorAll(".planes canvas")];
    this.sliders = [...section.querySelectorAll(".sliders input")];
    this.volumes = {};
    const extent = this.case.shape.map((n, axis) => n * this.case.spacing[axis]);
    this.sides = [Math.max(extent[0], extent[1]) + 12, Math.max(extent[1], extent[2]) + 20]; // mm
    for (const canvas of this.canvases) canvas.style.aspectRatio = this.sides.join(" / ");
    this.listen();
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      this.load().then(() => this.draw());
      new ResizeObserver(() => this.draw()).observe(this.box);
    }, { rootMargin: "400px" }).observe(this.box);
  }

  async load() {
    const told = [...this.case.models.map((model) => model.labels), this.case.reference];
    this.labels = await Promise.all(told.map((labels) => labels && unzipped(labels)));
    this.reference = this.labels.pop();
    await this.image();
  }

  async image(name = this.modality.value) {
    this.volumes[name] ??= await voxels(this.case.images[name], this.case.shape, this.case.columns);
    return this.volumes[name];
  }

  listen() {
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.modality.addEventListener("change", () => this.image().then(() => this.draw()));
    for (const slider of this.sliders)
      slider.addEventListener("input", () => {
        this.plane = slider.dataset.plane;
        this.go((slider.value - this.case.start[PLANES[this.plane].axis]) / this.case.step);
      });
    for (const canvas of this.canvases) {
      canvas.addEventListener("click", (event) => this.point(canvas, event));
      canvas.addEventListener("wheel", (event) => {
        if (!this.box.contains(document.activeElement)) return; // the page scrolls
        event.preventDefault();
        this.plane = canvas.dataset.plane;
        this.step(Math.sign(event.deltaY));
      }, { passive: false });
    }
    for (const id of ["show-prediction", "show-reference"])
      document.getElementById(id).addEventListener("change", () => this.draw());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const slid = event.target.matches("select, input");
    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
    if (event.key in steps && !slid) this.step(steps[event.key]);
    else if (event.key === "p") this.plane = Object.keys(PLANES)[(Object.keys(PLANES).indexOf(this.plane) + 1) % 3];
    else if (event.key === "m") {
      this.modality.selectedIndex = (this.modality.selectedIndex + 1) % this.modality.length;
      this.image().then(() => this.draw());
    } else if (event.key === "o") this.outlined = !this.outlined;
    else return;
    event.preventDefault();
    this.draw();
  }

  step(by) {
    this.go(this.at[PLANES[this.plane].axis] + by);
  }

  go(index) {
    const { axis } = PLANES[this.plane];
    this.at[axis] = Math.min(Math.max(Math.round(index), 0), this.case.shape[axis] - 1);
    this.draw();
  }

  // The other two planes go through the voxel that was clicked.
  point(canvas, event) {
    this.plane = canvas.dataset.plane;
    this.box.focus({ preventScroll: true });
    const { across, down, flipped } = PLANES[this.plane];
    const area = this.area(canvas, this.plane);
    const scale = canvas.width / canvas.clientWidth;
    const x = Math.floor((event.offsetX * scale - area.x) / area.width * this.case.shape[across]);
    const y = Math.floor((event.offsetY * scale - area.y) / area.height * this.case.shape[down]);
    const inside = (n, axis) => Math.min(Math.max(n, 0), this.case.shape[axis] - 1);
    this.at[across] = inside(x, across);
    this.at[down] = inside(flipped ? this.case.shape[down] - 1 - y : y, down);
    this.draw();
  }

  // Where a slice lies on its canvas, in the canvas' pixels; all planes have one scale.
  area(canvas, plane) {
    const { across, down } = PLANES[plane], perMm = canvas.width / this.sides[0];
    const width = this.case.shape[across] * this.case.spacing[across] * perMm;
    const height = this.case.shape[down] * this.case.spacing[down] * perMm;
    return { x: (canvas.width - width) / 2, y: (canvas.height - height) / 2, width, height, perMm };
  }

  draw() {
    const volume = this.volumes[this.modality.value];
    if (!this.labels || !volume) return;
    for (const canvas of this.canvases) this.drawPlane(canvas, volume);
    for (const slider of this.sliders) {
      slider.value = this.index(slider.dataset.plane);
      slider.parentNode.querySelector("output").textContent = slider.value;
    }
    const place = `${this.modality.selectedOptions[0].text}, ${this.plane} ${this.index(this.plane)}`;
    this.section.querySelector(".place").textContent = place;
  }

  // Index in the uncropped volume of the slice that is shown.
  index(plane) {
    const { axis } = PLANES[plane];
    return this.case.start[axis] + this.at[axis] * this.case.step;
  }

  drawPlane(canvas, volume) {
    const plane = canvas.dataset.plane, index = this.at[PLANES[plane].axis];
    const unit = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * unit);
    canvas.height = Math.round(canvas.width * this.sides[1] / this.sides[0]);
    canvas.classList.toggle("active", plane === this.plane);
    const context = canvas.getContext("2d"), area = this.area(canvas, plane);
    drawGrey(context, slice(volume, this.case.shape, plane, index), area);
    const shown = (id) => this.outlined && document.getElementById(id).checked;
    if (shown("show-prediction")) {
      const labels = slice(this.labels[canvas.dataset.model], this.case.shape, plane, index);
      context.lineWidth = 1.6 * unit;
      for (const label of this.case.order) {
        context.strokeStyle = this.case.colours[label - 1][1];
        outline(context, labels, area, label, 1);
      }
    }
    if (this.reference && shown("show-reference")) {
      const labels = slice(this.reference, this.case.shape, plane, index);
      for (const [style, width] of [["#000a", 2.6], ["#fff", 1.3]]) {
        context.strokeStyle = style;
        context.lineWidth = width * unit;
        for (const label of this.case.order) outline(context, labels, area, label, 0.45);
      }
    }
    drawMarks(context, PLANES[plane], [canvas.width, canvas.height], area.perMm, unit);
  }
}

const shownCases = [...document.querySelectorAll("section.case")].map((section) => new Slices(section));
