// NiiVue for the case whose button is pressed; without its bundle in the page there is no button.
let niivueLoaded;

async function loadNiivue() {
  const script = document.createElement("script"); // its hash is in the page's policy
  script.textContent = new TextDecoder().decode(await unzipped(document.getElementById("niivue").textContent));
  document.head.append(script);
  return window.niivue;
}

// A NIfTI-1 file of 8-bit voxels on LPS axes.
function nifti(bytes, { shape, spacing }) {
  const buffer = new ArrayBuffer(352 + bytes.length), header = new DataView(buffer);
  header.setInt32(0, 348, true);
  [3, ...shape, 1, 1, 1, 1].forEach((n, at) => header.setInt16(40 + 2 * at, n, true));
  header.setInt16(70, 2, true); // uint8
  header.setInt16(72, 8, true);
  [1, ...spacing].forEach((mm, at) => header.setFloat32(76 + 4 * at, mm, true));
  header.setFloat32(108, 352, true);
  header.setFloat32(112, 1, true);
  header.setUint8(123, 2); // mm
  header.setInt16(254, 1, true); // the affine below counts
  [-spacing[0], -spacing[1], spacing[2]].forEach((mm, axis) => header.setFloat32(280 + 20 * axis, mm, true));
  [[shape[0] - 1, spacing[0]], [shape[1] - 1, spacing[1]]].forEach(([last, mm], axis) =>
    header.setFloat32(292 + 16 * axis, last * mm, true));
  header.setUint32(344, 0x00312b6e, true); // n+1
  new Uint8Array(buffer).set(bytes, 352);
  return buffer;
}

function colourMap(colours) {
  const rgb = colours.map(([, colour]) => [1, 3, 5].map((n) => parseInt(colour.slice(n, n + 2), 16)));
  const channel = (n) => [0, ...rgb.map((colour) => colour[n])];
  const labels = ["background", ...colours.map(([name]) => name)];
  return { R: channel(0), G: channel(1), B: channel(2), A: labels.map((_, n) => (n ? 255 : 0)), I: labels.map((_, n) => n), labels };
}

async function openViewer(shown) {
  const { Niivue } = await (niivueLoaded ??= loadNiivue());
  await shown.load();
  const box = shown.section.querySelector(".niivue");
  const canvas = box.appendChild(document.createElement("canvas"));
  canvas.tabIndex = 0;
  canvas.ariaLabel = "Planes and volume, shown by NiiVue";
  const viewer = new Niivue({
    backColor: [0, 0, 0, 1],
    crosshairColor: [1, 1, 1, 0.5],
    crosshairWidth: 0.5,
    crosshairWidthUnit: "percent",
    dragAndDropEnabled: false,
    isRadiologicalConvention: true,
    loadingText: "",
    logLevel: "error",
    multiplanarLayout: 3, // in a row
    multiplanarShowRender: 1, // always
    sagittalNoseLeft: true,
  });
  await viewer.attachToCanvas(canvas);
  const overlays = shown.section.querySelector(".viewer-labels"), opacity = shown.section.querySelector(".viewer-opacity");
  const names = Object.keys(shown.case.images);
  for (const name of names) await viewer.loadFromArrayBuffer(nifti(await shown.image(name), shown.case), `${name}.nii`);
  const told = [...shown.labels, shown.reference].filter(Boolean);
  for (const labels of told) {
    await viewer.loadFromArrayBuffer(nifti(labels, shown.case), "labels.nii");
    viewer.volumes.at(-1).setColormapLabel(colourMap(shown.case.colours));
  }
  const show = () => {
    names.forEach((name, n) => viewer.setOpacity(n, name === shown.modality.value ? 1 : 0));
    told.forEach((_, n) => viewer.setOpacity(names.length + n, n === overlays.selectedIndex ? Number(opacity.value) : 0));
    viewer.updateGLVolume();
  };
  for (const control of [overlays, opacity, shown.modality]) control.addEventListener("input", show);
  viewer.setSliceType(viewer.sliceTypeMultiplanar);
  const [x, y, z] = shown.at.map((index, axis) => (index + 0.5) / shown.case.shape[axis]);
  viewer.scene.crosshairPos = [1 - x, 1 - y, z]; // NiiVue's axes are RAS
  show();
}

for (const shown of shownCases) {
  const button = shown.section.querySelector(".open-viewer");
  button?.addEventListener("click", () => {
    for (const part of shown.section.querySelectorAll(".viewer-controls, .niivue")) part.hidden = false;
    button.hidden = true;
    openViewer(shown).catch((error) => {
      shown.section.querySelector(".niivue").textContent = `The viewer cannot be shown here: ${error.message}`;
    });
  });
}
