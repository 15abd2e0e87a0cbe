"use strict";
// Everything is asked for relative to this page, so that it works under any prefix.
const $ = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "seed", "top_k", "min_p", "presence_penalty", "frequency_penalty"];
const KEPT = [...NUMBERS, "temperature", "top_p", "system", "stop-at", "format", "schema", "tools", "key"];
const LOADING = {
  starting: "starting", downloading: "downloading", loading_weights: "loading weights",
  capturing: "preparing kernels", warming_up: "warming up",
};

let messages = [];
let running = null; // the AbortController of the answer that is being written
let model = null;

// ---- small things

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

function store() {
  try { sessionStorage.setItem("octavo", JSON.stringify(Object.fromEntries(KEPT.map((id) => [id, $(id).value])))); }
  catch { /* a browser that keeps nothing */ }
}

function restore() {
  try {
    for (const [id, value] of Object.entries(JSON.parse(sessionStorage.getItem("octavo")) || {}))
      if (KEPT.includes(id)) $(id).value = value;
  } catch { /* nothing was kept */ }
}

// ---- what is asked

function problem(text) {
  $("format-problem").textContent = text || "";
  $("format-problem").hidden = !text;
  if (text) $("format-part").open = true;
}

function parsed(id, what) {
  try { return JSON.parse($(id).value); }
  catch (error) { throw new Error(`${what} cannot be read: ${error.message}`); }
}

function body() {
  const system = $("system").value.trim();
  const asked = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value), top_p: Number($("top_p").value),
  };
  if (model) asked.model = model;
  for (const name of NUMBERS) if ($(name).value !== "") asked[name] = Number($(name).value);
  const stops = $("stop-at").value.split("|").filter((text) => text);
  if (stops.length) asked.stop = stops;
  if ($("format").value === "json_object") asked.response_format = { type: "json_object" };
  if ($("format").value === "json_schema")
    asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed("schema", "The schema") } };
  if ($("tools").value.trim()) asked.tools = parsed("tools", "The list of tools");
  return asked;
}

// ---- the conversation

function turn(role, who) {
  $("log").querySelector(".hint")?.remove();
  const element = make("article", "turn " + role);
  element.append(make("div", "who", who));
  $("log").append(element);
  return element;
}

function follow(element) {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
  return element;
}

/** Text with ``` fences as blocks. Nothing of it is ever read as HTML. */
function show(target, text) {
  target.replaceChildren();
  text.split("```").forEach((part, index) => {
    if (index % 2) target.append(make("pre", "", part.replace(/^[\w+-]*\n/, "").replace(/\n$/, "")));
    else if (part.trim()) target.append(make("p", "", part.replace(/^\n+|\n+$/g, "")));
  });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function refused(response) {
  const text = await response.text();
  try { const error = JSON.parse(text).error; return error.message || String(error); }
  catch { return `HTTP ${response.status}: ${text.slice(0, 300)}`; }
}

async function answer() {
  let asked;
  try { asked = body(); problem(""); }
  catch (error) { problem(error.message); return; }
  const element = turn("assistant", model || "assistant");
  const thinking = make("details");
  thinking.append(make("summary", "", "Thinking"), make("p"));
  thinking.hidden = true;
  const text = make("div", "text"), facts = make("div", "facts", "…");
  element.append(thinking, text, facts);
  follow(element);
  const said = { role: "assistant", content: "" }, calls = [];
  let reasoning = "", first = null, usage = null, reason = null;
  running = new AbortController();
  busy(true);
  const began = performance.now();
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(asked), signal: running.signal,
    });
    if (!response.ok) throw new Error(await refused(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      first ??= performance.now();
      reason = choice.finish_reason || reason;
      const delta = choice.delta || {};
      if (delta.reasoning) { reasoning += delta.reasoning; thinking.hidden = false; thinking.lastChild.textContent = reasoning; }
      if (delta.content) { said.content += delta.content; show(text, said.content); }
      for (const part of delta.tool_calls || []) {
        const call = (calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
        if (part.id) call.id = part.id;
        if (part.function?.name) call.function.name = part.function.name;
        call.function.arguments += part.function?.arguments || "";
      }
      facts.textContent = tell(began, first, null, null);
      follow(element);
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else { const note = make("p", "problem", error.message); element.append(note); element.classList.add("failed"); }
  }
  running = null;
  busy(false);
  if (said.content || calls.length) {
    messages.push(calls.length ? { ...said, content: said.content || null, tool_calls: calls } : said);
    facts.textContent = tell(began, first, usage, reason);
  } else {
    facts.textContent = first ? tell(began, first, usage, reason) : "";
    if (!first) messages.pop(); // nothing came of the question: it can be asked again
  }
  if (calls.length) offer(element, calls);
  follow(element);
}

/** "first token 0.12 s · 41.2 tokens/s · 85 tokens in 2.2 s · stop" */
function tell(began, first, usage, reason) {
  if (first === null) return "…";
  const seconds = (performance.now() - began) / 1000, wait = (first - began) / 1000;
  const parts = [`first token ${wait.toFixed(wait < 1 ? 3 : 1)} s`];
  if (usage) {
    const count = usage.completion_tokens;
    if (count > 1) parts.push(`${((count - 1) / Math.max(seconds - wait, 1e-3)).toFixed(1)} tokens/s`);
    parts.push(`${count} tokens in ${seconds.toFixed(1)} s`);
    if (usage.prompt_tokens) parts.push(`prompt ${usage.prompt_tokens}`);
  } else parts.push(`${seconds.toFixed(1)} s`);
  if (reason && reason !== "stop") parts.push(reason === "length" ? "cut by max tokens" : reason.replace("_", " "));
  return parts.join(" · ");
}

/** Calls with a field for each one's result; when all are there, the conversation goes on. */
function offer(element, calls) {
  const form = make("form"), fields = [];
  for (const call of calls) {
    const box = make("div", "call");
    box.append(make("div", "who", `calls ${call.function.name}`), make("pre", "", pretty(call.function.arguments)));
    const field = make("input");
    field.placeholder = "what it returned";
    field.setAttribute("aria-label", `Result of ${call.function.name}`);
    fields.push(field);
    box.append(field);
    form.append(box);
  }
  const button = make("button", "", calls.length > 1 ? "Send results" : "Send result");
  form.append(button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    calls.forEach((call, i) => messages.push({ role: "tool", tool_call_id: call.id, content: fields[i].value }));
    for (const control of [button, ...fields]) control.disabled = true;
    answer();
  });
  element.append(form);
  fields[0].focus();
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", String(is));
}

function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  grow();
  messages.push({ role: "user", content: text });
  show(turn("user", "you").appendChild(make("div", "text")), text);
  $("log").scrollTop = $("log").scrollHeight;
  answer();
}

function restart() {
  running?.abort();
  messages = [];
  $("log").querySelectorAll(".turn").forEach((element) => element.remove());
  $("prompt").focus();
}

function grow() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = field.scrollHeight + 2 + "px";
}

// ---- the engine

const rates = Array(60).fill(0);
let last = null;

async function look() {
  if (document.hidden) return;
  let response;
  try { response = await fetch("ui/status", { headers: headers(), cache: "no-store" }); }
  catch { state("away", "no answer"); return; }
  const refused = response.status === 401, first = refused && $("key-part").hidden;
  $("key-part").hidden = !refused && !$("key").value;
  $("engine-part").hidden = refused;
  if (refused) {
    state("away", $("key").value ? "another key is needed" : "needs a key");
    $("key-part").open = true;
    if (first && !$("prompt").value) $("key").focus();
    return;
  }
  if (!response.ok) { state("away", `HTTP ${response.status}`); return; }
  draw(await response.json());
}

function state(name, text) {
  $("state").dataset.state = name;
  $("state").textContent = text;
}

function draw(now) {
  model = now.model;
  $("model").textContent = now.model;
  document.title = `${now.model.split("/").pop()} · Octavo`;
  const loading = LOADING[now.stage], known = loading && now.progress.total_bytes > 0;
  state(now.stage, loading ? loading + (known ? ` ${Math.floor(now.progress.percent)} %` : "") : now.stage);
  $("progress").hidden = !loading;
  if (known) $("progress").value = now.progress.percent; else $("progress").removeAttribute("value");
  $("load").hidden = now.stage !== "ready" && now.stage !== "draining";
  $("failure").hidden = !now.failure;
  $("failure").textContent = now.failure || "";
  const facts = [];
  if (loading) {
    for (const [stage, seconds] of Object.entries(now.stage_seconds)) facts.push([LOADING[stage] || stage, seconds.toFixed(1) + " s"]);
    if (known) facts.push(["received", `${size(now.progress.done_bytes)} of ${size(now.progress.total_bytes)}`]);
    if (now.progress.eta_s) facts.push(["left", `about ${Math.ceil(now.progress.eta_s)} s`]);
  } else {
    const rate = sample(now);
    facts.push(["running", now.load.running], ["waiting", now.load.waiting]);
    facts.push(["generating", `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`]);
    facts.push(["KV cache", `${(100 * now.load.kv_usage).toFixed(1)} %`]);
    if (now.effective) facts.push(["context", now.effective.max_model_len.toLocaleString("en")], ["computes in", `${now.effective.dtype}, ${now.effective.gpu || "CPU"}`]);
    $("cache").value = now.load.kv_usage;
    chart();
  }
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", String(value))]));
}

function sample(now) {
  const at = performance.now();
  let rate = 0;
  if (last && now.generation_tokens >= last.tokens) rate = (1000 * (now.generation_tokens - last.tokens)) / (at - last.at);
  last = { at, tokens: now.generation_tokens };
  rates.push(rate);
  rates.shift();
  return rate;
}

function chart() {
  const top = Math.max(...rates, 1), space = "http://www.w3.org/2000/svg";
  const points = rates.map((rate, x) => `${x},${(19.5 - (18.5 * rate) / top).toFixed(2)}`).join(" ");
  const area = document.createElementNS(space, "polygon"), line = document.createElementNS(space, "polyline");
  area.setAttribute("points", `0,20 ${points} 59,20`);
  line.setAttribute("points", points);
  $("chart").replaceChildren(area, line);
  $("peak").textContent = `peak ${Math.max(...rates).toFixed(0)}`;
}

function size(bytes) {
  return bytes >= 1e9 ? (bytes / 1e9).toFixed(2) + " GB" : (bytes / 1e6).toFixed(1) + " MB";
}

// ---- wiring

restore();
for (const id of ["temperature", "top_p"]) {
  const write = () => ($(id + "-value").textContent = Number($(id).value).toFixed(2));
  $(id).addEventListener("input", write);
  write();
}
const schema = () => ($("schema-part").hidden = $("format").value !== "json_schema");
schema();
$("format").addEventListener("change", schema);
for (const id of KEPT) $(id).addEventListener("change", store);
$("key").addEventListener("change", look);
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); store(); look(); });
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.querySelector("form.ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", restart);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") { event.preventDefault(); restart(); }
  if (event.key === "/" && !/INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName)) { event.preventDefault(); $("prompt").focus(); }
});
if (matchMedia("(max-width: 820px)").matches)
  for (const id of ["engine-part", "sampling-part"]) $(id).open = false;
look();
setInterval(look, 1000);
