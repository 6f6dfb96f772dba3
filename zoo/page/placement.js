const LEAST_NAMED = 0.07;   // of a worker's memory, that a tile with a name in it takes

/* Draw what `placement_data` gives into an element. */
function drawPlacement(root, data) {
  root.append(...data.said.map(line => element("p", {className: "said"}, `${line}.`)));
  const pointed = element("p", {className: "pointed", role: "status"});
  const workers = element("div", {className: "workers"}, ...data.workers.map(worker => drawWorker(data, worker)));
  const map = element("div", {className: "map", tabIndex: 0, role: "region", ariaLabel: "Ways of the models"}, drawWays(data));
  root.append(element("h2", {}, "Workers"), workers, element("h2", {}, "Ways of the models"), map, pointed);
  pointAtSpans(root, pointed, data);
}

function spanTile(data, span, text) {
  const made = element("i", {title: `${span}: ${data.spans[span].what}`}, text);
  made.dataset.span = span;
  made.style.backgroundColor = data.spans[span].colour;
  return made;
}

function drawWorker(data, worker) {
  const memory = element("div", {className: "memory", role: "img",
    ariaLabel: `${worker.name} holds ${worker.spans.join(", ") || "nothing"}`});
  for (const span of worker.spans) {
    const share = data.spans[span].num_bytes / worker.num_bytes;
    const tile = spanTile(data, span, share < LEAST_NAMED ? "" : span);
    tile.style.height = `${100 * share}%`;
    memory.append(tile);
  }
  const bar = element("div");
  bar.style.width = `${Math.min(100, 100 * worker.busy)}%`;
  const name = worker.is_head ? `${worker.name} (scheduler)` : worker.name;
  return element("section", {className: "worker"}, element("h3", {title: name}, name), element("p", {}, worker.said),
    memory, element("p", {}, `rows keep it busy ${Math.round(100 * worker.busy)} %`),
    element("div", {className: "busy"}, bar));
}

function drawWays(data) {
  const models = Object.entries(data.models), longest = Math.max(0, ...models.map(([, model]) => model.route.length));
  const head = ["model", "tokens/s", ...Array.from({length: longest}, (_, place) => place ? "then" : "first")];
  const rows = models.map(([name, model]) => {
    const cells = model.route.map(([span, worker], place) => {
      const cell = element("td", {}, spanTile(data, span, `${span} on ${worker}`));
      cell.classList.toggle("hop", worker !== (place ? model.route[place - 1][1] : data.workers.find(each => each.is_head).name));
      return cell;
    });
    return element("tr", {}, element("th", {scope: "row"}, name), element("td", {}, String(model.tokens_per_s)), ...cells);
  });
  return element("table", {}, element("thead", {}, element("tr", {}, ...head.map(text => element("th", {scope: "col"}, text)))),
    element("tbody", {}, ...rows));
}

/* Say what span is pointed at, and light it up wherever it lies. */
function pointAtSpans(root, pointed, data) {
  const rest = "A box's height is the memory of a worker, a tile's the span in it. Blue: what most models use. "
    + "An orange edge: hidden states go to another worker. Point at a span to see where it lies.";
  const show = tile => {
    const id = tile?.dataset?.span;
    root.classList.toggle("focus", id !== undefined);
    if (id === undefined) return pointed.replaceChildren(rest);
    for (const other of root.querySelectorAll("i")) other.classList.toggle("lit", other.dataset.span === id);
    const span = data.spans[id];
    const parts = [`span ${id}: ${span.what}`, `${span.blocks.length} blocks, ${span.size}`,
      `${span.call_us} us a call and ${span.token_us} us a token`, `on ${span.workers.join(", ") || "no worker"}`,
      `used by ${span.models.join(", ")}`];
    pointed.replaceChildren(...parts.map(text => element("span", {}, text)));
  };
  root.onpointerover = event => show(event.target);
  root.onpointerleave = event => { if (event.pointerType === "mouse") show(null); };
  show(null);
}

drawPlacement(document.getElementById("placement"), JSON.parse(document.getElementById("data").textContent));
