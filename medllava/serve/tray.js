// Under the viewer: the pictures of the conversation, and regions loaded from a GeoJSON file. Names in such a file are
// untrusted and become text only. Gradio runs this with `element`, `props`, `trigger`, `watch`. Python sets:
//   pictures  thumbnails as data URIs    shown  number of the one in the viewer, or null
//   regions   [{name, colour}, ...] of the shown picture
const find = (selector) => element.querySelector(selector);
const MAX_BYTES = 50e6;

function buttons(box, items, fill) {
  const made = JSON.stringify(items);
  if (box.dataset.made === made) return;
  box.dataset.made = made;
  box.replaceChildren(...items.map((item, number) => {
    const node = document.createElement("button");
    node.type = "button";
    node.dataset.number = number;
    fill(node, item, number);
    return node;
  }));
}

function show() {
  const pictures = find(".pictures");
  buttons(pictures, props.pictures || [], (node, uri, number) => {
    node.setAttribute("aria-label", `Picture ${number + 1}`);
    const image = document.createElement("img");
    image.alt = "";
    image.src = uri;
    node.append(image);
    node.append(Object.assign(document.createElement("span"), { textContent: number + 1 }));
  });
  pictures.hidden = (props.pictures || []).length < 2;
  [...pictures.children].forEach((node, n) => node.setAttribute("aria-pressed", String(n === props.shown)));
  const list = find(".list");
  buttons(list, props.regions || [], (node, region) => {
    const dot = document.createElement("i");
    dot.style.background = region.colour;
    node.append(dot, region.name);
  });
  find(".regions").hidden = props.shown === null || props.shown === undefined;
  list.hidden = find(".forget").hidden = !(props.regions || []).length;
}

find(".pictures").addEventListener("click", (event) => {
  const node = event.target.closest("button");
  if (node) trigger("shown", { number: Number(node.dataset.number) });
});
find(".list").addEventListener("click", (event) => {
  const node = event.target.closest("button");
  if (node) trigger("chosen", { number: Number(node.dataset.number) });
});
find(".forget").addEventListener("click", () => trigger("removed"));
const chooser = find("input");
chooser.addEventListener("change", async () => {
  const file = chooser.files[0];
  chooser.value = "";
  if (!file) return;
  // Only the text is sent, never the file's name.
  if (file.size > MAX_BYTES) trigger("refused", { megabytes: Math.round(file.size / 1e6) });
  else trigger("loaded", { text: await file.text() });
});
watch(["pictures", "shown", "regions"], show);
show();
