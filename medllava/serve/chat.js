// The conversation of the web chat. What people and models wrote is untrusted: it only ever becomes text nodes, never
// markup, so nothing in it runs or loads. Gradio runs this once with `element`, `props`, `trigger`, `watch`. Python sets:
//   exchanges  [{picture, asked, typed, parts: [{text, index, colour}], answer, state, position, note, model, vote,
//              looked}, ...]
//   current    number of the exchange whose places are drawn on the image, or null
//   busy, feedback    an answer is being made; votes are collected      pictures  how many there are
//   flash      {count, index}: flash that place        download  {count, name, type, text or base64}: save that
const find = (selector) => element.querySelector(selector);
const log = find(".log");
const said = find(".unseen");
const rows = []; // {node, json} of each exchange that is shown
let flashed = 0;
let saved = 0;

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(name, text, act, pressed) {
  const node = make("button", "small " + name, text);
  node.type = "button";
  if (pressed !== undefined) node.setAttribute("aria-pressed", String(pressed));
  node.addEventListener("click", act);
  return node;
}

// Bold is the one piece of markdown that answers use; the rest stays as it was written.
function written(node, text) {
  text.split(/\*\*([^*\n]+)\*\*/).forEach((part, n) => {
    if (part) node.append(n % 2 ? make("strong", "", part) : document.createTextNode(part));
  });
}

// Black or white, whichever is easier to read on a colour (WCAG's relative luminance).
function ink(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const v = parseInt(colour.slice(at, at + 2), 16) / 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

function phrase(part, number) {
  const node = make("span", "phrase");
  written(node, part.text);
  node.dataset.number = part.index + 1;
  node.style.setProperty("--colour", part.colour);
  node.style.setProperty("--ink", ink(part.colour));
  node.tabIndex = 0;
  node.setAttribute("role", "button");
  node.title = "Show this place on the image";
  const act = () => {
    if (props.current === number) flash(part.index);
    else trigger("place", { number, index: part.index });
  };
  node.addEventListener("click", act);
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    act();
  });
  return node;
}

function thumb(down) {
  const space = "http://www.w3.org/2000/svg";
  const icon = document.createElementNS(space, "svg");
  icon.setAttribute("viewBox", "0 0 22 20");
  icon.setAttribute("aria-hidden", "true");
  if (down) icon.style.transform = "rotate(180deg)";
  const line = document.createElementNS(space, "path");
  line.setAttribute("d", "M2 9h3v9H2z M7 9l4-8c1.6 0 2.6 1.1 2.2 2.7L12.5 7H19c1.2 0 2 1.1 1.7 2.2l-1.7 7c-.3 1-1 1.8-2.1 1.8H7z");
  icon.append(line);
  return icon;
}

function flash(index) {
  document.dispatchEvent(new CustomEvent("medllava-flash", { detail: { index } }));
}

function back() {
  // The button that was pressed goes away with its exchange: the keyboard goes on where one writes.
  document.querySelector("#question textarea")?.focus();
}

function article(one, number, last) {
  const node = make("article", "exchange");
  node.dataset.state = one.state;
  node.classList.toggle("current", props.current === number && one.parts.some((part) => part.index !== null));
  const user = make("div", "message user", one.asked);
  const tools = make("div", "tools");
  if (one.picture !== null && one.many) tools.append(make("span", "which", `Picture ${one.picture}`));
  tools.append(button("edit", "Edit", () => edit(node, user, one, number)));
  const bot = make("div", "message bot");
  answer(bot, one, number);
  node.append(user, tools, bot);
  if (one.state === "answering") return node;
  const under = make("div", "tools");
  if (one.answer) under.append(button("copy", "Copy", (event) => copy(one.answer, event.currentTarget)));
  if (last) {
    under.append(button("retry", "Retry", () => { trigger("retry"); back(); }));
    under.append(button("undo", "Undo", () => { trigger("undo"); back(); }));
  }
  if (one.answer && one.picture !== null && !one.looked) {
    under.append(button("look", "Where did it look?", () => trigger("look", { number })));
  }
  if (props.feedback && one.answer) {
    for (const [vote, label] of [["up", "Good answer"], ["down", "Bad answer"]]) {
      const rate = button("vote", "", () => trigger("vote", { number, vote }), one.vote === vote);
      rate.setAttribute("aria-label", label);
      rate.title = label;
      rate.append(thumb(vote === "down"));
      under.append(rate);
    }
  }
  if (one.model) under.append(make("span", "which", one.model));
  node.append(under);
  if (one.looked) node.append(looking(one.looked));
  return node;
}

function answer(bot, one, number) {
  bot.replaceChildren();
  bot.classList.toggle("waiting", one.state === "answering");
  for (const part of one.parts) {
    if (part.index === null) written(bot, part.text);
    else bot.append(phrase(part, number));
  }
  if (one.state === "answering" && !one.answer) {
    if (one.position) bot.append(make("em", "", `Waiting: ${one.position === 1 ? "next" : `number ${one.position}`} in line`));
    else bot.append("…");
  }
  if (one.state === "done" && !one.answer) bot.append(make("em", "", "(an empty answer)"));
  if (one.state === "stopped") bot.append(" ", make("em", "", "(stopped)"));
  if (one.note) {
    const note = make("p", "note");
    if (one.state === "failed") note.append(make("strong", "", one.answer ? "Broke off." : "Not answered."), " ");
    note.append(one.note);
    bot.append(note);
  }
}

// Where the model looked; the pictures are the page's own, drawn over what was sent.
function looking({ text, pictures }) {
  const figure = make("figure", "looked");
  figure.append(make("p", "", text));
  pictures.forEach(([caption, uri], n) => {
    const image = make("img");
    image.alt = n ? "Heat map of the attention" : "Heat map over the image";
    image.src = uri;
    const box = n ? make("details") : make("div");
    if (n) box.append(make("summary", "", caption));
    box.append(image);
    figure.append(box);
  });
  return figure;
}

function edit(node, user, one, number) {
  if (node.querySelector("form")) return;
  const form = make("form", "editor");
  const field = make("textarea");
  field.value = one.typed;
  field.rows = 3;
  field.setAttribute("aria-label", "Question " + (number + 1));
  const ask = make("button", "small strong", "Ask again");
  const close = () => { form.remove(); user.hidden = false; node.querySelector(".edit").focus(); };
  form.append(field, make("p", "", "What came after this question is dropped."), ask, button("", "Cancel", close));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.remove();
    user.hidden = false;
    trigger("edit", { number, text: field.value });
    back();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  });
  user.hidden = true;
  user.after(form);
  field.focus();
}

function render() {
  const exchanges = props.exchanges || [];
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const grown = exchanges.length > rows.length;
  find(".hello").hidden = exchanges.length > 0;
  find(".collecting").hidden = !props.feedback;
  find(".copy-all").disabled = exchanges.length === 0;
  find(".new").disabled = exchanges.length === 0 && !props.pictures;
  find(".chat").dataset.busy = props.busy ? "yes" : "no";
  while (rows.length > exchanges.length) rows.pop().node.remove();
  exchanges.forEach((one, number) => {
    const last = number === exchanges.length - 1;
    const rest = JSON.stringify([one.asked, one.state, one.vote, one.many, last, props.current === number, one.looked]);
    const json = rest + JSON.stringify([one.parts, one.note, one.model, one.position]);
    const row = rows[number];
    if (row && row.json === json) return;
    if (row && row.rest === rest && one.state === "answering") {
      answer(row.node.querySelector(".bot"), one, number);
      row.json = json;
      return;
    }
    const node = article(one, number, last);
    if (row) {
      const was = row.node.contains(document.activeElement) ? document.activeElement.className : null;
      row.node.replaceWith(node);
      if (was) node.getElementsByClassName(was)[0]?.focus();
    } else log.append(node);
    if (row && row.state === "answering") tell(one);
    rows[number] = { node, json, rest, state: one.state };
  });
  if (atEnd || grown) log.scrollTop = log.scrollHeight;
  if (props.flash && props.flash.count > flashed) {
    flashed = props.flash.count;
    // The viewer has to open the picture first, if it is another one.
    setTimeout(() => flash(props.flash.index), 250);
  }
}

// Read out once, when it is whole; a live log would be read word by word.
function tell(one) {
  said.textContent = one.state === "failed" ? `Not answered. ${one.note}` : `${one.answer} ${one.note || ""}`;
}

function save() {
  if (!props.download || props.download.count <= saved) return;
  saved = props.download.count;
  const link = document.createElement("a");
  const { text, base64, type } = props.download;
  const content = base64 === undefined ? text : Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = props.download.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Over plain HTTP from another machine there is no clipboard to write to but this way.
    const field = make("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    pressed.focus();
  }
  const before = pressed.textContent;
  pressed.textContent = "Copied";
  setTimeout(() => { pressed.textContent = before; }, 1200);
}

find(".copy-all").addEventListener("click", (event) => {
  const text = props.exchanges.map((one) => `Question: ${one.asked}\nAnswer: ${one.answer || "-"}`).join("\n\n");
  copy(text, event.currentTarget);
});
find(".new").addEventListener("click", () => { trigger("restart"); back(); });
const menu = find(".menu");
menu.querySelectorAll("[data-kind]").forEach((one) => one.addEventListener("click", () => {
  trigger("save", { kind: one.dataset.kind, pictures: find(".with-pictures").checked });
  menu.open = false;
  menu.querySelector("summary").focus();
}));
menu.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  menu.open = false;
  menu.querySelector("summary").focus();
});
document.addEventListener("click", (event) => { if (!menu.contains(event.target)) menu.open = false; });
watch(["exchanges", "current", "busy", "flash", "pictures"], render);
watch("download", save);
render();
