"use strict";
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const items = read("items");
  const pictures = read("pictures");
  const labels = read("labels");
  const outcomes = ["right", "wrong", "unclear", "unscored"];
  const size = 24;
  const byId = (id) => document.getElementById(id);
  const state = { outcome: "", group: "", text: "", page: 0 };
  let shown = items;

  for (const item of items) {
    item.search = [item.question, item.answer, item.reference, item.id].join("\n").toLowerCase();
    item.groups = ["kind: " + item.kind];
    for (const [name, value] of Object.entries(item.categories || {})) item.groups.push(name + ": " + value);
    for (const name of item.reply || []) item.groups.push("reply: " + name);
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function outline(svg, box, className) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const sides = { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] };
    for (const [name, value] of Object.entries(sides)) rect.setAttribute(name, value);
    rect.setAttribute("class", className);
    rect.setAttribute("vector-effect", "non-scaling-stroke");
    svg.append(rect);
  }

  function card(item) {
    const made = element("article", "card " + item.outcome);
    made.tabIndex = 0;
    const uri = pictures[item.picture];
    if (uri) {
      const frame = element("div", "picture");
      const image = element("img");
      image.src = uri;
      image.alt = "Picture " + item.picture;
      frame.append(image);
      if (item.box || item.answered) {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        svg.setAttribute("viewBox", "0 0 1 1");
        svg.setAttribute("preserveAspectRatio", "none");
        if (item.box) outline(svg, item.box, "reference");
        if (item.answered) outline(svg, item.answered, "answer");
        frame.append(svg);
      }
      made.append(frame);
    }
    const text = element("div", "text");
    const head = element("div", "tag");
    head.append(element("span", "badge", item.outcome), " " + item.kind + " \u00b7 " + item.id);
    text.append(head, element("div", "asked", item.question), element("div", "said", item.answer || "(empty answer)"));
    const more = ["reference: " + item.reference];
    if (item.reason) more.push(item.reason);
    if (item.sure !== undefined) more.push("probability " + item.sure);
    text.append(element("div", "tag", more.join(" \u00b7 ")));
    if (item.others) {
      const details = element("details");
      details.append(element("summary", "", "without its picture"));
      for (const [condition, answer] of Object.entries(item.others)) {
        const line = element("div", "tag");
        line.append(element("b", "", (labels[condition] || condition) + ": "), answer || "(empty answer)");
        details.append(line);
      }
      text.append(details);
    }
    made.append(text);
    return made;
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(shown.length / size));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const first = state.page * size;
    const cards = byId("cards");
    const within = cards.getBoundingClientRect().top < 0;
    cards.replaceChildren(...shown.slice(first, first + size).map(card));
    if (within) { // a new page is read from its first answer, which the tools above must not hide
      cards.style.scrollMarginTop = document.querySelector(".tools").offsetHeight + "px";
      cards.scrollIntoView();
    }
    byId("count").textContent = shown.length
      ? first + 1 + " to " + Math.min(first + size, shown.length) + " of " + shown.length + " answers"
      : "no answer fits";
    byId("before").disabled = state.page === 0;
    byId("after").disabled = state.page === pages - 1;
  }

  function filter() {
    shown = items.filter(
      (item) =>
        (!state.outcome || item.outcome === state.outcome) &&
        (!state.group || item.groups.includes(state.group)) &&
        (!state.text || item.search.includes(state.text))
    );
    state.page = 0;
    for (const button of byId("outcomes").children) {
      button.setAttribute("aria-pressed", String(button.value === state.outcome));
    }
    draw();
  }

  function turn(pages) {
    state.page += pages;
    draw();
  }

  for (const name of ["", ...outcomes]) {
    const count = name ? items.filter((item) => item.outcome === name).length : items.length;
    if (!count) continue;
    const button = element("button", name, (name || "all") + " " + count);
    button.value = name;
    button.addEventListener("click", () => { state.outcome = name; filter(); });
    byId("outcomes").append(button);
  }
  const groups = [...new Set(items.flatMap((item) => item.groups))].sort();
  for (const group of groups) byId("group").append(new Option(group, group));
  byId("group").addEventListener("change", (event) => { state.group = event.target.value; filter(); });
  byId("search").addEventListener("input", (event) => { state.text = event.target.value.toLowerCase(); filter(); });
  byId("before").addEventListener("click", () => turn(-1));
  byId("after").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") {
        event.preventDefault(); // or the browser would empty the field, and the filter would not know
        event.target.blur();
      }
      return;
    }
    const buttons = [...byId("outcomes").children];
    if (event.key === "ArrowRight") turn(1);
    else if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "/") byId("search").focus();
    else if (/^[0-4]$/.test(event.key) && buttons[event.key]) buttons[event.key].click();
    else return;
    event.preventDefault();
  });
  filter();
})();
