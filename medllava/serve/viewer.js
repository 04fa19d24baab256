// The picture of the web chat: opens a file, draws it on a canvas, lets a box be drawn or a point be clicked.
// Gradio runs this once with `element`, `props`, `trigger` and `watch`. Python sets the props:
//   src    picture as a data URI ("" for none)      size   [width, height] of the original in pixels
//   boxes  boxes of the last answer, [[x1, y1, x2, y2], ...] in 0..1     colours  their outline colours
// and reads `value`: {box: [x1, y1, x2, y2], point: [x, y] or null} in 0..1 of the original, or null.
const find = (selector) => element.querySelector(selector);
const canvas = find("canvas");
const pen = canvas.getContext("2d");
const stage = find(".stage");
const MAX_BYTES = 150e6;
const POINT_SIDE = props.point_side;

let picture = null; // the decoded image
let view = { scale: 1, x: 0, y: 0 }; // CSS pixels per picture pixel, and where its corner is
let drag = null; // {kind: "box" | "pan", start: [x, y], at: [x, y]} in CSS pixels of the canvas

const clip = (v) => Math.min(Math.max(v, 0), 1);
const fraction = ([x, y]) => [
  clip((x - view.x) / (view.scale * picture.width)),
  clip((y - view.y) / (view.scale * picture.height)),
];
const place = (x, y) => [view.x + x * view.scale * picture.width, view.y + y * view.scale * picture.height];
const written = (box) => "[" + box.map((v) => v.toFixed(2)).join(", ") + "]";

function fit() {
  if (!picture) return;
  const scale = Math.min(stage.clientWidth / picture.width, stage.clientHeight / picture.height);
  view = {
    scale,
    x: (stage.clientWidth - picture.width * scale) / 2,
    y: (stage.clientHeight - picture.height * scale) / 2,
  };
  draw();
}

function outline(box, colour, dashed, label) {
  const [x0, y0] = place(box[0], box[1]);
  const [x1, y1] = place(box[2], box[3]);
  pen.lineWidth = 5;
  pen.setLineDash([]);
  pen.strokeStyle = "rgba(255, 255, 255, 0.85)"; // a light edge keeps the line visible on dark nuclei
  pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  pen.lineWidth = 3;
  pen.setLineDash(dashed ? [9, 5] : []);
  pen.strokeStyle = colour;
  pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  if (label) {
    pen.setLineDash([]);
    pen.font = "600 13px system-ui, sans-serif";
    const width = pen.measureText(label).width + 12;
    const top = y0 - 22 < 0 ? y0 : y0 - 22;
    pen.fillStyle = colour;
    pen.fillRect(x0 - 2, top, width, 22);
    pen.fillStyle = "white";
    pen.fillText(label, x0 + 4, top + 15);
  }
}

function draw() {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [stage.clientWidth, stage.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  if (!picture) return;
  pen.imageSmoothingEnabled = view.scale < 3; // far in, show the pixels as they are
  pen.drawImage(picture, view.x, view.y, picture.width * view.scale, picture.height * view.scale);
  (props.boxes || []).forEach((box, n) => outline(box, props.colours[n % props.colours.length], false, String(n + 1)));
  const region = drag && drag.kind === "box" ? dragged() : props.value;
  if (region) {
    outline(region.box, "#1d1d1f", true);
    if (region.point) {
      const [x, y] = place(...region.point);
      pen.setLineDash([]);
      pen.beginPath();
      pen.arc(x, y, 5, 0, 2 * Math.PI);
      pen.fillStyle = "#1d1d1f";
      pen.fill();
      pen.lineWidth = 2;
      pen.strokeStyle = "white";
      pen.stroke();
    }
  }
}

// The region under the mouse: a box if it was dragged, a small box around the point if it was clicked.
function dragged() {
  const [ax, ay] = drag.start;
  const [bx, by] = drag.at;
  if (Math.hypot(bx - ax, by - ay) < 4) {
    const [x, y] = fraction(drag.start);
    const half = POINT_SIDE / 2;
    return { box: [clip(x - half), clip(y - half), clip(x + half), clip(y + half)], point: [x, y] };
  }
  const [x1, y1] = fraction([Math.min(ax, bx), Math.min(ay, by)]);
  const [x2, y2] = fraction([Math.max(ax, bx), Math.max(ay, by)]);
  return x1 < x2 && y1 < y2 ? { box: [x1, y1, x2, y2], point: null } : null;
}

function mark(region) {
  props.value = region;
  tell();
  draw();
}

function tell() {
  const region = props.value;
  find(".region").textContent = region ? (region.point ? "around the point " : "box ") + written(region.box) : "whole image";
  find(".whole").disabled = !region;
}

const at = (event) => {
  const frame = canvas.getBoundingClientRect();
  return [event.clientX - frame.left, event.clientY - frame.top];
};

canvas.addEventListener("pointerdown", (event) => {
  if (!picture || event.button === 2) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  const kind = event.shiftKey || event.button === 1 ? "pan" : "box";
  drag = { kind, start: at(event), at: at(event), from: { ...view } };
});
canvas.addEventListener("pointermove", (event) => {
  if (!picture) return;
  const [x, y] = fraction(at(event));
  find(".cursor").textContent = `x ${x.toFixed(3)}  y ${y.toFixed(3)}`;
  if (!drag) return;
  drag.at = at(event);
  if (drag.kind === "pan") {
    view.x = drag.from.x + drag.at[0] - drag.start[0];
    view.y = drag.from.y + drag.at[1] - drag.start[1];
  }
  draw();
});
canvas.addEventListener("pointerup", (event) => {
  if (!drag) return;
  drag.at = at(event);
  const region = drag.kind === "box" ? dragged() : props.value;
  drag = null;
  mark(region);
});
canvas.addEventListener("pointercancel", () => { drag = null; draw(); });
canvas.addEventListener("wheel", (event) => {
  if (!picture) return;
  event.preventDefault();
  const [x, y] = at(event);
  const factor = Math.exp(-event.deltaY / 400);
  const least = Math.min(stage.clientWidth / picture.width, stage.clientHeight / picture.height);
  const scale = Math.min(Math.max(view.scale * factor, least), 20);
  if (scale === least) return fit();
  view = { scale, x: x - ((x - view.x) * scale) / view.scale, y: y - ((y - view.y) * scale) / view.scale };
  draw();
}, { passive: false });

find(".whole").addEventListener("click", () => mark(null));
find(".fit").addEventListener("click", fit);

function open(file) {
  if (!file) return;
  if (file.size > MAX_BYTES) {
    trigger("too_large", { megabytes: Math.round(file.size / 1e6) });
    return;
  }
  const reader = new FileReader();
  // Only the bytes are sent, never the file's name.
  reader.onload = () => trigger("opened", { uri: reader.result });
  reader.readAsDataURL(file);
}
const chooser = find("input[type=file]");
chooser.addEventListener("change", () => { open(chooser.files[0]); chooser.value = ""; });
find(".empty").addEventListener("click", () => chooser.click());
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("over"); });
stage.addEventListener("dragleave", () => stage.classList.remove("over"));
stage.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  open(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) open(file);
});

function show() {
  find(".empty").style.display = props.src ? "none" : "";
  find(".size").textContent = props.src ? `${props.size[0]} × ${props.size[1]} px` : "";
  find(".cursor").textContent = "";
  element.querySelectorAll(".needs-picture").forEach((one) => { one.style.visibility = props.src ? "" : "hidden"; });
  tell();
  if (!props.src) {
    picture = null;
    draw();
    return;
  }
  const loading = new Image();
  loading.onload = () => { picture = loading; fit(); canvas.dataset.ready = "yes"; };
  loading.src = props.src;
}
watch("src", show);
watch("boxes", draw);
watch("value", () => { tell(); draw(); });
new ResizeObserver(fit).observe(stage);
show();
