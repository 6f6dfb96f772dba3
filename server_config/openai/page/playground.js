const AT_ONCE = 5;            // a browser has six connections to a server; one is for the figures
const MANY = 12;              // tenants from which on there is a field to find them
const playground = {models: [], chosen: new Set(), running: null};

/* Show the tenants to choose from; those chosen stay so. */
function showChoices(models) {
  const known = new Set(playground.models.map(model => model.name)), first = !known.size;
  playground.models = models;
  const names = new Set(models.map(model => model.name));
  playground.chosen = new Set([...playground.chosen].filter(name => names.has(name)));
  if (first) for (const model of differing(models, 3)) playground.chosen.add(model.name);
  byId("filter").hidden = models.length < MANY;
  byId("choices").replaceChildren(...models.map(model => {
    const box = element("input", {type: "checkbox", value: model.name, checked: playground.chosen.has(model.name)});
    box.onchange = () => {
      playground.chosen[box.checked ? "add" : "delete"](model.name);
      allowSending();
    };
    return element("label", {title: model.name}, box, element("span", {}, model.name));
  }));
  filterChoices();
  allowSending();
}

/* The first models of which no two are the same weights. */
function differing(models, most) {
  const seen = new Map();
  for (const model of models) {
    const weights = JSON.stringify([model.chain, model.adapters]);
    if (!seen.has(weights)) seen.set(weights, model);
  }
  return [...seen.values()].slice(0, most);
}

/* Choose all tenants that are shown, or none of them. */
function chooseShown(wanted) {
  for (const label of byId("choices").children) {
    if (!label.hidden && label.firstChild.checked !== wanted) label.firstChild.click();
  }
}

function filterChoices() {
  const wanted = byId("filter").hidden ? "" : byId("filter").value.trim().toLowerCase();
  for (const label of byId("choices").children) label.hidden = !label.textContent.toLowerCase().includes(wanted);
}

function allowSending() {
  byId("send").disabled = Boolean(playground.running) || !playground.chosen.size || !byId("prompt").value;
  byId("stop").disabled = !playground.running;
}

/* Send the prompt to everybody chosen, a few at a time. */
async function sendPrompt() {
  const asked = playground.models.filter(model => playground.chosen.has(model.name));
  const settings = {
    max_tokens: byId("max-tokens").valueAsNumber, temperature: byId("temperature").valueAsNumber,
    stream: true, stream_options: {include_usage: true},
  };
  const prompt = byId("prompt").value, cards = asked.map(model => new Card(model));
  const stop = playground.running = new AbortController();
  byId("answers").replaceChildren(...cards.map(card => card.root));
  byId("asked").textContent = `asking ${asked.length}`;
  allowSending();
  const waiting = [...cards];
  const work = async () => {
    while (waiting.length) await waiting.shift().run(prompt, settings, stop.signal);
  };
  await Promise.all(Array.from({length: AT_ONCE}, work));
  const failed = cards.filter(card => card.failed).length;
  byId("asked").textContent = stop.signal.aborted ? "stopped"
    : failed ? `${asked.length - failed} answered, ${failed} failed` : `${asked.length} answered`;
  playground.running = null;
  allowSending();
}

/* One tenant's answer. */
class Card {
  constructor(model) {
    this.model = model;
    this.failed = false;
    this.text = document.createTextNode("");
    this.fresh = "";           // came, and is not yet shown
    this.box = element("pre", {tabIndex: 0, role: "group", ariaLabel: `Answer of ${model.name}`}, this.text);
    this.said = element("p", {className: "said"}, "waits for its turn");
    const how = element("span", {className: "soft"}, model.chat ? "chat" : "completion");
    this.root = element("article", {className: "card"},
      element("header", {}, element("h3", {title: model.name}, model.name), how), this.box, this.said);
  }

  async run(prompt, settings, signal) {
    if (signal.aborted) return this.say("not asked");
    const {name, chat} = this.model;
    const body = chat ? {...settings, model: name, messages: [{role: "user", content: prompt}]}
      : {...settings, model: name, prompt};
    const count = {began: performance.now(), first: null, last: null, tokens: 0, exact: false, reason: null};
    this.root.classList.add("busy");
    this.say("waits for the first token");
    try {
      for await (const event of events(await ask(chat ? "/v1/chat/completions" : "/v1/completions", body, signal))) {
        if (event.error) throw new ServerError(0, event.error.message);
        this.take(event, count);
      }
      this.say(figuresOf(count));
    } catch (error) {
      this.failed = !signal.aborted;
      this.root.classList.toggle("failed", this.failed);
      if (signal.aborted) this.say(count.first === null ? "stopped" : `${figuresOf(count)}, stopped`);
      else this.say(error.message);
      if (error.status === 401) keyIsRefused(error.message);
      if (this.failed && !(error instanceof ServerError)) throw error;
    } finally {
      this.root.classList.remove("busy");
    }
  }

  /* Show what an event adds, and count it. */
  take(event, count) {
    if (event.usage) Object.assign(count, {tokens: event.usage.completion_tokens, exact: true});
    const choice = event.choices[0];
    if (!choice) return;
    count.reason = choice.finish_reason ?? count.reason;
    const text = choice.delta ? choice.delta.content : choice.text;
    if (!text) return;
    count.last = performance.now();
    count.first ??= count.last;
    count.tokens += 1;
    if (!this.fresh) requestAnimationFrame(() => this.draw(count));
    this.fresh += text;
  }

  draw(count) {
    const box = this.box, atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 8;
    this.text.appendData(this.fresh);
    this.fresh = "";
    if (atEnd) box.scrollTop = box.scrollHeight;
    if (this.root.classList.contains("busy")) this.say(figuresOf(count));
  }

  say(text) {
    this.said.textContent = text;
  }
}

/* Time to the first text, and tokens per second from the sending to the last one; pieces of text are counted
   while tokens are not known. */
function figuresOf({began, first, last, tokens, exact, reason}) {
  if (first === null) return exact ? "no text" : "";
  const about = exact ? "" : "about ", parts = [`first token ${Math.round(first - began)} ms`];
  if (tokens > 1) parts.push(`${about}${plain(1000 * tokens / (last - began))} tokens/s`);
  if (exact) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (reason === "length") parts.push("cut at max tokens");
  return parts.join(", ");
}

byId("ask").onsubmit = event => {
  event.preventDefault();
  if (!byId("send").disabled) sendPrompt();
};
byId("stop").onclick = () => playground.running?.abort();
byId("prompt").oninput = allowSending;
byId("prompt").onkeydown = event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
};
byId("choose-all").onclick = () => chooseShown(true);
byId("choose-none").onclick = () => chooseShown(false);
byId("filter").oninput = filterChoices;
byId("filter").onkeydown = event => { if (event.key === "Enter") event.preventDefault(); };
