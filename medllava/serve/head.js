// The line on top: name, caution, and how the chosen model is. Gradio runs this with `element`, `props`, `trigger`,
// `watch`. Python sets:  choices  [[value, label], ...]    value  the chosen one    status, model, detail  how it is
//   mpp  micrometres per pixel of the model's training pictures, or null; told on as the event "medllava-model" {mpp}
const find = (selector) => element.querySelector(selector);
const select = find("select");
let picked = null; // by the person: stays while it is there, also against an answer to an older question

function show() {
  const choices = props.choices || [];
  const labels = JSON.stringify(choices);
  if (select.dataset.labels !== labels) {
    select.dataset.labels = labels;
    select.replaceChildren(...choices.map(([value, label]) => new Option(label, value)));
  }
  if (picked !== null && picked !== props.value) {
    if (choices.some(([value]) => value === picked)) props.value = picked;
    else picked = null;
  }
  select.value = props.value;
  find(".model").hidden = choices.length < 2;
  find("b").hidden = choices.length > 1;
  find("b").textContent = props.model || "";
  find(".detail").textContent = props.detail || "";
  find(".dot").className = "dot " + (props.status || "");
  find(".caution").textContent = props.feedback
    ? "Research only, not for diagnosis. Your votes are collected; nothing else is stored."
    : "Research only, not for diagnosis. Nothing you open or ask is stored.";
}
select.addEventListener("change", () => {
  picked = props.value = select.value;
});
// Straight to the viewer, not through Python: an update from there every two seconds would meet what is just being drawn.
watch("mpp", () => document.dispatchEvent(new CustomEvent("medllava-model", { detail: { mpp: props.mpp } })));
watch(["choices", "value", "status", "model", "detail"], show);
show();
