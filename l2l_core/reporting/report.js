// Shows the cases that fit the form. The form's state is kept in the address, so that a filtered view can be linked:
// #kind=wrong-object&split=val&style=short&size=small&text=red

const form = document.getElementById("filter");
const cases = [...document.querySelectorAll(".case")];

function conditions() {
  return [...new FormData(form)].filter(([, value]) => value.trim());
}

function fits(element, name, value) {
  if (name !== "text") return element.dataset[name] === value;
  return element.querySelector(".sentence").textContent.toLowerCase().includes(value.trim().toLowerCase());
}

function clear() {
  for (const field of form.elements) field.value = "";
}

function show() {
  const wanted = conditions();
  for (const element of cases) element.hidden = !wanted.every(([name, value]) => fits(element, name, value));
  for (const gallery of document.querySelectorAll(".gallery")) {
    const count = gallery.querySelectorAll(".case:not([hidden])").length;
    gallery.hidden = wanted.length > 0 && count === 0;
    for (const element of gallery.querySelectorAll(".count")) element.textContent = count;
  }
  const count = cases.filter((element) => !element.hidden).length;
  document.getElementById("shown").textContent = `${count} of ${cases.length} cases shown`;
}

function write() {
  history.replaceState(null, "", "#" + (new URLSearchParams(conditions()).toString() || "cases"));
}

function read() {
  const address = location.hash.slice(1);
  const isFilter = address.includes("=");
  const part = isFilter ? form : document.getElementById(address);
  // An address that names a part of the page leaves the filter alone, unless the filter hides that part.
  if (isFilter || part?.closest("[hidden]")) clear();
  for (const [name, value] of isFilter ? new URLSearchParams(address) : []) {
    const field = form.elements.namedItem(name);
    if (field) field.value = value;
    if (field?.selectedIndex === -1) field.value = ""; // not one of the choices
  }
  show();
  part?.scrollIntoView();
}

form.hidden = false;
form.addEventListener("input", show);
form.addEventListener("change", write); // and not at every letter: browsers limit how often an address changes
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("clear").addEventListener("click", () => { clear(); show(); write(); });
addEventListener("hashchange", read);
read();
