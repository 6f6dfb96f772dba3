const byId = id => document.getElementById(id);
const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const plain = value => value >= 100 ? whole.format(value) : value >= 9.95 ? value.toFixed(0) : value.toFixed(1);

/* What the server answered instead. */
class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/* The API key: kept until the tab closes, or for as long as the page is open where that is not allowed. */
const key = {
  value: "",
  load() {
    try { this.value = sessionStorage.getItem("blockzoo-key") ?? ""; } catch { /* stays in memory */ }
  },
  set(value) {
    this.value = value;
    try {
      if (value) sessionStorage.setItem("blockzoo-key", value);
      else sessionStorage.removeItem("blockzoo-key");
    } catch { /* stays in memory */ }
  },
  headers() {
    if (!this.value) return {};
    // headers take bytes: those of UTF-8, as the server's hash of the key does
    return {authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(this.value))}`};
  },
};

/* Send a request. Throws ServerError, with status 0 where there is no answer; AbortError where it was stopped. */
async function ask(path, body, signal) {
  const sent = body && {method: "POST", body: JSON.stringify(body)};
  const type = body ? {"content-type": "application/json"} : {};
  const options = {...sent, headers: {...type, ...key.headers()}, signal, cache: "no-store"};
  const response = await fetch(path, options).catch(noAnswer("The server does not answer."));
  if (response.ok) return response;
  const error = await response.json().catch(() => null);
  throw new ServerError(response.status, error?.error?.message ?? `The server answered ${response.status}.`);
}

function noAnswer(message) {
  return error => {
    throw error.name === "AbortError" ? error : new ServerError(0, message);
  };
}

/* The objects of an event stream, as they come. Throws as `ask`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const {done, value} = await reader.read().catch(noAnswer("The server went away."));
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
