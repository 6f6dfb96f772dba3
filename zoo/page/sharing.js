"use strict";

/* An element with properties and children; texts become text nodes. */
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const MOST_ROWS = 200;   // drawn without being asked
const MOST_NAMES = 8;    // of one set of models

/* The names of a set of models in words. */
function modelNames(data, group) {
  const found = group.models.map(number => data.models[number].name);
  if (found.length === data.models.length && found.length > 1) return "all models";
  const more = found.length - MOST_NAMES;
  return more > 1 ? `${found.slice(0, MOST_NAMES).join(", ")} and ${more} more` : found.join(", ");
}

/* Draw what `sharing_data` gives into an element. Returns {busy}: by model, an element beside its name. */
function drawSharing(root, data) {
  root.classList.add("sharing");
  root.replaceChildren();
  const busy = new Map();
  if (!data.models.length) {
    root.append(element("p", {}, "There are no models here."));
    return {busy};
  }
  const bar = element("div");
  bar.style.width = `${100 * data.stored_share}%`;
  const map = element("div", {className: "map", tabIndex: 0, role: "region", ariaLabel: "Map of shared blocks"});
  const pointed = element("p", {className: "pointed"});
  root.append(element("p", {className: "said"}, data.said), element("div", {className: "stored"}, bar), map, pointed);
  drawTable(map, data, MOST_ROWS, busy);
  if (data.models.length > MOST_ROWS) {
    const all = element("button", {type: "button"}, `Draw all ${data.models.length} models`);
    all.onclick = () => { all.remove(); drawTable(map, data, Infinity, busy); };
    root.append(all);
  }
  pointAtBlocks(map, pointed, data);
  const replaced = data.models.filter(model => model.replaced);
  if (replaced.length) root.append(element("ul", {}, ...replaced.map(model => aboutModel(model, model.replaced))));
  root.append(folded("Who shares what, in words", () => groupsInWords(data)));
  root.append(folded("How the models were checked",
    () => data.models.map(model => aboutModel(model, model.about.join("; ")))));
  return {busy};
}

function aboutModel(model, text) {
  return element("li", {}, element("b", {}, model.name), ` ${text}`);
}

/* A list that is made when it is opened. */
function folded(title, lines) {
  const list = element("ul"), made = element("details", {}, element("summary", {}, title), list);
  made.ontoggle = () => { if (!list.firstChild) list.append(...lines()); };
  return made;
}

function groupsInWords(data) {
  const colours = [];
  for (const block of data.blocks) colours[block[4]] ??= block[3];
  return data.groups.map((group, number) => {
    const swatch = element("i");
    swatch.style.backgroundColor = colours[number];
    const only = group.models.length === 1 ? "only " : "";
    return element("li", {}, swatch, element("b", {}, only + modelNames(data, group)), ` ${group.said}`);
  });
}

function drawTable(map, data, mostRows, busy) {
  const head = [element("th"), element("th", {scope: "col"}, "embed")];
  for (let layer = 0; layer < data.layers; layer++) {
    const numbered = layer % 4 === 0 || data.layers <= 16;
    head.push(numbered ? element("th", {scope: "col"}, String(layer)) : element("td"));
  }
  head.push(element("th", {scope: "col"}, "head"), element("th", {scope: "col"}, "own of all"));
  const rows = data.models.slice(0, mostRows).map(model => drawRow(data, model, busy));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  table.classList.toggle("many", data.models.length > 12);
  table.style.setProperty("--tile", `${Math.max(14, Math.min(44, Math.round(600 / data.layers)))}px`);
  map.replaceChildren(table);
}

function drawRow(data, model, busy) {
  const adapted = new Set(model.adapters), last = model.chain.length - 1;
  const tile = position => {
    const made = element("i");
    if (position === undefined) return made;
    const block = data.blocks[model.chain[position]];
    made.dataset.block = model.chain[position];
    made.dataset.position = position;
    made.dataset.model = model.name;
    made.style.backgroundColor = block[3];
    made.classList.toggle("own", data.groups[block[4]].models.length === 1);
    made.classList.toggle("adapter", adapted.has(position));
    return made;
  };
  const cells = [element("td", {className: "end", ariaHidden: "true"}, tile(0))];
  for (let layer = 0; layer < data.layers; layer++) {
    const parts = 2 * layer + 2 < last ? [tile(2 * layer + 1), tile(2 * layer + 2)] : [tile(), tile()];
    cells.push(element("td", {ariaHidden: "true"}, ...parts));
  }
  cells.push(element("td", {className: "end", ariaHidden: "true"}, tile(last)));
  const own = element("div");
  own.style.width = `${100 * model.own_share}%`;
  const size = element("td", {className: "size"}, element("div", {}, own), `${model.own} of ${model.all}`);
  const mark = element("b", {className: "busy"});
  busy.set(model.name, mark);
  const name = element("div", {className: "name"}, element("span", {title: model.name}, model.name), mark);
  return element("tr", {}, element("th", {scope: "row"}, name), ...cells, size);
}

/* Say what block is pointed at, and light it up wherever it is used. */
function pointAtBlocks(map, pointed, data) {
  const rest = "A column is a layer: attention above, feed-forward below. Blue: the common trunk, deeper where "
    + "more models share it. Another hue: blocks with the same users. Striped: one model's own. Orange edge: an "
    + "adapter on the block. Point at a block to see where else it is used.";
  const show = tile => {
    const id = tile?.dataset?.block;
    map.firstChild.classList.toggle("focus", id !== undefined);
    if (id === undefined) return pointed.replaceChildren(rest);
    for (const other of map.querySelectorAll("i")) other.classList.toggle("lit", other.dataset.block === id);
    const [name, kind, size, , group] = data.blocks[id], position = Number(tile.dataset.position);
    const users = data.groups[group].models;
    const inLayer = kind === "attention" || kind === "feed-forward";
    const where = inLayer ? `${kind}, layer ${(position - 1) >> 1}` : kind;
    const parts = [where, `block ${name}`, size, `${users.length === 1 ? "only in" : "used by"} ${modelNames(data, data.groups[group])}`];
    if (tile.classList.contains("adapter")) parts.push(`with an adapter of ${tile.dataset.model}`);
    pointed.replaceChildren(...parts.map(text => element("span", {}, text)));
  };
  map.onpointerover = event => show(event.target);
  map.onpointerleave = event => { if (event.pointerType === "mouse") show(null); };
  show(null);
}
