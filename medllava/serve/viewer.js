// The picture of the web chat: a photograph or a whole slide in OpenSeadragon, and on top of it a canvas of our own
// with the region that is drawn and the boxes of the answer.
// Gradio runs this once with `element`, `props`, `trigger` and `watch`. Python sets the props:
//   src        "" for none, a picture as a data URI, or the path of a slide's tiles below this server's root
//   tiles      of a slide: {size, overlap} of its deep-zoom tiles; null for a picture
//   picture    number of the picture in the conversation     size   [width, height] of the original in pixels
//   mpp, power micrometres per pixel and objective power of the original; null if not known
//   boxes      what is drawn: [{box: [x1, y1, x2, y2], label, colour, path}]; path, if any, instead of the box's outline
//   point_side side of the box that stands for a clicked point
// and reads `value`: null, or {picture, box, point, path, view}; box (null without a region) and view, which is what is
// visible, are [x1, y1, x2, y2], point is [x, y] or null, path is [[x, y], ...] or null.
// All coordinates are 0..1 of the original, origin top left. The event "medllava-flash" {index} on the document shows
// a box of the answer; "medllava-model" {mpp} tells the micrometres per pixel that the model was trained on, or null.
const find = (selector) => element.querySelector(selector);
const stage = find(".stage");
const marks = find(".marks");
const pen = marks.getContext("2d");
const MAX_BYTES = 150e6;
const SLIDE_FILES = /\.(svs|ndpi|mrxs|scn|bif|vms|vmu|svslide|czi|dcm)$/i;
const MISMATCH = 1.5; // how far the view's scale may be from the model's, as a factor
const INK = "#1d1d1f";
const STEP = 12; // pixels on the screen that an arrow key moves a region

let deep = null; // the OpenSeadragon viewer
let content = null; // {x, y}: size of the opened picture as it is shown
let tool = "box";
let region = null; // what is marked: {box, point, path}
let drag = null; // what is being drawn: {tool, points: [[x, y], ...]} in 0..1
let placing = null; // what is being placed with the keys: {at: [x, y]} or {box} or {path, at}
let fitted = true; // the whole picture is shown, and is to be after a resize
let flash = null; // {index}
let modelMpp = null; // micrometres per pixel that the model was trained on

const root = new URL(window.gradio_config.root || "/", window.location.href).pathname.replace(/\/$/, "");
const clip = (v) => Math.min(Math.max(v, 0), 1);
const tidy = (v) => Number(v.toFixed(6));
const open = () => deep !== null && content !== null;

// From CSS pixels of the stage to 0..1 of the picture, and back.
function fraction([x, y]) {
  const place = deep.viewport.viewerElementToViewportCoordinates(new OpenSeadragon.Point(x, y));
  return [clip(place.x), clip((place.y * content.x) / content.y)];
}
function place(x, y) {
  const pixel = deep.viewport.viewportToViewerElementCoordinates(new OpenSeadragon.Point(x, (y * content.y) / content.x));
  return [pixel.x, pixel.y];
}
function shownPart() {
  const [x1, y1] = fraction([0, 0]);
  const [x2, y2] = fraction([stage.clientWidth, stage.clientHeight]);
  return [x1, y1, x2, y2];
}
// Pixels of the original under one CSS pixel.
const originals = () => props.size[0] / (place(1, 0)[0] - place(0, 0)[0]);

// -- the region

function bounding(points) {
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}
const hasArea = ([x1, y1, x2, y2]) => x1 < x2 && y1 < y2;
const onScreen = ([ax, ay], [bx, by]) => {
  const [a, b] = [place(ax, ay), place(bx, by)];
  return Math.hypot(b[0] - a[0], b[1] - a[1]);
};

// The box that stands for a point: a part of the picture, or of the view where the picture is a whole slide.
function around([x, y]) {
  const [x1, y1, x2, y2] = props.tiles ? shownPart() : [0, 0, 1, 1];
  const [dx, dy] = [((x2 - x1) * props.point_side) / 2, ((y2 - y1) * props.point_side) / 2];
  return { box: [clip(x - dx), clip(y - dy), clip(x + dx), clip(y + dy)], point: [x, y], path: null };
}

// What has been drawn so far; null if it is nothing.
function drawn() {
  const { points } = drag;
  const [first, last] = [points[0], points[points.length - 1]];
  const box = bounding(points);
  if (drag.tool === "point") return around(last);
  if (drag.tool === "box") {
    if (onScreen(first, last) < 4) return around(first);
    return hasArea(box) ? { box, point: null, path: null } : null;
  }
  if (onScreen(box.slice(0, 2), box.slice(2)) < 6) return around(first);
  return points.length > 2 && hasArea(box) ? { box, point: null, path: points } : null;
}

// What the keys have made so far.
function placed() {
  if (tool === "point") return around(placing.at);
  if (tool === "freehand") {
    const path = [...placing.path, placing.at];
    const box = bounding(path);
    return path.length > 2 && hasArea(box) ? { box, point: null, path } : null;
  }
  return { box: placing.box, point: null, path: null };
}

function mark(next) {
  region = next;
  say();
}

// What is marked and visible; null without a picture.
function current() {
  if (!open()) return null;
  const list = (values) => values && values.map(tidy);
  return {
    picture: props.picture || 0,
    box: region && list(region.box),
    point: region && list(region.point),
    path: region && region.path && region.path.map(list),
    view: list(shownPart()),
  };
}
// A question takes this along: the props reach Gradio's own state a moment later, too late for who asks at once.
window.medllavaMarked = current;

// Tell Python what is marked and visible, and the person.
let saying;
function say() {
  clearTimeout(saying);
  const value = current();
  if (!value) return;
  if (JSON.stringify(value) !== JSON.stringify(props.value)) props.value = value;
  describe();
  draw();
}

const length = (um) => (um >= 1000 ? `${(um / 1000).toPrecision(3)} mm` : `${um.toPrecision(3)} µm`);
function written(box) {
  if (!props.tiles) return "[" + box.map((v) => v.toFixed(2)).join(", ") + "]";
  const [width, height] = [(box[2] - box[0]) * props.size[0], (box[3] - box[1]) * props.size[1]];
  const sides = props.mpp ? [width, height].map((v) => length(v * props.mpp)) : [width, height].map((v) => `${Math.round(v)} px`);
  return sides.join(" × ");
}
function describe() {
  const now = placing ? placed() : region;
  const kind = now && (now.point ? "around the point " : now.path ? "freehand, within " : "box ");
  const nothing = placing ? "set more corners" : props.tiles ? "the field shown" : "whole image";
  find(".region").textContent = now ? kind + written(now.box) : nothing;
  find(".whole").disabled = !region;
}

// -- drawing

function outline(box, colour, { dashed = false, label = "", width = 3 } = {}) {
  const [x0, y0] = place(box[0], box[1]);
  const [x1, y1] = place(box[2], box[3]);
  if (width) {
    pen.lineWidth = width + 2;
    pen.strokeStyle = "rgba(255, 255, 255, 0.85)"; // a light edge keeps the line visible on dark nuclei
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    pen.lineWidth = width;
    pen.setLineDash(dashed ? [9, 5] : []);
    pen.strokeStyle = colour;
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    pen.setLineDash([]);
  }
  if (label) {
    pen.font = "600 13px system-ui, sans-serif";
    const wide = pen.measureText(label).width + 12;
    const top = Math.max(y0 - 22, 0) === 0 ? Math.max(y0, 0) : y0 - 22;
    const left = Math.max(x0 - 2, 0);
    pen.fillStyle = colour;
    pen.fillRect(left, top, wide, 22);
    pen.fillStyle = "white";
    pen.fillText(label, left + 6, top + 15);
  }
}

function line(points, closed, ink = INK) {
  pen.beginPath();
  points.forEach(([x, y]) => pen.lineTo(...place(x, y)));
  if (closed) pen.closePath();
  for (const [colour, width] of [["rgba(255, 255, 255, 0.85)", 5], [ink, 3]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.stroke();
  }
}

function dot([x, y]) {
  pen.beginPath();
  pen.arc(...place(x, y), 5, 0, 2 * Math.PI);
  pen.fillStyle = INK;
  pen.fill();
  pen.lineWidth = 2;
  pen.strokeStyle = "white";
  pen.stroke();
}

function draw() {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [stage.clientWidth, stage.clientHeight];
  if (marks.width !== Math.round(width * ratio) || marks.height !== Math.round(height * ratio)) {
    marks.width = Math.round(width * ratio);
    marks.height = Math.round(height * ratio);
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  if (!open()) return;
  (props.boxes || []).forEach(({ box, label, colour, path }, n) => {
    const lit = flash && flash.index === n;
    if (lit) {
      const [[x0, y0], [x1, y1]] = [place(box[0], box[1]), place(box[2], box[3])];
      pen.fillStyle = colour;
      pen.globalAlpha = 0.3;
      pen.fillRect(x0, y0, x1 - x0, y1 - y0);
      pen.globalAlpha = 1;
    }
    if (path) line(path, true, colour);
    outline(box, colour, { label, width: lit ? 6 : path ? 0 : 3 });
  });
  const now = drag ? drawn() : placing ? placed() : region;
  if (now && now.path) {
    outline(now.box, INK, { dashed: true, width: 1 });
    line(now.path, !drag && !placing);
  } else if (now) {
    outline(now.box, INK, { dashed: true });
  } else if (drag) {
    line(drag.points, false);
  }
  if (placing && placing.path) {
    line([...placing.path, placing.at], false);
    dot(placing.at);
  }
  if (now && now.point) dot(now.point);
}

// Scale bar, micrometres per pixel and magnification of what is on the screen.
function measure() {
  if (!open()) return;
  const pixels = originals();
  const per = props.mpp ? props.mpp * pixels : pixels; // µm, or pixels of the original, under one CSS pixel
  const most = 0.3 * stage.clientWidth * per;
  const power = 10 ** Math.floor(Math.log10(most));
  const round = [5, 2, 1].map((n) => n * power).find((n) => n <= most);
  find(".rule").style.width = `${round / per}px`;
  find(".length").textContent = props.mpp ? (round >= 1000 ? `${round / 1000} mm` : `${Number(round.toPrecision(1))} µm`) : `${Number(round.toPrecision(1))} px`;
  const times = props.mpp ? (props.power ? (props.power * props.mpp) / per : 10 / per) : null;
  const zoom = pixels > 1 ? `1 : ${pixels.toPrecision(2)}` : `${(1 / pixels).toPrecision(2)} : 1`;
  find(".zoom").textContent = props.mpp ? `${per.toPrecision(3)} µm/px, ${Number(times.toPrecision(2))}×` : `zoom ${zoom}`;
  const factor = props.mpp && modelMpp ? per / modelMpp : 1;
  const off = factor > MISMATCH || factor < 1 / MISMATCH;
  const warning = find(".mismatch");
  warning.hidden = !off;
  const [many, what] = factor > 1 ? [factor, "coarser"] : [1 / factor, "finer"];
  warning.textContent = off ? `${Number(many.toPrecision(2))} times ${what} than the model's ${modelMpp} µm/px` : "";
  // Far in, show the pixels as they are.
  const smooth = pixels > 1 / 3;
  if (smooth !== deep.imageSmoothing) {
    deep.imageSmoothing = smooth;
    deep.drawer.setImageSmoothingEnabled(smooth);
  }
}

// -- mouse, pen and touch: OpenSeadragon's own events, so that two fingers and the wheel stay with it

const at = (event) => fraction([event.position.x, event.position.y]);
const pans = (event) => tool === "move" || event.originalEvent.shiftKey;

function press(event) {
  if (!open() || pans(event)) return;
  placing = null;
  drag = { tool, points: [at(event)] };
  draw();
}
function follow(event) {
  if (!open()) return;
  if (!drag) {
    if (!pans(event)) event.preventDefaultAction = true; // a finger is left of two, or the press was elsewhere
    else fitted = false;
    return;
  }
  event.preventDefaultAction = true;
  const here = at(event);
  const { points } = drag;
  if (drag.tool !== "freehand") drag.points = [points[0], here];
  else if (onScreen(points[points.length - 1], here) >= 2) points.push(here);
  draw();
}
function release(event) {
  if (!drag) return;
  if (drag.tool !== "freehand") drag.points = [drag.points[0], at(event)];
  const next = drawn();
  drag = null;
  mark(next);
}
function cancel() {
  drag = null;
  fitted = false;
  draw();
}

// -- keys

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function begin() {
  const [x1, y1, x2, y2] = shownPart();
  const middle = [(x1 + x2) / 2, (y1 + y2) / 2];
  if (tool === "point") placing = { at: region && region.point ? region.point : middle };
  else if (tool === "freehand") placing = { path: [], at: middle };
  else if (region && !region.path && !region.point) placing = { box: region.box };
  else {
    const [dx, dy] = [(x2 - x1) / 6, (y2 - y1) / 6];
    placing = { box: [middle[0] - dx, middle[1] - dy, middle[0] + dx, middle[1] + dy] };
  }
}

function shift([dx, dy], sizing) {
  const origin = place(0, 0);
  const unit = place(1, 1);
  const [mx, my] = [(dx * STEP) / (unit[0] - origin[0]), (dy * STEP) / (unit[1] - origin[1])];
  if (placing.at) {
    placing.at = [clip(placing.at[0] + mx), clip(placing.at[1] + my)];
    return;
  }
  const [x1, y1, x2, y2] = placing.box;
  if (sizing) {
    const next = [x1, y1, clip(x2 + mx), clip(y2 + my)];
    if (next[2] - x1 > Math.abs(mx) / 2 && next[3] - y1 > Math.abs(my) / 2) placing.box = next;
    return;
  }
  const [sx, sy] = [Math.min(Math.max(mx, -x1), 1 - x2), Math.min(Math.max(my, -y1), 1 - y2)];
  placing.box = [x1 + sx, y1 + sy, x2 + sx, y2 + sy];
}

function zoom(factor) {
  if (!open()) return;
  fitted = false;
  deep.viewport.zoomBy(factor);
  deep.viewport.applyConstraints();
}
function fit() {
  fitted = true;
  if (open()) deep.viewport.goHome();
}

function key(event) {
  if (!open() || event.ctrlKey || event.altKey || event.metaKey) return;
  const arrow = ARROWS[event.key];
  if (placing && arrow) shift(arrow, event.shiftKey);
  else if (arrow) {
    fitted = false;
    const bounds = deep.viewport.getBounds();
    deep.viewport.panBy(new OpenSeadragon.Point((arrow[0] * bounds.width) / 8, (arrow[1] * bounds.height) / 8));
    deep.viewport.applyConstraints();
  } else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "0") fit();
  else if (event.key === " " && placing && placing.path) placing.path.push(placing.at);
  else if (event.key === "Enter" && !placing && tool !== "move") begin();
  else if (event.key === "Enter" && placing) {
    const next = placed();
    placing = null;
    mark(next);
  } else if (event.key === "Escape" && placing) placing = null;
  else if (event.key === "Escape" && region) mark(null);
  else return;
  event.preventDefault();
  describe();
  draw();
}

// -- the bar

const tools = element.querySelectorAll("[data-tool]");
tools.forEach((button) => button.addEventListener("click", () => {
  tool = button.dataset.tool;
  placing = null;
  tools.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
  stage.classList.toggle("moving", tool === "move");
  draw();
}));
find(".whole").addEventListener("click", () => mark(null));
find(".visible").addEventListener("click", () => open() && mark({ box: shownPart(), point: null, path: null }));
find(".fit").addEventListener("click", fit);
find(".closer").addEventListener("click", () => zoom(1.5));
find(".farther").addEventListener("click", () => zoom(1 / 1.5));

function take(file) {
  if (!file) return;
  if (SLIDE_FILES.test(file.name)) {
    trigger("whole_slide", {});
    return;
  }
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
chooser.addEventListener("change", () => { take(chooser.files[0]); chooser.value = ""; });
find(".empty").addEventListener("click", () => chooser.click());
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("over"); });
stage.addEventListener("dragleave", () => stage.classList.remove("over"));
stage.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) take(file);
});

// A phrase of the answer was clicked: bring its box into view and light it up for a moment.
document.addEventListener("medllava-flash", (event) => {
  const { index } = event.detail;
  const one = (props.boxes || [])[index];
  if (!one || !open()) return;
  const [vx1, vy1, vx2, vy2] = shownPart();
  const [x1, y1, x2, y2] = one.box;
  if (x1 < vx1 || y1 < vy1 || x2 > vx2 || y2 > vy2) {
    const [wide, high] = [x2 - x1, y2 - y1];
    const tall = content.y / content.x;
    fitted = false;
    deep.viewport.fitBounds(new OpenSeadragon.Rect(x1 - wide / 2, (y1 - high / 2) * tall, wide * 2, high * 2 * tall));
  }
  const now = { index };
  flash = now;
  marks.dataset.flash = String(index);
  draw();
  setTimeout(() => {
    if (flash !== now) return;
    flash = null;
    delete marks.dataset.flash;
    draw();
  }, 1600);
});

// -- opening

function start() {
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const gestures = { clickToZoom: false, dblClickToZoom: false, flickEnabled: false, pinchRotate: false };
  deep = OpenSeadragon({
    element: find(".deep"), drawer: "canvas", showNavigationControl: false, keyboardNavEnabled: false,
    animationTime: still ? 0 : 0.3, springStiffness: 9, visibilityRatio: 0.5, minZoomImageRatio: 0.7, maxZoomPixelRatio: 40,
    zoomPerScroll: 1.35, showNavigator: true, navigatorAutoFade: false, navigatorPosition: "TOP_RIGHT",
    navigatorSizeRatio: 0.17, navigatorBackground: "#efecf4", navigatorBorderColor: "#b9b3c4", navigatorDisplayRegionColor: "#54318c",
    gestureSettingsMouse: gestures, gestureSettingsTouch: { ...gestures, pinchToZoom: true }, gestureSettingsPen: gestures,
    gestureSettingsUnknown: gestures,
  });
  deep.canvas.setAttribute("role", "application");
  deep.canvas.setAttribute("aria-label", "Image. Arrows move the view, plus and minus zoom, Enter starts a region.");
  deep.navigator.element.setAttribute("aria-hidden", "true");
  deep.navigator.element.querySelectorAll("[tabindex]").forEach((one) => one.setAttribute("tabindex", "-1"));
  deep.navigator.element.setAttribute("tabindex", "-1");
  deep.canvas.addEventListener("keydown", key);
  deep.canvas.addEventListener("blur", () => { placing = null; describe(); draw(); });
  deep.canvas.addEventListener("pointermove", (event) => {
    if (!open()) return;
    const frame = stage.getBoundingClientRect();
    const [x, y] = fraction([event.clientX - frame.left, event.clientY - frame.top]);
    find(".cursor").textContent = props.tiles
      ? (props.mpp ? `${length(x * props.size[0] * props.mpp)}, ${length(y * props.size[1] * props.mpp)}` : `${Math.round(x * props.size[0])}, ${Math.round(y * props.size[1])} px`)
      : `x ${x.toFixed(3)}  y ${y.toFixed(3)}`;
  });
  deep.addHandler("canvas-press", press);
  deep.addHandler("canvas-drag", follow);
  deep.addHandler("canvas-release", release);
  deep.addHandler("canvas-pinch", cancel);
  deep.addHandler("canvas-scroll", () => { fitted = false; });
  deep.addHandler("open", () => {
    content = deep.world.getItemAt(0).getContentSize();
    fitted = true;
    deep.viewport.goHome(true);
    marks.dataset.ready = "yes";
    moved();
  });
  deep.addHandler("update-viewport", moved);
  deep.addHandler("resize", () => { if (fitted && open()) deep.viewport.goHome(true); });
}

function moved() {
  measure();
  draw();
  clearTimeout(saying);
  saying = setTimeout(say, 100);
}

function show() {
  find(".empty").style.display = props.src ? "none" : "";
  find(".size").textContent = props.src ? `${props.size[0]} × ${props.size[1]} px` : "";
  find(".cursor").textContent = "";
  find(".field").hidden = !props.tiles;
  find(".frame").hidden = Boolean(props.tiles);
  find(".viewer").classList.toggle("none", !props.src);
  delete marks.dataset.ready;
  content = null;
  region = drag = placing = null;
  describe();
  draw();
  if (!deep) return;
  deep.navigator.element.style.display = props.tiles ? "" : "none";
  deep.close();
  if (!props.src) return;
  if (!props.tiles) {
    deep.open({ type: "image", url: props.src });
    return;
  }
  const [width, height] = props.size;
  const { size, overlap } = props.tiles;
  const getTileUrl = (level, x, y) => `${root}/${props.src}/${level}/${x}_${y}.jpg`;
  deep.open({ width, height, tileSize: size, tileOverlap: overlap, getTileUrl });
}

watch("src", show);
watch("boxes", draw);
document.addEventListener("medllava-model", (event) => { modelMpp = event.detail.mpp; measure(); });
watch("value", () => {
  const told = props.value;
  region = told && told.box ? { box: told.box, point: told.point, path: told.path } : null;
  describe();
  draw();
  if (!told || !told.view) say(); // Python has set the region; the view is still to be known
});

const script = document.createElement("script");
script.src = `${root}/medllava/vendor/openseadragon.min.js`;
script.onload = () => { start(); show(); };
script.onerror = () => { find(".empty div").textContent = "The viewer could not be loaded from this server. Reload the page."; };
document.head.append(script);
show();
