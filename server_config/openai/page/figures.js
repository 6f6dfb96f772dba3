const WINDOW_S = 60;          // of cache hits, and of the line of tokens
const SHORT_S = 4;            // of tokens per second
const GAP_S = 10;             // a pause after which the line begins anew
const readings = [];          // readings, oldest first

/* Show a reading of /page/figures. */
function showFigures(now) {
  const last = readings.at(-1);
  if (last && now.at === last.at) return showNow(now);
  const restarted = last && (now.engine_calls_total < last.engine_calls_total || now.at < last.at);
  if (restarted || (last && now.at - last.at > GAP_S)) readings.length = 0;
  readings.push(now);
  while (now.at - readings[0].at > WINDOW_S) readings.shift();
  showNow(now);
}

/* The oldest reading of the last seconds. */
function reading(seconds) {
  const now = readings.at(-1);
  return readings.find(old => now.at - old.at <= seconds) ?? now;
}

function showNow(now) {
  const set = (name, text) => { document.querySelector(`[data-f=${name}]`).textContent = text; };
  const short = reading(SHORT_S), long = reading(WINDOW_S);
  set("running", whole.format(now.requests_running));
  set("requests", `${whole.format(now.requests_waiting)} waiting, ${whole.format(now.requests_arrived_total)} so far`);
  const passed = now.at - short.at;
  set("rate", passed ? plain((now.generated_tokens_total - short.generated_tokens_total) / passed) : "–");
  set("generated", `${whole.format(now.generated_tokens_total)} so far`);
  drawSpark();
  set("pages", whole.format(now.pages_used));
  set("pages-of", `of ${whole.format(now.pages_total)}`);
  set("cached", `${whole.format(now.pages_cached)} more keep prefixes`);
  byId("used-bar").style.width = `${100 * now.pages_used / Math.max(1, now.pages_total)}%`;
  byId("cached-bar").style.width = `${100 * now.pages_cached / Math.max(1, now.pages_total)}%`;
  const recent = now.prompt_tokens_total > long.prompt_tokens_total, start = recent ? long : {prompt_tokens_total: 0, cached_tokens_total: 0};
  const prompts = now.prompt_tokens_total - start.prompt_tokens_total;
  const share = prompts ? (now.cached_tokens_total - start.cached_tokens_total) / prompts : null;
  set("hits", share === null ? "–" : `${(100 * share).toFixed(0)} %`);
  set("hits-said", share === null ? "nothing asked yet" : recent ? "of the last minute" : "since the start");
  const rows = figures => figures.mean_batch_per_block * figures.engine_calls_total;
  const calls = now.engine_calls_total - short.engine_calls_total;
  set("batch", calls > 0 ? plain((rows(now) - rows(short)) / calls) : "–");
  set("batch-said", `${plain(now.mean_batch_per_block)} since the start`);
}

function drawSpark() {
  const now = readings.at(-1).at, points = [];
  for (let index = 1; index < readings.length; index++) {
    const [before, after] = [readings[index - 1], readings[index]];
    points.push([after.at, (after.generated_tokens_total - before.generated_tokens_total) / (after.at - before.at)]);
  }
  const top = Math.max(1, ...points.map(point => point[1]));
  const x = at => (120 * (1 - (now - at) / WINDOW_S)).toFixed(1), y = rate => (27 - 25 * rate / top).toFixed(1);
  byId("spark").setAttribute("d", points.map(([at, rate], n) => `${n ? "L" : "M"}${x(at)} ${y(rate)}`).join(""));
}
