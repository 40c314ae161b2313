// The web chat: a conversation with one model, or the same questions to two.
// State is what `turns` holds; `show` draws it. Text only ever becomes text (textContent), never markup.

const $ = (id) => document.getElementById(id);
const SETTINGS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/**
 * One question and an answer for each model that was asked: {model, text, note, problem, isBusy, isWhole}. Only whole
 * answers are part of the conversation: what was stopped or failed is neither sent on nor exported.
 */
let turns = [];
const contexts = new Map(); // model -> the most tokens of prompt and answer together
let running = null; // AbortController of the answers under way
let numRepeats = 0; // so that a fixed seed gives another answer when asked again

// The server

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** What an error response says, as an Error that knows its code. */
async function problemOf(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) openSettings("key");
  const message = body?.error?.message ?? `the server answered ${response.status}`;
  return Object.assign(new Error(message), { code: body?.error?.code });
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  if (!response?.ok) {
    notice(response ? (await problemOf(response)).message : "the server cannot be reached");
    return;
  }
  for (const model of (await response.json()).data) contexts.set(model.id, model.max_model_len);
  const names = [...contexts.keys()];
  for (const [index, select] of [$("model-0"), $("model-1")].entries()) {
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.selectedIndex = Math.min(index, names.length - 1);
  }
  notice("");
}

async function loadPages() {
  const pages = await (await fetch("/web/pages.json")).json();
  if (!pages.length) return;
  const here = element("span", "", "Chat");
  here.setAttribute("aria-current", "page");
  $("pages").append(here);
  for (const { title, path } of pages) {
    const link = element("a", "", title);
    link.href = path;
    $("pages").append(link);
  }
}

/** The data of server-sent events, one after the other. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

/** Streams one answer into `answer.text`. */
async function fetchAnswer(answer, request, signal, onText) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ ...request, model: answer.model, stream: true }),
    signal,
  });
  if (!response.ok) throw await problemOf(response);
  for await (const data of events(response)) {
    if (data === "[DONE]") {
      answer.isWhole = true;
      return;
    }
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    answer.text += event.choices[0]?.delta?.content ?? "";
    onText();
  }
  throw new Error("the server broke the answer off");
}

// The conversation

function models() {
  const names = [$("model-0").value];
  if ($("compare").checked) names.push($("model-1").value);
  return names;
}

/** Questions and their whole answers in this column, from turn `start` to before turn `end`. */
function exchanges(column, end, start = 0) {
  return turns.slice(start, end)
    .map((turn) => ({ question: turn.question, answer: turn.answers[column] ?? turn.answers[0] }))
    .filter(({ answer }) => answer.isWhole);
}

function messages(said) {
  const system = $("system").value.trim();
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...said.flatMap(({ question, answer }) => [
      { role: "user", content: question }, { role: "assistant", content: answer.text },
    ]),
  ];
}

/** An answer may take half of its model's context; the other half is for the conversation. */
function settings(model) {
  const wanted = {};
  for (const name of SETTINGS) {
    if ($(name).value !== "") wanted[name] = Number($(name).value);
  }
  if (wanted.seed !== undefined) wanted.seed += numRepeats;
  const room = Math.floor(contexts.get(model) / 2);
  if (wanted.max_tokens > room) wanted.max_tokens = room;
  return wanted;
}

/** Ask the question of the last turn; its earlier answers are replaced. */
async function ask() {
  const index = turns.length - 1;
  const turn = turns[index];
  turn.answers = models().map((model) => ({ model, text: "", note: "", problem: "", isBusy: true, isWhole: false }));
  running = new AbortController();
  show();
  const { signal } = running;
  await Promise.all(
    turn.answers.map(async (answer, column) => {
      try {
        await answerWithin(answer, column, index, signal);
      } catch (error) {
        if (!signal.aborted) answer.problem = error.message;
        answer.note = "This question and its answer are left out of what follows, and of an export.";
      }
      answer.isBusy = false;
    }),
  );
  running = null;
  show();
  $("question").focus();
}

/** Streams an answer; where the conversation outgrows the model's context, its oldest turns are left out. */
async function answerWithin(answer, column, index, signal) {
  for (let start = 0; ; start += 1) {
    const said = messages(exchanges(column, index, start));
    said.push({ role: "user", content: turns[index].question });
    const request = { ...settings(answer.model), messages: said };
    try {
      await fetchAnswer(answer, request, signal, () => showText(index, column));
      if (start) answer.note = `Earlier questions that did not fit the model's context: ${start}`;
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || start >= index) throw error;
    }
  }
}

function send(question) {
  if (running || !question.trim()) return;
  turns.push({ question, answers: [] });
  numRepeats = 0;
  $("question").value = "";
  ask();
}

function regenerate() {
  numRepeats += 1;
  ask();
}

/** Ask an earlier question anew, in other words; what came after it is dropped. */
function replaceQuestion(index, question) {
  turns = turns.slice(0, index);
  send(question);
}

function stop() {
  running?.abort();
}

/** One JSON line a column, in the form that `dovetail sft` reads, and the model of each of its answers. */
function exportConversation() {
  const columns = turns.at(-1).answers.map((_, column) => exchanges(column, turns.length));
  const lines = columns.filter((said) => said.length > 0).map((said) => {
    const names = said.map(({ answer }) => answer.model);
    const model = new Set(names).size === 1 ? names[0] : names;
    return `${JSON.stringify({ model, messages: messages(said) })}\n`;
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

// The page

function element(tag, className, text, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function button(label, onClick) {
  const made = element("button", "", label);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

function questionBlock(turn, index) {
  const block = element("div", "question", "", element("div", "text", turn.question));
  if (running) return block;
  const edit = button("Edit", () => editQuestion(block, turn, index));
  block.append(element("div", "actions", "", edit));
  return block;
}

function editQuestion(block, turn, index) {
  const field = element("textarea", "");
  field.value = turn.question;
  field.rows = 3;
  field.setAttribute("aria-label", "Edit the message");
  const save = button("Ask again", () => replaceQuestion(index, field.value));
  const cancel = button("Cancel", show);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show();
    if (isSendKey(event)) {
      event.preventDefault();
      replaceQuestion(index, field.value);
    }
  });
  block.replaceChildren(field, element("div", "actions", "", save, cancel));
  field.focus();
}

function answerBlock(answer) {
  const block = element("div", answer.isBusy ? "answer busy" : "answer", "");
  block.append(element("div", "who", answer.model), element("div", "text", answer.text));
  if (answer.note) block.append(element("div", "who", answer.note));
  if (answer.problem) {
    const problem = element("div", "problem", answer.problem);
    problem.setAttribute("role", "alert");
    block.append(problem);
  }
  return block;
}

function show() {
  const conversation = $("conversation");
  const blocks = turns.map((turn, index) => {
    const answers = element("div", turn.answers.length > 1 ? "answers two" : "answers", "");
    answers.append(...turn.answers.map(answerBlock));
    const block = element("div", "turn", "", questionBlock(turn, index), answers);
    if (index === turns.length - 1 && !running) {
      block.append(element("div", "actions", "", button("Regenerate", regenerate)));
    }
    return block;
  });
  conversation.replaceChildren(...(blocks.length ? blocks : [EMPTY]));
  conversation.setAttribute("aria-busy", String(running !== null));
  conversation.scrollTop = conversation.scrollHeight;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("new").disabled = running !== null;
  $("export").disabled = running !== null || !turns.some((turn) => turn.answers.some((answer) => answer.isWhole));
}

/** More text of one answer, without drawing the rest anew. */
function showText(index, column) {
  const conversation = $("conversation");
  const isAtEnd = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 80;
  const texts = conversation.children[index]?.querySelectorAll(".answer .text");
  if (texts?.[column]) texts[column].textContent = turns[index].answers[column].text;
  if (isAtEnd) conversation.scrollTop = conversation.scrollHeight;
}

function notice(text) {
  $("notice").textContent = text;
}

function openSettings(focused) {
  $("settings").hidden = false;
  $("toggle-settings").setAttribute("aria-expanded", "true");
  if (focused) $(focused).focus();
}

function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

const EMPTY = $("empty");

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("question").value);
});
$("question").addEventListener("keydown", (event) => {
  if (!isSendKey(event)) return;
  event.preventDefault();
  send($("question").value);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => {
  turns = [];
  show();
  $("question").focus();
});
$("export").addEventListener("click", exportConversation);
$("compare").addEventListener("change", () => {
  $("model-1").disabled = !$("compare").checked;
});
$("toggle-settings").addEventListener("click", () => {
  const isHidden = !$("settings").hidden;
  $("settings").hidden = isHidden;
  $("toggle-settings").setAttribute("aria-expanded", String(!isHidden));
});
$("key").value = sessionStorage.getItem("dovetail-key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("dovetail-key", $("key").value.trim());
  loadModels();
});

show();
loadModels();
loadPages();
