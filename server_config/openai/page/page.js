const EVERY_MS = 1000;
const SLOWEST_MS = 10000;     // between two tries while the server does not answer
const PATIENCE_MS = 8000;     // for an answer
const live = {zoo: null, map: null, failures: 0, timer: null, looking: null, locked: false};

/* Look at the server once, and again in a while; not while nobody sees the page. */
async function look() {
  clearTimeout(live.timer);
  if (live.looking || live.locked || document.hidden) return;
  const stop = live.looking = new AbortController();
  try {
    const figures = await get("/page/figures", stop.signal);
    if (figures.zoo !== live.zoo) showZoo(await get("/page/zoo", stop.signal));
    showFigures(figures);
    for (const [name, mark] of live.map.busy) {
      const [running, waiting] = figures.models[name] ?? [0, 0];
      mark.textContent = running + waiting ? whole.format(running + waiting) : "";
      mark.title = running + waiting ? `${running} running, ${waiting} waiting` : "";
    }
    live.failures = 0;
    const missing = figures.models_left_out;
    say("well", missing ? `live; ${missing} left out: see the server's log` : "live");
  } catch (error) {
    if (stop.signal.aborted) return;
    if (error.status === 401) return keyIsRefused(error.message);
    live.failures += 1;
    const wait = Math.round(pause() / 1000), why = error.message.replace(/[^.]$/, "$&.");
    say("gone", `${why} Trying again every ${wait === 1 ? "second" : `${wait} seconds`}.`);
    if (!(error instanceof ServerError)) throw error;
  } finally {
    live.looking = null;
    if (!live.locked && !document.hidden) live.timer = setTimeout(look, pause());
  }
}

function pause() {
  return Math.min(SLOWEST_MS, EVERY_MS * 2 ** Math.max(0, live.failures - 1));
}

async function get(path, stop) {
  const response = await ask(path, null, AbortSignal.any([stop, AbortSignal.timeout(PATIENCE_MS)]));
  return response.json().catch(noAnswer("The server does not answer."));
}

function showZoo(zoo) {
  live.map = drawSharing(byId("map"), zoo);
  live.zoo = zoo.zoo;
  byId("title").textContent = zoo.title;
  document.title = `${zoo.title}: blockzoo`;
  showChoices(zoo.models);
  byId("key-form").hidden = true;
  byId("forget").hidden = !key.value;
  byId("main").hidden = byId("parts").hidden = false;
}

/* Say how it is; only what changes, since it is read out. */
function say(kind, text) {
  byId("state").className = kind;
  byId("main").classList.toggle("stale", kind === "gone");
  const place = document.querySelector("#state span");
  if (place.textContent !== text) place.textContent = text;
}

/* Ask for a key. What was shown with the last one goes. */
function keyIsRefused(message) {
  playground.running?.abort();
  live.looking?.abort();
  live.locked = true;
  live.zoo = null;
  const given = Boolean(key.value);
  key.set("");
  byId("main").hidden = byId("parts").hidden = byId("forget").hidden = true;
  byId("answers").replaceChildren();
  byId("key-form").hidden = false;
  byId("key-said").textContent = given ? message : "";
  byId("key").focus();
  say("trying", "needs an API key");
}

byId("key-form").onsubmit = event => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = byId("key-said").textContent = "";
  live.locked = false;
  if (key.value) look();
};
byId("forget").onclick = () => {
  key.set("");
  keyIsRefused("");
};
document.addEventListener("visibilitychange", look);
window.addEventListener("online", look);
key.load();
if (document.body.dataset.keys === "asked" && !key.value) keyIsRefused("");
else look();
